"""evaluate.py: planted cases for every rule, what must score 1 and what 0, the intervals, the command."""
import json
import os
import random

import numpy as np
import pytest
import torch
from conftest import random_model, tiny_config

import evaluate
import pretrain
import train_sft
from checkpoint import save_model
from constraints import KEYS, common_subsequence, overlap, parse, render, rouge_l, tells
from data import books
from evaluate import (
    add_rivals,
    builtin_rows,
    highest_rouge2,
    interval,
    judge,
    longest_common,
    obedience,
    order_spread,
    piece_losses,
    plain_loss,
    read_rows,
    repetition,
    verdicts,
)
from pretrain import train_tokenizer
from sample import CASES

ALL = {"词汇": ["皮球", "小河"], "特点": ["对话"], "摘要": "小猫把皮球掉进小河，小鸭帮它捞了上来。",
       "随机句子": "河水哗啦啦地流着，真好听。"}
MEETS = "小猫在小河边拍皮球。皮球掉进了小河！河水哗啦啦地流着，真好听。“我帮你捞上来！”小鸭说。"


def row(constraints, story=None, rivals=("小狗过生日，收到了许多礼物，开心极了。",)):
    return {"constraints": constraints, "story": story, "rivals": list(rivals)}


@pytest.mark.parametrize("kind, story, met", [
    (None, MEETS, True),
    ("词汇", MEETS.replace("皮球", "皮毬"), False),
    ("词汇", MEETS.replace("皮球", "皮\n球"), False),  # across a line break it is not the word
    ("特点", MEETS.replace("“", "").replace("”", ""), False),
    ("特点", "小猫叫“点点”。", False),
    ("随机句子", MEETS.replace("哗啦啦", "哗啦"), False),
    ("随机句子", MEETS.replace("，", ", ").replace("。", "."), True),  # half-width
    ("随机句子", MEETS + MEETS, True),  # twice is there too
    ("摘要", "小狗过生日，收到了许多礼物。", False),
    *[(key, "", False) for key in KEYS]])
def test_planted_cases(kind, story, met):
    verdict = judge(verdicts(row(ALL), story))
    assert all(verdict.values()) if kind is None else verdict[kind] is met


def test_what_no_rule_can_tell():
    assert judge(verdicts(row({"特点": ["转折"]}), MEETS)) == {"特点": None}
    assert judge(verdicts(row({"特点": ["转折", "对话"]}), MEETS)) == {"特点": True}
    assert judge(verdicts(row({"摘要": "小猫。"}, rivals=()), MEETS)) == {"摘要": None}


def test_a_detector_tells_the_features_it_knows_and_only_those():
    def detect(story):
        return {"转折": "没想到" in story}
    asked = row({"特点": ["转折", "对话", "伏笔"], "词汇": ["皮球"]})
    assert verdicts(asked, MEETS, detect)["特点"] == {"转折": False, "对话": True, "伏笔": None}
    assert judge(verdicts(asked, MEETS, detect)) == {"特点": False, "词汇": True}
    result = obedience([asked], [[MEETS, "没想到，" + MEETS]], 1, detect)
    assert result["satisfied"]["2"]["rate"] == 1 / 2 and result["unchecked_features"] == 1
    assert result["by_kind"]["特点 转折"]["rate"] == 1 / 2 and result["by_kind"]["特点 对话"]["rate"] == 1
    assert "特点 伏笔" not in result["by_kind"]


def test_subsequences_and_overlaps():
    assert common_subsequence("小猫在河边", "小狗猫在河的边") == 5 and common_subsequence("", "河") == 0
    assert common_subsequence("abcbdab", "bdcaba") == 4
    assert rouge_l("小猫，来了。", "小猫咪来") == 3 / 4 and rouge_l("。", "小猫") == 0
    assert overlap("小猫来", "小猫来了") == 1 and overlap("小猫来", "小猫走") == 1 / 3 and overlap("", "小猫") == 0
    assert not tells("小猫来了", "小猫来了", ["小猫来了"])  # a tie tells nothing


