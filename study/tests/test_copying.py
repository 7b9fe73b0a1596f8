"""What a constraint line is worth, where a sentence is lost, and the rehearsal of pretraining at toy size."""
import functools
import json
import random
import shutil

import pytest
import torch
from conftest import ROOT, random_model, tiny_config
from safetensors.torch import load_file

import pretrain
import train_sft
from checkpoint import WEIGHTS
from data import builtin, generate
from study import asked, lost_sentence, rehearsal

STORY = "小猫在小河边拍皮球。皮球掉进了小河！河水哗啦啦地流着，真好听。“我帮你捞上来！”小鸭说。"


def test_a_line_is_measured_with_and_without_it(tok, monkeypatch):
    def stories(model, tokenizer, prompts, *_):
        return [["小猫在小河边。" if "词汇" in p else "小猫在河边。" if "特点" in p else "哞。"] for p in prompts], None
    monkeypatch.setattr(asked, "write_stories", stories)
    rows = [{"constraints": {"词汇": ["小猫", "小河"], other: value}, "story": STORY, "rivals": []}
            for other, value in (("特点", ["对话"]), ("随机句子", "河水哗啦啦地流着，真好听。"))]
    model = random_model(tiny_config(tok.vocab_size))
    measured = asked.measure(model, tok, rows, "词汇")
    # without it 小猫 is in one of the stories, 小河 in none
    assert measured["n"] == 2 and measured["with"] == 1 and measured["without"] == pytest.approx(0.25)
    assert measured["change"]["rate"] == pytest.approx(0.75)
    assert len(measured["nats"]) == 2 and measured["nats"][0] != measured["nats"][1]
    with_line = [loss for row in rows for loss in asked.first_pieces(model, tok, row, row["constraints"], "词汇")]
    assert measured["nats"][0] == pytest.approx(sum(with_line) / 4)
    assert asked.measure(model, tok, rows[1:], "随机句子")["with"] == 0
    assert "100.0%     25.0%" in asked.line("词汇", measured)
    twist = [{"constraints": {"特点": ["转折"], "词汇": ["小猫"]}, "story": STORY, "rivals": []}]
    assert asked.line("特点", asked.measure(model, tok, twist, "特点")) == "特点: nothing that a rule can tell"


def test_the_rehearsal_makes_what_is_missing(tmp_path, monkeypatch, capsys, refused):
    monkeypatch.setattr(rehearsal, "STAGES", (2, 3))
    monkeypatch.setattr(rehearsal, "PRETRAINING", ["--batch-size", 2, "--block-size", 512, "--eval-every", 1])
    monkeypatch.setattr(rehearsal, "STORIES", ["--n", 40, "--seed", 2])
    monkeypatch.setattr(rehearsal, "FINE_TUNING", ["--val-fraction", 0.1, "--batch-size", 2])
    monkeypatch.setattr(rehearsal, "FINE_TUNING_STEPS", 1)
    monkeypatch.setattr(rehearsal, "JUDGED", 8)
    monkeypatch.setattr(rehearsal, "copying", functools.partial(rehearsal.copying, n=4))
    monkeypatch.setattr(asked, "SAMPLING", asked.SAMPLING | {"max_new_tokens": 5})
    monkeypatch.setattr(builtin, "BOOKS", 60)
    monkeypatch.setattr(builtin, "EXERCISES", 9)
    monkeypatch.setattr(builtin, "VALIDATION_STORIES", 20)
    monkeypatch.setattr(pretrain, "VAL_WINDOWS", 2)
    monkeypatch.setattr(train_sft, "print_cases", lambda *_: None)
    argv = ["--out", str(tmp_path / "out")]
    rehearsal.main(argv)
    first = capsys.readouterr().out
    files = (tmp_path / "out").rglob("copying.json")
    measured = sorted((json.loads(path.read_text(encoding="utf-8")) for path in files), key=lambda row: row["tokens"])
    shipped = json.loads((ROOT / "base" / "corpus.json").read_text(encoding="utf-8"))
    assert [row["tokens"] for row in measured] == [2 * 2048, 3 * 2048, round(shipped["epochs"] * shipped["tokens"])]
    # the base that ships copies, these have not begun
    assert measured[2]["base"]["again"] < 1 < measured[0]["base"]["again"]
    assert first.count("M | ") == 3 and (tmp_path / "out" / "rehearsal.png").is_file()
    stages = [load_file(tmp_path / "out" / f"base_{steps}" / WEIGHTS) for steps in (2, 3)]
    assert any(not torch.equal(value, stages[1][name]) for name, value in stages[0].items())
    times = {path: path.stat().st_mtime_ns for name in (WEIGHTS, "copying.json")
            for path in (tmp_path / "out").rglob(name)}
    rehearsal.main(argv)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert capsys.readouterr().out.splitlines()[-3:] == first.splitlines()[-3:]
    (tmp_path / "file").touch()
    refused(rehearsal.main, ["--out", str(tmp_path / "file")], "file")
    shutil.rmtree(tmp_path / "out" / "base_2")  # it cannot be made again out of a run that went on
    refused(rehearsal.main, argv, "base_2", "beyond its step 2")


