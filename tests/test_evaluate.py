"""evaluate.py: planted cases for every rule, what must score 1 and what 0, the intervals, the command."""
import functools
import json
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import torch
from conftest import ROOT, random_model, tiny_config

import evaluate
import sample
from checkpoint import save_model
from constraints import KEYS, check, overlap, parse, render, tells
from data import books, builtin
from data.judged import HANDWRITTEN, RARE, RARE_WORDS, add_rivals, builtin_rows, checkable, read_rows
from evaluate import NEW, TRAINED, interval, met, obedience, plain_loss, repetition, table
from pretrain import train_tokenizer
from sample import CASES

ALL = {"词汇": ["皮球", "小河"], "特点": ["对话"], "摘要": "小猫把皮球掉进小河，小鸭帮它捞了上来。",
       "随机句子": "河水哗啦啦地流着，真好听。"}
MEETS = "小猫在小河边拍皮球。皮球掉进了小河！河水哗啦啦地流着，真好听。“我帮你捞上来！”小鸭说。"


def row(constraints, story=None, rivals=("小狗过生日，收到了许多礼物，开心极了。",)):
    return {"constraints": constraints, "story": story, "rivals": list(rivals)}


@pytest.mark.parametrize("kind, story, expected", [
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
def test_planted_cases(kind, story, expected):
    found = met(row(ALL), story)
    assert set(found) == {*KEYS, "每个词", "摘要的分句", "特点 对话"}
    assert all(found[key] == [True] for key in KEYS) if kind is None else found[kind] == [expected]


def test_what_no_rule_can_tell():
    assert met(row({"特点": ["转折"]}), MEETS) == {}
    assert met(row({"特点": ["转折", "对话"]}), MEETS) == {"特点": [True], "特点 对话": [True]}
    assert met(row({"摘要": "小猫。"}, rivals=()), MEETS) == {}
    assert met(row({"词汇": ["皮球", "大海"]}), MEETS) == {"词汇": [False], "每个词": [True, False]}


def test_which_clauses_of_a_summary_are_told():
    asked = row({"摘要": "小猫丢了球，找了“一天”，最后，在床下找到。"})
    assert met(asked, "小猫丢了球。它急了。在床下找到！")["摘要的分句"] == [True, False, False, True]


def test_a_detector_tells_the_features_it_knows_and_only_those():
    def detect(story):
        return {"转折": "没想到" in story}
    asked = row({"特点": ["转折", "对话", "伏笔"], "词汇": ["皮球"]})
    assert check(MEETS, asked["constraints"], detect=detect)["特点"] == {"转折": False, "对话": True, "伏笔": None}
    found = met(asked, MEETS, detect)
    assert found["特点"] == [False] and found["词汇"] == [True] and "特点 伏笔" not in found
    result = obedience([asked], [[MEETS, "没想到，" + MEETS]], 1, detect)
    assert result["satisfied"] == {} and result["unchecked_features"] == 1
    assert result["by_kind"]["特点 转折"]["rate"] == 1 / 2 and result["by_kind"]["特点 对话"]["rate"] == 1
    assert "特点 伏笔" not in result["by_kind"]


def test_overlaps():
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


def test_rates_by_number():
    words, sentence = {"词汇": ["河"]}, {"随机句子": "小猫来了。"}
    rows = [row(words)] * 4 + [row(sentence)] * 4 + [row(words | sentence)] * 2
    stories = [["河"], ["河"], ["河"], ["山"], ["小猫来了"], ["小猫来了"], ["山"], ["山"], ["河，小猫来了"], ["河"]]
    result = obedience(rows, stories, 1)
    assert result["satisfied"]["1"]["rate"] == 5 / 8 and result["satisfied"]["1"]["n"] == 8
    assert result["satisfied"]["2"]["rate"] == 1 / 2
    assert result["by_kind"]["词汇"]["rate"] == 5 / 6


def test_what_cannot_be_checked_is_left_out_and_counted():
    rows = [row({"特点": ["转折", "冲突"]}), row({"特点": ["坏结局"], "词汇": ["河"]})]
    result = obedience(rows, [["河"], ["河"]], 1)
    assert result["unchecked_features"] == 3
    assert result["satisfied"] == {} and result["by_kind"]["词汇"]["rate"] == 1


def test_intervals_cover_the_truth():
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(400):  # instructions differ in difficulty; two samples of each
        difficulty = rng.beta(2, 1, size=80)
        found = interval(rng.random((80, 2)) < difficulty[:, None], trial)
        inside += found["lo"] <= 2 / 3 <= found["hi"]
    assert 0.92 <= inside / 400 <= 0.98
    assert interval([], 1) == {"rate": None, "lo": None, "hi": None, "n": 0}


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


# ---- the instructions ----

def test_the_handwritten_instructions():
    rows = read_rows(HANDWRITTEN)
    assert [sum(len(r["constraints"]) == k for r in rows) for k in (1, 2, 3, 4)] == [55, 95, 95, 55]
    assert len({render(r["constraints"]) for r in rows}) == 300
    own = [v for r in rows for k, v in r["constraints"].items() if k in ("摘要", "随机句子")]
    assert len(set(own)) == len(own)
    shown = [v for _, text, _ in CASES for v in parse(text)[0].values() if isinstance(v, str)]
    # no run of 8 characters: tests/test_generate.py; all texts of pretraining: study/tests/test_card.py
    trained = "\n".join([*books.texts(1000, builtin.SEEDS["pretraining"]),
                         *(r["instruction"] + "\n" + r["output"] for r in builtin.fine_tuning())])
    assert "小兔" in trained and not [v for v in own + shown if v.rstrip("。！？") in trained]


def test_words_of_training_and_others_are_told_apart():
    row = {"constraints": {"词汇": ["小猫", "量子", "皮球"]}, "rivals": [], "trained_words": {"小猫", "皮球"}}
    found = met(row, "小猫研究量子。")
    assert found[TRAINED] == [True, False] and found[NEW] == [True] and found["每个词"] == [True, True, False]
    rows = builtin_rows()
    trained = [word in row["trained_words"] for row in rows for word in row["constraints"].get("词汇", [])
               if row["source"] == "handwritten"]
    assert 0.3 < sum(trained) / len(trained) < 0.98
    assert not [row for row in rows if row["source"] == "generated" and row["trained_words"]]


def test_generated_instructions_have_a_ceiling_of_one():
    rows = builtin_rows()
    add_rivals(rows, 1)
    assert all(len(r["rivals"]) == 19 for r in rows)
    known = [r for r in rows if r["story"]]
    result = obedience(known, [[r["story"]] for r in known], 1)
    assert all(result["by_kind"][k]["rate"] == 1 for k in ("词汇", "特点", "随机句子"))
    assert result["by_kind"]["摘要"]["rate"] >= 0.95
    assert [r["constraints"] for r in rows if r["source"] == RARE] == [{"词汇": [word]} for word in RARE_WORDS]


@pytest.mark.parametrize("record, says", [
    ({"instruction": "写一个故事。"}, "no constraints"),
    ({"instruction": "x", "constraints": {"颜色": "红"}}, "颜色"),
    ({"instruction": "词汇：河\n颜色：红"}, "颜色"),
    ({"instruction": "颜色：红\n词汇：河"}, "颜色"),
    ({"instruction": "词汇：河", "input": "主角：小猫"}, "主角"),
    ({"instruction": "特点：有趣"}, "有趣"),
    ({"instruction": "随机句子：。！"}, "can be checked"),
    ({"instruction": "词汇：河\n摘要：“”"}, "can be checked"),
    ({"instruction": "- 颜色：红\n- 词汇：河"}, "颜色"),
    ({"instruction": "x", "constraints": {"词汇": ["河", 1]}}, "list of strings"),
    ({"instruction": "x", "constraints": {"摘要": ["河"]}}, "string"),
    ({"instruction": "x", "constraints": {"词汇": "河"}}, "list"),
    ({"instruction": "x", "constraints": ["河"]}, "object"),
    ({"instruction": "x", "constraints": {"摘要": "小\ud800猫"}}, "surrogate"),
    ({"output": "小猫。"}, "instruction")])
def test_a_bad_row_is_named(record, says, model_dir, tmp_path, refused):
    path = tmp_path / "rows.jsonl"
    good = {"instruction": "词汇：河"}
    path.write_text("".join(json.dumps(r) + "\n" for r in (good, record)), encoding="utf-8")
    refused(evaluate.main, ["--ckpt", model_dir, "--data", path], "row 2", says)


def test_rows_in_which_nothing_can_be_checked_are_left_out_and_counted(model_dir, tmp_path, capsys, refused):
    path, out = tmp_path / "rows.jsonl", tmp_path / "out"
    argv = ["--ckpt", str(model_dir), "--data", str(path), "--out", str(out), "--samples", "1", "--device", "cpu"]
    only = json.dumps({"instruction": "特点：转折，冲突"}) + "\n"
    path.write_text(json.dumps({"instruction": "特点：对话，转折"}) + "\n" + only + only, encoding="utf-8")
    rows = read_rows(path)
    assert checkable(rows) == rows[:1] and checkable(rows, lambda story: {"转折": False}) == rows
    evaluate.main(argv)
    said = capsys.readouterr()
    assert "left out: 2 instructions" in said.out and "all with any (1)" in said.out
    result = json.loads((out / "eval.json").read_text(encoding="utf-8"))
    assert result["rows"] == 1 and result["left_out"] == 2 and result["by_kind"]["特点 对话"]["n"] == 1
    path.write_text(only, encoding="utf-8")
    refused(evaluate.main, argv, "can be checked")
    path.write_text(json.dumps({"instruction": "摘要：小猫来了。"}), encoding="utf-8")  # no other to compare it with
    refused(evaluate.main, argv, "can be checked")


def test_constraints_and_instruction_are_read_alike(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": "- 词汇：“河”。\n摘要：小猫。"},
            {"instruction": "词汇：河", "input": "摘要：小猫。", "constraints": None},
            {"constraints": {"词汇": ["“河”。"], "摘要": "小猫。"}}]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    assert read_rows(path) == [{"constraints": {"词汇": ["河"], "摘要": "小猫。"}, "story": None}] * 3


def test_a_prompt_without_room_and_a_base_of_another_tokenizer_are_refused(model_dir, tmp_path, refused):
    path, out = tmp_path / "rows.jsonl", tmp_path / "out"
    path.write_text(json.dumps({"instruction": "词汇：河\n摘要：" + "小猫在河边捡到一个皮球，" * 40}), encoding="utf-8")
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
    for name in "ab":
        evaluate.main(["--ckpt", str(model_dir), "--base", str(base), "--data", str(pairs_file), "--samples", "1",
                       "--out", str(tmp_path / name), "--device", "cpu"])
        results.append(json.loads((tmp_path / name / "eval.json").read_text(encoding="utf-8")))
    assert results[0].pop("args") != results[1].pop("args")
    assert results[0].pop("seconds") > 0 < results[1].pop("seconds") and results[0] == results[1]
    assert set(results[0]) >= {"satisfied", "by_kind", "plain_nll", "base_nll", "gen_nll", "rep4",
                               "distinct2", "distinct3", "eos_rate", "mean_chars", "ceiling", "floor", "seed"}
    assert results[0]["ceiling"]["by_kind"]["词汇"]["rate"] > 0.5 and results[0]["plain_nll"] > 0
    assert "ceiling" in capsys.readouterr().out


@pytest.fixture
def default_evaluation(tok, tmp_path, monkeypatch):
    """The arguments of the default evaluation, of a model for whose context no built-in prompt is too long, but of few
    stories, of three tokens."""
    path = tmp_path / "model"
    save_model(path, random_model(tiny_config(tok.vocab_size, block_size=256)), tok)
    monkeypatch.setattr(evaluate, "builtin_rows", lambda: builtin_rows()[::3])
    monkeypatch.setattr(builtin, "PLAIN", 3)
    monkeypatch.setattr(evaluate, "generate_all", functools.partial(short_stories, evaluate.generate_all))
    return ["--ckpt", str(path), "--base", str(path), "--out", str(tmp_path / "out"), "--samples", "1",
            "--device", "cpu"]


def short_stories(generate_all, model, prompts, eos_id, seed, sampling, quiet, samples):
    return generate_all(model, prompts, eos_id, seed, sampling | {"max_new_tokens": 3}, quiet, samples)


def test_the_best_of_several_draws_is_judged_as_it_would_be_picked(tok, monkeypatch):
    rows = [row({"词汇": ["小猫", "皮球"], "摘要": ALL["摘要"]}), row({"摘要": ALL["摘要"]})]
    told = ["小狗过生日，收到了许多礼物。小猫也来了。", "小狗。", "小狗过生日，收到了许多礼物，小猫和皮球。", MEETS]
    drawn = [[tok.encode(story) for story in told], [tok.encode(story) for story in told[::-1]]]
    likely = dict(zip(map(tuple, (tok.encode(story) + [tok.eos_id] for story in told)), (-4, -3, -2, -1)))
    monkeypatch.setattr(sample, "mean_log_probs", lambda model, prompt, ids: [likely[tuple(i)] for i in ids])
    chosen = evaluate.best_of(random_model(tiny_config(tok.vocab_size, block_size=256)), tok, rows, drawn, 100)
    # most words first; of equals the likeliest; a summary cannot be checked where there are no others beside it
    assert chosen == {1: [told, told[::-1]], 2: [[told[0], told[3]], [told[3], told[1]]],
                      4: [[told[3]], [told[3]]]}
    met = obedience(rows, chosen[2], 1)
    assert met["by_kind"]["每个词"]["rate"] == 0.75 and met["everything"]["rate"] == 0.5
    assert met["everything"]["n"] == 2 and met["satisfied"]["1"]["rate"] == 0.5


def test_many_samples_are_reported_as_best_of(default_evaluation, tmp_path, capsys):
    evaluate.main([*default_evaluation, "--samples", "5"])
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "eval.json").read_text(encoding="utf-8"))
    assert list(result["by_source"]["handwritten"]["best_of"]) == ["1", "2", "4"] and result["args"]["samples"] == 5
    one = result["best_of"]["1"]
    assert one["everything"] == result["everything"]
    assert result["best_of"]["4"]["by_kind"]["每个词"]["rate"] >= one["by_kind"]["每个词"]["rate"]
    for source in ("handwritten", "generated"):
        assert f"best of 4, {source}: 词汇 " in shown