def test_a_copy_oracle_scores_one_and_silence_nothing():
    rows = [row(c) for c in (ALL, {"词汇": ALL["词汇"]}, {"随机句子": ALL["随机句子"], "词汇": ["小河"]})]
    oracle = ["。".join(["，".join(r["constraints"]["词汇"]), r["constraints"].get("随机句子", ""),
                        r["constraints"].get("摘要", ""), "“好！”他说。"]) for r in rows[:1]]
    oracle += ["，".join(r["constraints"]["词汇"]) + r["constraints"].get("随机句子", "") for r in rows[1:]]
    best, worst = obedience(rows, [[s] for s in oracle], 1), obedience(rows, [["从前。"]] * 3, 1)
    assert {v["rate"] for v in best["satisfied"].values()} == {1.0} and set(best["satisfied"]) == {"1", "2", "4"}
    assert all(v["rate"] == 1 for v in best["by_kind"].values())
    assert {v["rate"] for v in worst["satisfied"].values()} == {0.0}


def test_rates_by_number_and_were_errors_independent():
    words, sentence = {"词汇": ["河"]}, {"随机句子": "小猫来了。"}
    rows = [row(words)] * 4 + [row(sentence)] * 4 + [row(words | sentence)] * 2
    told = [["河"], ["河"], ["河"], ["山"], ["小猫来了"], ["小猫来了"], ["山"], ["山"], ["河，小猫来了"], ["河"]]
    result = obedience(rows, told, 1)
    assert result["satisfied"]["1"]["rate"] == 5 / 8 and result["satisfied"]["1"]["n"] == 8
    assert result["satisfied"]["2"]["rate"] == 1 / 2
    assert result["independent"] == {"2": 3 / 4 * 1 / 2}  # of the single ones, not of all
    assert result["by_kind"]["词汇"]["rate"] == 5 / 6


def test_what_cannot_be_checked_is_left_out_and_counted():
    rows = [row({"特点": ["转折", "冲突"]}), row({"特点": ["坏结局"], "词汇": ["河"]})]
    result = obedience(rows, [["河"], ["河"]], 1)
    assert result["unchecked_features"] == 3
    assert {k: v["n"] for k, v in result["satisfied"].items()} == {"1": 1}


def test_intervals_cover_the_truth():
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(400):  # instructions differ in difficulty; two samples of each
        difficulty = rng.beta(2, 1, size=80)
        found = interval(rng.random((80, 2)) < difficulty[:, None], trial)
        inside += found["lo"] <= 2 / 3 <= found["hi"]
    assert 0.92 <= inside / 400 <= 0.98
    assert interval([], 1) == {"rate": None, "lo": None, "hi": None, "n": 0}


def test_longest_common_substring_and_rouge2_against_brute_force():
    rng = random.Random(0)
    training = ["".join(rng.choices("猫狗兔河山", k=rng.randint(1, 60))) for _ in range(30)]
    told = ["".join(rng.choices("猫狗兔河山鸟", k=rng.randint(0, 50))) for _ in range(30)] + [training[3], "鸟", ""]

    def longest(story):
        return max((j - i for i in range(len(story)) for j in range(i + 1, len(story) + 1)
                    if any(story[i:j] in t for t in training)), default=0)
    assert longest_common(told, training) == [longest(s) for s in told]

    def rouge2(story):
        grams = [story[i:i + 2] for i in range(len(story) - 1)]
        counts = [[t[i:i + 2] for i in range(len(t) - 1)] for t in training]
        return max((sum(min(grams.count(g), c.count(g)) for g in set(grams)) / len(grams) for c in counts),
                   default=0) if grams else 0
    assert highest_rouge2(told, training) == pytest.approx([rouge2(s) for s in told])


def test_repetition():
    assert repetition(["河山河山河山"]) == pytest.approx({"rep4": 1 / 3, "distinct2": 2 / 5, "distinct3": 1 / 2})
    assert repetition([""]) == {"rep4": None, "distinct2": None, "distinct3": None}


