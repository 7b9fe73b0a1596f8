"""sample.py --force: what is asked for becomes likelier, and nothing else."""
import math

import pytest

import sample
from checkpoint import find_base, load_model
from dataset import encode_prompt
from decoding import generate
from force import BONUS, FOLLOWS, steer_to

ASKED = "词汇：铲子，风筝\n随机句子：门铃响了，门外却一个人也没有。"


def added(tok, told, instruction=ASKED):
    return steer_to(tok)(encode_prompt(tok, instruction), tok.encode(told))


def test_what_has_not_been_told_grows_likelier_with_every_sentence(tok):
    first = {text: tok.encode(text)[0] for text in ("铲子", "风筝", "门铃响了，门外却一个人也没有。")}
    for story, sentences in (("", 0), ("小兔来了。", 1), ("小兔来了。他笑了。", 2)):
        bonus = added(tok, story)
        assert bonus.pop(tok.eos_id) == -math.inf
        assert bonus == dict.fromkeys(first.values(), BONUS * sentences)
    assert first["铲子"] not in added(tok, "铲子在这儿。")


def test_within_a_sentence_only_the_end_is_forbidden(tok):
    assert added(tok, "小兔来") == {tok.eos_id: -math.inf}


def test_what_has_begun_is_completed(tok):
    ids = tok.encode("门铃响了，门外却一个人也没有。")
    for n in range(1, len(ids)):
        steered = steer_to(tok)(encode_prompt(tok, ASKED), tok.encode("小兔来了。") + ids[:n])
        assert steered[ids[n]] == FOLLOWS
    steered = steer_to(tok)(encode_prompt(tok, ASKED), tok.encode("小兔说门") + ids[:1])
    assert FOLLOWS not in steered.values()  # it did not begin a sentence


def test_nothing_asked_or_all_told_changes_nothing(tok):
    assert added(tok, "小兔来了。", "特点：对话") == {}
    assert added(tok, "小兔来了。", "摘要：小兔来了又走了。") == {}
    assert added(tok, "门铃响了，门外却一个人也没有。铲子和风筝。") == {}


def test_one_word_within_another_and_one_that_begins_alike(tok):
    both = added(tok, "小兔来了。", "词汇：花，花园")
    assert {tok.encode(word)[0] for word in ("花", "花园")} == set(both) - {tok.eos_id}
    assert added(tok, "花园到了。", "词汇：花，花园") == {}


def test_the_base_tells_all_of_it_and_several_at_once_as_one_alone():
    base = find_base()
    model, tokenizer = load_model(base)
    model.float().eval()
    asked = {ASKED: ["铲子", "风筝", "门铃响了，门外却一个人也没有。"],
             "词汇：体温计，讨价还价": ["体温计", "讨价还价"],
             "随机句子：前面黑得什么也看不见。": ["前面黑得什么也看不见。"]}
    prompts = [encode_prompt(tokenizer, instruction) for instruction in asked]
    settings = {"temperature": 0, "eos_id": tokenizer.eos_id}
    told = generate(model, prompts, 300, **settings, steer=steer_to(tokenizer))
    for ids, texts in zip(told, asked.values()):
        assert all(text in tokenizer.decode(ids) for text in texts)
    assert told[0] == generate(model, prompts[:1], 300, **settings, steer=steer_to(tokenizer))[0]
    assert told != generate(model, prompts, 300, **settings)


@pytest.mark.parametrize("how", [["--instruction", "词汇：铲子，风筝"], ["--file", "prompts.txt"],
                                 ["--instruction", "词汇：铲子，风筝", "--best-of", "2"]])
def test_the_flag(how, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("词汇：铲子，风筝\n", encoding="utf-8")
    sample.main(["--ckpt", str(find_base()), "--force", "--max-new-tokens", "200", *how])
    assert "✓ 词汇 铲子  ✓ 词汇 风筝" in capsys.readouterr().out