def test_the_table_fits_a_screen(default_evaluation, tmp_path, capsys):
    evaluate.main(default_evaluation)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 25
    assert max(sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line) for line in lines[:-1]) <= 100
    assert "handwritten" in lines[0] and "generated" in lines[0]
    result = json.loads((tmp_path / "out" / "eval.json").read_text(encoding="utf-8"))
    shown = "\n".join(lines)
    for name in ("词汇", "每个词", "随机句子", "摘要", "特点 对话", *(f"all of {k}" for k in "1234")):
        assert f"\n{name} " in shown
    assert result["by_source"]["generated"]["ceiling"]["by_kind"]["词汇"]["rate"] == 1
    assert result["by_source"]["handwritten"]["ceiling"] is None and result["by_source"]["handwritten"]["floor"]
    assert result["left_out"] > 0 and f"left out: {result['left_out']} instructions" in shown


def test_further_measures_come_from_outside(model_dir, tok):
    model = random_model(tiny_config(tok.vocab_size))
    rows = [{"constraints": {"词汇": ["河"], "特点": ["转折"]}, "story": None} for _ in range(3)]
    result = evaluate.evaluate(model, tok, rows, samples=2, max_new_tokens=2, detect=lambda story: {"转折": True},
                               measure=lambda stories: {"n": len(stories)})
    assert result["n"] == 6 and result["by_kind"]["特点 转折"]["rate"] == 1 and result["floor"] is None
    assert "特点 转折" in table(result)