def test_plain_loss_is_a_sum_over_tokens(tok):
    model = random_model(tiny_config(tok.vocab_size))
    texts = ["小猫在河边。", "小狗在树下捡到一个皮球。" * 3]
    total = n = 0
    for text in texts:
        ids = torch.tensor([[tok.eos_id] + tok.encode(text) + [tok.eos_id]])
        with torch.no_grad():
            total += torch.nn.functional.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="sum").item()
        n += ids.size(1) - 1
    assert plain_loss(model, tok, texts) == pytest.approx(total / n, rel=1e-5)


def test_piece_losses_stand_at_the_characters_where_pieces_begin(tok):
    model, text = random_model(tiny_config(tok.vocab_size)), "小猫😀在河边。"
    ids, end = tok.encode(text), text.index("在")
    assert sum(len(tok.decode([i])) for i in ids) > len(text)  # the smiley is bytes, each no character alone
    found = piece_losses(model, tok, [tok.eos_id], text)
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(torch.tensor([[tok.eos_id, *ids[:-1]]]))[0], torch.tensor(ids),
                                                   reduction="none").tolist()
    piece = next(i for i in range(len(ids)) if tok.decode(ids[:i]) == text[:end])
    assert found[0] == pytest.approx(losses[0]) and found[end] == pytest.approx(losses[piece])
    assert max(found) < len(text)
    size = model.config.block_size
    assert len(piece_losses(model, tok, [tok.eos_id], "小猫在河边。" * size)) <= size - 1


# ---- the instructions ----

def test_the_handwritten_instructions():
    rows = read_rows(evaluate.HANDWRITTEN)
    assert [sum(len(r["constraints"]) == k for r in rows) for k in (1, 2, 3, 4)] == [25] * 4
    assert len({render(r["constraints"]) for r in rows}) == 100
    own = [v for r in rows for k, v in r["constraints"].items() if k in ("摘要", "随机句子")]
    assert len(set(own)) == len(own)
    shown = [v for _, text, _ in CASES for v in parse(text)[0].values() if isinstance(v, str)]
    n = pretrain.BUILTIN_TEXTS if os.environ.get("CI") else 4000  # all texts of pretraining take minutes
    told = "\n".join([*books.texts(n, pretrain.BUILTIN_SEED),
                      *books.exercises(pretrain.BUILTIN_EXERCISES, pretrain.BUILTIN_SEED),
                      *(r["instruction"] + "\n" + r["output"] for r in train_sft.builtin_records())])
    assert "小兔" in told and not [v for v in own + shown if v.rstrip("。！？") in told]


def test_generated_instructions_have_a_ceiling_of_one():
    rows = builtin_rows()
    add_rivals(rows, 1)
    assert all(len(r["rivals"]) == 19 for r in rows)
    known = [r for r in rows if r["story"]]
    result = obedience(known, [[r["story"]] for r in known], 1)
    assert all(result["by_kind"][k]["rate"] == 1 for k in ("词汇", "特点", "随机句子"))
    assert result["by_kind"]["摘要"]["rate"] >= 0.95


@pytest.mark.parametrize("record, says", [
    ({"instruction": "写一个故事。"}, "no constraints"),
    ({"instruction": "x", "constraints": {"颜色": "红"}}, "颜色"),
    ({"instruction": "词汇：河\n颜色：红"}, "颜色"),
    ({"instruction": "颜色：红\n词汇：河"}, "颜色"),
    ({"instruction": "词汇：河", "input": "主角：小猫"}, "主角"),
    ({"instruction": "特点：有趣"}, "有趣"),
    ({"instruction": "随机句子：。！"}, "can be checked"),
    ({"instruction": "x", "constraints": {"词汇": "河"}}, "list"),
    ({"instruction": "x", "constraints": ["河"]}, "object"),
    ({"instruction": "x", "constraints": {"摘要": "小\ud800猫"}}, "surrogate"),
    ({"output": "小猫。"}, "instruction")])