def grammar():
    """Two plots, compiled: one with a beat of two phrasings and two endings, and another one."""
    who = generate.Slot("hero")
    windy = [["风吹走了", who, "的", ["红", "蓝"], "帽子。"], ["", who, "的帽子飞到天上去了。"]]
    endings = [[["", who, "爬上树把它拿回来。"]], [["谁也没有再见过它。"]]]
    hat = [{"beats": [(False, (windy, windy)), (False, (ending, ending))]} for ending in endings]
    rain = [["雨下了三天三夜，", who, "只好待在家里。"]]
    return [{"name": "hat", "endings": hat}, {"name": "rain", "endings": [{"beats": [(False, (rain, rain))]}]}]


@pytest.mark.parametrize("story, expected", [
    ("风吹走了豆豆的红帽子。谁也没有再见过它。", "met"),
    ("雨下了三天三夜，豆豆只好待在家里。", "plot"),
    ("从前有一座山。", "plot"),
    ("豆豆爬上树把它拿回来。", "beat"),
    ("豆豆的帽子飞到天上去了。豆豆爬上树把它拿回来。", "phrasing"),
    ("风吹走了乐乐的红帽子。乐乐爬上树把它拿回来。", "words"),
    ("风吹走了豆豆的蓝帽子。豆豆爬上树把它拿回来。", "words"),
])
def test_where_a_sentence_is_lost(story, expected):
    own = "风吹走了豆豆的红帽子。豆豆爬上树把它拿回来。"
    phrasings = lost_sentence.all_phrasings(grammar())
    assert len(phrasings) == 5  # the beat that both endings have counts once
    assert lost_sentence.lost_at("风吹走了豆豆的红帽子。", own, story, phrasings) == expected
    assert lost_sentence.lost_at("好大的风！", "好大的风！" + own, story, phrasings) is None


def test_shares_of_lost_sentences(tok, monkeypatch):
    own = "风吹走了豆豆的红帽子。豆豆爬上树把它拿回来。"
    rows = [{"constraints": {"随机句子": sentence}, "story": "好大的风！" + own}
            for sentence in ("风吹走了豆豆的红帽子。", "豆豆爬上树把它拿回来。", "好大的风！")]
    monkeypatch.setattr(lost_sentence, "write_stories", lambda _model, _tok, prompts, *_: ([[own[:11]]] * 3, None))
    shares, n = lost_sentence.measure(None, tok, rows, lost_sentence.all_phrasings(grammar()))
    assert n == 2 and shares == {"plot": 0, "beat": 0.5, "phrasing": 0, "words": 0, "met": 0.5}


def test_no_share_of_no_sentences(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.jsonl"
    row = {"instruction": "随机句子：河水哗啦啦地流着，真好听。", "output": STORY}
    path.write_text(json.dumps(row), encoding="utf-8")
    monkeypatch.setattr(lost_sentence, "write_stories", lambda _model, _tok, rows, *_: ([[STORY] for _ in rows], 1))
    lost_sentence.main([str(ROOT / "base"), "--data", str(path)])
    assert capsys.readouterr().out.splitlines()[1:] == [" without 摘要, n   0: no sentence of the grammar"]


def test_lost_sentences_need_sentences(tmp_path, refused):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"instruction": "特点：对话", "output": STORY}), encoding="utf-8")
    refused(lost_sentence.main, [str(ROOT / "base"), "--data", str(path)], "no row with a sentence")
    refused(lost_sentence.main, [str(ROOT / "base"), "--data", str(tmp_path / "none.jsonl")], "none.jsonl")


def test_every_story_of_the_grammar_is_known_by_its_plot():
    plots = generate.load()[1]
    phrasings = lost_sentence.all_phrasings(plots)
    kept = 0
    for i in range(60):
        record, details = generate.compose(plots, random.Random(f"known-{i}"))
        assert lost_sentence.analysed(record["text"], phrasings)[0] == details["plot"]["name"]
        kept += lost_sentence.lost_at(record["sentence"], record["text"], record["text"], phrasings) == "met"
    assert kept > 54