def test_a_result_that_cannot_be_written_is_refused_before_the_work(model_dir, tmp_path, monkeypatch, refused):
    (tmp_path / "file").touch()
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: pytest.fail("work has begun"))
    for out in (tmp_path / "file" / "out", "/proc/nowhere"):  # tests may run as root, who may write everywhere else
        refused(evaluate.main, ["--ckpt", model_dir, "--out", out], "cannot write", out)


def test_the_table_comes_before_what_may_fail(default_evaluation, monkeypatch, capsys):
    def full(*_):
        raise OSError("No space left on device: eval.json")
    monkeypatch.setattr(evaluate, "write_json", full)
    with pytest.raises(SystemExit) as e:
        evaluate.main(default_evaluation)
    said = capsys.readouterr()
    assert e.value.code == 2 and "all of 4" in said.out
    assert said.err.splitlines()[-1].endswith("No space left on device: eval.json")


def test_no_character_crashes_the_output(model_dir, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"instruction": "词汇：河\n特点：对话"}), encoding="utf-8")
    argv = [sys.executable, "evaluate.py", "--ckpt", model_dir, "--data", path, "--out", tmp_path, "--device", "cpu"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr.decode("ascii")
    assert "?? " in done.stdout.decode("ascii") and "all of 2" in done.stdout.decode("ascii")