def test_a_bad_row_is_named(record, says, model_dir, tmp_path, refused):
    path = tmp_path / "rows.jsonl"
    good = {"instruction": "词汇：河"}
    path.write_text("".join(json.dumps(r) + "\n" for r in (good, record)), encoding="utf-8")
    refused(evaluate.main, ["--ckpt", model_dir, "--data", path], "row 2", says)


def test_a_row_of_features_that_the_classifier_cannot_tell_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"instruction": "特点：对话，转折"}) + "\n" + json.dumps({"instruction": "特点：转折"}),
                    encoding="utf-8")
    assert len(read_rows(path)) == 2 and len(read_rows(path, ["对话", "转折"])) == 2
    with pytest.raises(ValueError, match="row 2: no constraint that can be checked"):
        read_rows(path, ["对话"])


def test_a_prompt_without_room_and_a_base_of_another_tokenizer_are_refused(model_dir, tmp_path, refused):
    path, out = tmp_path / "rows.jsonl", tmp_path / "out"
    path.write_text(json.dumps({"instruction": "摘要：" + "小猫在河边捡到一个皮球，" * 40}), encoding="utf-8")
    refused(evaluate.main, ["--ckpt", model_dir, "--base", model_dir, "--data", path, "--out", out], "leaves no room")
    other = train_tokenizer(["小狗在树下睡着了。"] * 50, 300)
    save_model(tmp_path / "base", random_model(tiny_config(other.vocab_size)), other)
    refused(evaluate.main, ["--ckpt", model_dir, "--base", tmp_path / "base", "--out", out], "--base", "tokenizer")
    assert not (out / "eval.json").exists()


# ---- the command ----

def test_the_command_is_reproducible_and_complete(model_dir, pairs_file, tok, tmp_path, capsys):
    base = tmp_path / "base"
    save_model(base, random_model(tiny_config(tok.vocab_size), seed=1), tok)
    results = []
    for name, scale in (("a", "1"), ("b", "1"), ("guided", "30")):
        evaluate.main(["--ckpt", str(model_dir), "--base", str(base), "--data", str(pairs_file), "--samples", "1",
                       "--out", str(tmp_path / name), "--device", "cpu", "--guidance-scale", scale])
        results.append(json.loads((tmp_path / name / "eval.json").read_text(encoding="utf-8")))
    assert (tmp_path / "a" / "eval.png").stat().st_size > 5000
    assert results[0].pop("args") != results[1].pop("args") and results[0] == results[1]
    assert results[2]["gen_nll"] != results[0]["gen_nll"] and results[2]["plain_nll"] == results[0]["plain_nll"]
    assert set(results[0]) >= {"satisfied", "independent", "by_kind", "order_spread", "plain_nll", "base_nll",
                               "gen_nll", "rep4", "distinct2", "distinct3", "eos_rate", "mean_chars", "lcs", "rouge2",
                               "ceiling", "floor", "seed"}
    assert results[0]["ceiling"]["by_kind"]["词汇"]["rate"] > 0.5 and results[0]["plain_nll"] > 0
    assert "ceiling" in capsys.readouterr().out


def test_order_spread_sees_an_order(tok):
    model = random_model(tiny_config(tok.vocab_size))
    rows = [row({"词汇": ["河"], "随机句子": "小猫来了。"})]
    sampling = {"max_new_tokens": 5, "temperature": 1.0, "top_k": None, "top_p": 1.0}
    model.generate = lambda prompts, *a, **k: [tok.encode("河" if i else "山") for i, _ in enumerate(prompts)]
    assert order_spread(model, tok, rows, 1, sampling) == 1 / 2
    model.generate = lambda prompts, *a, **k: [tok.encode("河") for _ in prompts]
    assert order_spread(model, tok, rows, 1, sampling) == 0
    assert order_spread(model, tok, rows[:0], 1, sampling) is None
