"""Every command as a user types it, in-process: what it prints, what it writes, and what it says to bad input."""
import copy
import json
import math
import shutil
import subprocess
import sys
from urllib.error import HTTPError

import common

import numpy as np
import pytest
import torch
from conftest import GEOMETRIES, ROOT, STORIES, random_model, tiny_config
from safetensors.torch import load_file, save_file

import checkpoint
import constraints
import decoding
import pretrain
import sample
import train_sft
from checkpoint import load_model, save_model, save_tokenizer
from data import books, builtin

TINY = ["--vocab-size", "500", "--block-size", "128", "--batch-size", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def stories_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in STORIES), encoding="utf-8")
    return path


# ---- pretrain.py ----

def test_pretrain_makes_tokenizer_tokens_and_model(stories_file, tmp_path, capsys):
    out = tmp_path / "base"
    pretrain.main(["--data", str(stories_file), "--out", str(out), "--max-steps", "3", "--val-fraction", "0.1", *TINY])
    model, tokenizer = load_model(out)
    assert model.config.vocab_size == tokenizer.vocab_size <= 500 and model.config.block_size == 128
    tokens = np.fromfile(out / "tokens" / "train.bin", np.uint16).tolist()
    assert tokens.count(tokenizer.eos_id) > 90 and tokens[-1] == tokenizer.eos_id
    val = np.fromfile(out / "tokens" / "val.bin", np.uint16).tolist()
    first, first_val = (tokenizer.decode(ids[:ids.index(tokenizer.eos_id)]) for ids in (tokens, val))
    assert first in STORIES and first_val in STORIES and first != first_val
    assert "validation loss" in capsys.readouterr().out
    with open(out / "log.jsonl") as f:
        assert max(json.loads(line)["step"] for line in f) == 3

    # the same tokenizer for another model, and training that goes on from this one
    argv = ["--data", str(stories_file), "--max-steps", "1", "--val-fraction", "0.1", *TINY]
    pretrain.main([*argv, "--tokenizer", str(out / "tokenizer.model"), "--out", str(tmp_path / "second")])
    assert (tmp_path / "second/tokenizer.model").read_bytes() == (out / "tokenizer.model").read_bytes()
    pretrain.main([*argv, "--init", str(out), "--out", str(tmp_path / "third"), "--lr", "1e-9"])
    assert torch.allclose(load_model(tmp_path / "third")[0].lm_head.weight, model.lm_head.weight, atol=1e-6)


def test_the_microstories_preset_has_the_studys_settings():
    args = pretrain.parse_args(["--preset", "microstories"])
    assert (args.lr, args.beta1, args.beta2, args.weight_decay, args.grad_clip, args.warmup) == (
        5e-4, 0.9, 0.95, 0.1, 1.0, 1000)
    assert args.batch_size * args.grad_accum == 512 and args.vocab_size == 65024
    assert pretrain.parse_args(["--preset", "microstories", "--lr", "1e-4"]).lr == 1e-4


def test_a_large_vocabulary_gets_wider_token_files(tok, tmp_path, monkeypatch):
    assert pretrain.write_tokens(tmp_path / "a.bin", STORIES[:2], tok).dtype == np.uint16
    monkeypatch.setattr(tok, "vocab_size", 65536)
    wide = pretrain.write_tokens(tmp_path / "b.bin", STORIES[:2], tok)
    assert wide.dtype == np.uint32 and tok.decode(wide.tolist()[:-1]).startswith(STORIES[0])


# ---- train_sft.py without --init ----

def test_without_init_the_base_that_ships_is_tuned(model_dir, tmp_path, monkeypatch, capsys, refused):
    monkeypatch.setattr(builtin, "STORIES", 60)
    builtin.fine_tuning.cache_clear()
    monkeypatch.setattr(train_sft, "find_base", lambda: model_dir)
    for name in "ab":
        train_sft.main(["--max-steps", "2", "--batch-size", "4", "--device", "cpu", "--out", str(tmp_path / name)])
        assert f"base model: {model_dir}" in capsys.readouterr().out
    one, other = (tmp_path / name / "last/model.safetensors" for name in "ab")
    assert one.read_bytes() == other.read_bytes()  # same seed, same bytes
    builtin.fine_tuning.cache_clear()
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint, "WEIGHTS", "none")
    refused(train_sft.main, ["--out", tmp_path / "c"], "no base model", "--init")


def test_muon_has_the_matrices_of_the_layers_and_adamw_the_rest(tok):
    model = random_model(tiny_config(tok.vocab_size))
    first, second = (pretrain.MuonAdamW(model, 1e-3, 0.1, (0.9, 0.95)) for _ in range(2))
    groups = first.param_groups
    every = [id(p) for group in groups for p in group["params"]]
    assert sorted(every) == sorted(map(id, model.parameters()))  # each of them once
    muon, = (group for group in groups if "lr_scale" in group)
    assert {id(p) for p in muon["params"]} == {id(p) for p in model.model.layers.parameters() if p.dim() == 2}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    before = [p.clone() for p in model.parameters()]
    first.step()
    once = [p.clone() for p in model.parameters()]
    with torch.no_grad():
        for p, old in zip(model.parameters(), before):
            p.copy_(old)
    second.step()
    assert all(torch.equal(p, other) for p, other in zip(model.parameters(), once))
    first.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="another optimizer"):
        first.load_state_dict(train_sft.adamw(model).state_dict())


def test_muon_resumes_to_the_same_bytes_and_never_as_another_optimizer(stories_file, tmp_path, monkeypatch, capsys):
    if not pretrain.has_bf16(torch.device("cpu")):
        pytest.skip("this processor has no bfloat16, and pretrain.py no Muon on it")
    for name, steps in (("straight", "4"), ("stopped", "2")):
        pretrain.main(["--data", str(stories_file), "--out", str(tmp_path / name), "--max-steps", steps, "--min-lr",
                       "2e-3", "--warmup", "0", *TINY])
    monkeypatch.setattr(pretrain, "has_bf16", lambda device: False)  # begun on one processor, resumed on another
    last = tmp_path / "stopped" / "last" / checkpoint.WEIGHTS
    before = last.read_bytes()
    argv = ["--resume", "--out", str(tmp_path / "stopped"), "--max-steps", "4"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        pretrain.main(argv)
    notice, error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "no bfloat16: AdamW instead of Muon" in notice
    assert "error: --resume" in error and "another optimizer" in error
    assert last.read_bytes() == before
    monkeypatch.undo()
    pretrain.main(argv)
    assert last.read_bytes() == (tmp_path / "straight" / "last" / checkpoint.WEIGHTS).read_bytes()
    pretrain.main(["--data", str(stories_file), "--out", str(tmp_path / "slower"), "--max-steps", "4", "--min-lr",
                   "1e-3", "--lr", "1e-3", "--warmup", "0", *TINY])
    assert last.read_bytes() != (tmp_path / "slower" / "last" / checkpoint.WEIGHTS).read_bytes()


def test_pretrain_without_data_reads_the_built_in_books(tmp_path, monkeypatch, capsys):
    for name, n in (("BOOKS", 300), ("EXERCISES", 30)):
        monkeypatch.setattr(builtin, name, n)
    pretrain.main(["--out", str(tmp_path / "base"), "--max-steps", "2", *TINY])
    model, tokenizer = load_model(tmp_path / "base")
    tokens = np.fromfile(tmp_path / "base" / "tokens" / "train.bin", np.uint16).tolist()
    assert tokenizer.decode(tokens[:tokens.index(tokenizer.eos_id)]) == next(
        books.exercises(1, builtin.SEEDS["pretraining"]))
    assert tokens.count(tokenizer.eos_id) == 330


# ---- sample.py ----

@pytest.fixture
def say(model_dir, capsys):
    def run(*argv):
        capsys.readouterr()
        sample.main(["--ckpt", str(model_dir), "--device", "cpu", "--max-new-tokens", "12", *map(str, argv)])
        return capsys.readouterr().out
    return run


def test_the_eight_cases_are_the_default(say):
    out = say()
    assert out.count("─" * 60) == 8 and out.count("✓") + out.count("✗") >= 10
    for text in ("汤姆和杰瑞是一对好朋友", "特点：转折\n", "摘要：一只小蚂蚁在花园里寻找吃的，最后找到了一个苹果。",
                 "随机句子：天空中飘着几朵白云。\n摘要"):
        assert text in out


def test_cases_that_do_not_fit_say_so(tok, capsys):
    sample.print_cases(random_model(tiny_config(tok.vocab_size, block_size=24)), tok)
    assert "no room" in capsys.readouterr().out


def test_bare_ckpt_takes_the_last_sft_run_else_the_base(model_dir, tmp_path, monkeypatch, capsys, refused):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "WEIGHTS", "none")
        refused(sample.main, ["--ckpt"], "no base model", "--ckpt")
    monkeypatch.setattr(checkpoint, "find_base", lambda: model_dir)
    sample.main(["--ckpt", "--prompt", "小猫", "--max-new-tokens", "3"])
    assert str(model_dir) in capsys.readouterr().err
    shutil.copytree(model_dir, tmp_path / "out" / "sft")
    sample.main(["--ckpt", "--prompt", "小猫", "--max-new-tokens", "3"])
    assert "out/sft:" in capsys.readouterr().err


def test_instructions_and_prompts(say, model_dir):
    out = say("--instruction", r"关键词：铲子、草地\n特点：对话", "--instruction", "摘要：一只猫",
              "--prompt", "小猫在河边", "--prompt", "")
    assert out.count("─" * 60) == 4
    assert "关键词：铲子、草地\n特点：对话\n" in out
    assert "词汇 铲子" in out and "词汇 草地" in out and "特点 对话" in out
    assert "小猫在河边" in out and "摘要" not in out.split("摘要：一只猫")[1]  # no rule for a summary, no mark
    greedy = ["--prompt", "小猫在河边", "--temperature", "0"]
    assert say(*greedy) == say(*greedy, "--seed", "9") and say("--prompt", "小猫", "--temperature", "2") != say(
        "--prompt", "小猫", "--temperature", "2", "--seed", "9")
    model, tok = load_model(model_dir)
    ids = decoding.generate(model.eval(), [tok.encode("小猫在河边")], 12, temperature=0, eos_id=tok.eos_id)[0]
    assert "小猫在河边" + tok.decode(ids) in say(*greedy)  # streamed text == whole decode


@pytest.mark.parametrize("content", [
    "词汇：铲子，草地\n特点：对话\n\n\n摘要：一只猫\n",
    "\ufeff词汇：铲子，草地\r\n特点：对话\r\n \r\n摘要：一只猫",
    '{"instruction": "词汇：铲子，草地\\n特点：对话"}\n{"instruction": "摘要：一只猫", "input": "", "output": "x"}\n',
    '[{"instruction": "词汇：铲子，草地", "input": "特点：对话"}, {"instruction": "摘要：一只猫"}]',
])
def test_files_of_prompts(say, tok, tmp_path, content):
    path, out, model = tmp_path / "prompts", tmp_path / "new" / "stories.jsonl", tmp_path / "model"
    path.write_bytes(content.encode())
    save_model(model, random_model(tiny_config(tok.vocab_size, tie_embeddings=False), scale=0.3), tok)
    assert say("--file", path).count("─" * 60) == 2
    say("--file", path, "--out", out, "--temperature", "0", "--ckpt", model)
    rows = [json.loads(line) for line in open(out, encoding="utf-8")]
    assert [r["instruction"] for r in rows] == ["词汇：铲子，草地\n特点：对话", "摘要：一只猫"]
    assert set(rows[0]) == {"instruction", "output", "met"}
    assert set(rows[0]["met"]) == {"词汇", "特点"} and "铲子" in out.read_text(encoding="utf-8")
    met = [constraints.check(story, constraints.parse(asked)[0]) for asked, story in (
        ("词汇：猫，狗\n特点：对话，转折", "猫和狗。"), ("词汇：猫，狗", "猫。"), ("摘要：猫", ""))]
    assert sample.counts(met) == "词汇 1/2, 每个词 3/4, 特点 0/1, 特点 对话 0/1" and sample.counts(met[2:]) == ""
    assert sample.marks(met[0]) == "✓ 词汇 猫  ✓ 词汇 狗  ✗ 特点 对话" and sample.marks(met[2]) == ""
    assert rows[0]["output"] != rows[1]["output"]
    for row in rows:  # batched equals one by one
        assert row["output"] in say("--instruction", row["instruction"], "--temperature", "0", "--ckpt", model)


def test_the_best_of_several_draws_is_shown(say, tok, tmp_path, monkeypatch):
    model = random_model(tiny_config(tok.vocab_size, tie_embeddings=False), scale=0.3)
    asked, prompt = {"词汇": ["铲子", "猫"]}, tok.encode("小猫")
    told = ["小猫在河边。", "小猫的铲子。", "铲子和猫。", "小狗。"]
    drawn = [tok.encode(story) for story in told]
    ranked = sample.scores(model, tok, prompt, asked, drawn, 30)
    assert [met for met, _, _ in ranked] == [1, 2, 2, 0]
    for ids, (_, _, mean) in zip(drawn, ranked):  # its own probability, the end's too, and not the prompt's
        with torch.no_grad():
            nats = model(torch.tensor([prompt + ids]))[0].log_softmax(-1)
        steps = [nats[len(prompt) - 1 + i, token].item() for i, token in enumerate([*ids, tok.eos_id])]
        assert mean == pytest.approx(sum(steps) / len(steps), abs=1e-4)
    [cut] = sample.scores(model, tok, prompt, asked, drawn[:1], len(drawn[0]))  # not ended: no end to be likely
    assert cut[2] != pytest.approx(ranked[0][2], abs=1e-4)
    likeliest = told[1] if ranked[1] > ranked[2] else told[2]
    assert sample.best(model, tok, prompt, asked, drawn, 30) == (
        likeliest, "2 of 4 meet everything that can be checked")
    story, line = sample.best(model, tok, prompt, {"特点": ["转折"]}, drawn, 30)
    assert told.index(story) == max(range(4), key=lambda i: ranked[i][2])
    assert "the likeliest of 4: nothing that can be checked" in line
    story, line = sample.best(model, tok, prompt, {"摘要": "小狗。"}, drawn, 30)  # by the clauses that are told
    assert story == told[3] and "the one of 4 that tells most of the summary" in line

    path = tmp_path / "prompts"
    path.write_text("词汇：铲子，猫\n\n特点：伏笔", encoding="utf-8")
    shown = say("--file", path, "--best-of", "3")
    assert "of 3 meet everything" in shown and "the likeliest of 3: nothing that can be checked" in shown
    say("--file", path, "--best-of", "3", "--out", tmp_path / "best.jsonl")
    rows = [json.loads(line) for line in open(tmp_path / "best.jsonl", encoding="utf-8")]
    assert "of 3 meet everything" in rows[0]["draws"] and "the likeliest of 3" in rows[1]["draws"]
    assert "of 3 meet everything" in say("--instruction", "词汇：铲子，猫", "--best-of", "3")
    assert "no line of this request begins with 词汇：, 特点：, " in say("--instruction", "词会：铲子")
    assert "no line" not in say("--instruction", "词汇：铲子", "--prompt", "小猫")
    path.write_text("词汇：铲子，猫\n\n词会：铲子", encoding="utf-8")
    assert say("--file", path).count("no line of this request begins with") == 1
    assert say("--best-of", "2").count("─" * 60) == 8
    drawn_with = []
    with monkeypatch.context() as patch:
        patch.setattr(sample, "generate_all", lambda *a, samples, **_: drawn_with.append(a[4]) or [[1]] * samples)
        say("--best-of", "2", "--temperature", "0.3", "--top-k", "0")
    assert len(drawn_with) == 8 and all(s["temperature"] == 0.3 and s["top_k"] is None for s in drawn_with)
    assert {s["top_p"] for s in drawn_with} == {0.9, 1.0}  # the study's own where none is given
    temperatures = []
    monkeypatch.setattr(sample, "generate", lambda *_, temperature, **__: temperatures.append(temperature) or [[1]] * 2)
    say("--prompt", "小猫", "--best-of", "2")
    say("--prompt", "小猫", "--best-of", "2", "--temperature", "0.3")
    assert temperatures == [sample.BEST_OF_TEMPERATURE, 0.3]


def test_many_samples_are_those_of_a_list_that_has_each_prompt_so_often(tok, monkeypatch):
    """In every batch: numbers of docs/results.md were measured with such lists."""
    monkeypatch.setattr(sample, "BATCH", 4)
    model = random_model(tiny_config(tok.vocab_size))
    prompts = [tok.encode(text) for text in ("小猫在河边", "小狗", "小鸭在树下睡着了", "铲子", "皮球和帽子")]
    settings = {"temperature": 1.0, "max_new_tokens": 8}
    repeated = sample.generate_all(model, [p for p in prompts for _ in range(2)], tok.eos_id, 5, settings, True)
    assert sample.generate_all(model, prompts, tok.eos_id, 5, settings, True, samples=2) == repeated
    assert len({tuple(ids) for ids in repeated}) > 5


def test_a_file_of_stories_is_overwritten_only_where_that_is_said(say, model_dir, tmp_path, refused):
    prompts, out = tmp_path / "prompts", tmp_path / "stories.jsonl"
    prompts.write_text("词汇：铲子", encoding="utf-8")
    argv = ["--ckpt", model_dir, "--file", prompts, "--out"]
    out.write_text("mine", encoding="utf-8")
    refused(sample.main, [*argv, out], out, "--overwrite")
    for itself in (prompts, tmp_path / ".." / tmp_path.name / "prompts"):
        refused(sample.main, [*argv, itself, "--overwrite"], "--file itself")
    assert out.read_text(encoding="utf-8") == "mine" and prompts.read_text(encoding="utf-8") == "词汇：铲子"
    say("--file", prompts, "--out", out, "--overwrite")
    assert json.loads(out.read_text(encoding="utf-8"))["instruction"] == "词汇：铲子"


def test_no_character_crashes_the_output(model_dir, tmp_path):
    (tmp_path / "prompts").write_text("词汇：铲子，草地\n特点：对话", encoding="utf-8")
    for what in (["--instruction", "词汇：铲子，草地"], ["--file", tmp_path / "prompts"]):  # ✓ and ✗ are not in GBK
        argv = [sys.executable, "sample.py", "--ckpt", model_dir, "--device", "cpu", "--max-new-tokens", "3", *what]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, env={"PYTHONIOENCODING": "gbk"})
        assert done.returncode == 0, done.stderr.decode("gbk")
        assert "? 词汇 铲子" in done.stdout.decode("gbk")


def test_a_result_that_cannot_be_written_is_refused_before_the_work(model_dir, tmp_path, monkeypatch, refused):
    (tmp_path / "prompts").write_text("词汇：铲子，草地", encoding="utf-8")
    (tmp_path / "file").touch()
    monkeypatch.setattr(sample, "load_model", lambda *_: pytest.fail("work has begun"))
    for folder in (tmp_path / "file", "/proc/nowhere"):  # tests may run as root, who may write everywhere else
        refused(sample.main, ["--ckpt", model_dir, "--file", tmp_path / "prompts", "--out", f"{folder}/stories.jsonl"],
                "cannot write", folder)


def test_output_streams_through_a_pipe_in_utf8(model_dir):
    argv = [sys.executable, "sample.py", "--ckpt", model_dir, "--prompt", "小猫", "--max-new-tokens", "3"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, env={"LC_ALL": "C"})
    assert done.returncode == 0 and "小猫" in done.stdout.decode("utf-8")


def test_a_prompt_may_begin_with_a_bracket(tmp_path):
    path = tmp_path / "prompts"
    path.write_text("[词汇]：铲子\n\n摘要：猫。", encoding="utf-8")
    assert sample.read_prompts(path) == ["[词汇]：铲子", "摘要：猫。"]
    path.write_text('[ {"instruction": "词汇：铲子", "input": "摘要：猫。"} ]', encoding="utf-8")
    assert sample.read_prompts(path) == ["词汇：铲子\n摘要：猫。"]


# ---- bad input: one line, exit code 2, nothing written ----

def test_an_error_of_the_system_is_said_without_its_number_and_others_as_they_are(capsys):
    for error, expected in ((FileNotFoundError(2, "No such file", "x.json"), "x.json: No such file"),
                            (HTTPError("http://x", 404, "Not Found", None, None), "HTTP Error 404: Not Found")):
        with pytest.raises(SystemExit):
            common.fail(error)
        assert capsys.readouterr().err.endswith(f"error: {expected}\n")


BAD_FLAGS = [
    (sample, ["--temperature", "-0.1"], "--temperature"), (sample, ["--temperature", "nan"], "--temperature"),
    (sample, ["--top-p", "0"], "--top-p"), (sample, ["--top-p", "1.5"], "--top-p"),
    (sample, ["--top-k", "-1"], "--top-k"), (sample, ["--max-new-tokens", "0"], "--max-new-tokens"),
    (sample, ["--best-of", "0"], "--best-of"), (sample, ["--best-of", "1.5"], "--best-of"),
    (sample, ["--best-of", "2", "--temperature", "0"], "the same"), (sample, ["--best-of", "9" * 12], "--best-of"),
    (sample, ["--seed", "1" + "0" * 400], "--seed"), (sample, ["--adapter-scale", "1e39"], "--adapter-scale"),
    (train_sft, ["--encoding", "hex"], "--encoding"), (train_sft, ["--encoding", "rot13"], "--encoding"),
    (pretrain, ["--n-layer", "100000"], "--n-layer"), (pretrain, ["--vocab-size", "9" * 9], "--vocab-size"),
    (pretrain, ["--n-embd", "9" * 9], "--n-embd"), (pretrain, ["--n-embd", str(2**22)], "parameters: more than"),
    (sample, ["--adapter-scale", "nan"], "--adapter-scale"), (sample, ["--adapter-scale", "inf"], "--adapter-scale"),
    (sample, ["--temperature", "inf"], "--temperature"), (sample, ["--seed", str(2**63)], "--seed"),
    (sample, ["--device", "meta"], "--device"), (sample, ["--instruction", "词汇：\udcff"], "surrogate"),
    (sample, ["--prompt", "\ud83d"], "surrogate"), (train_sft, ["--replay", "0.99999999"], "--replay"),
    (sample, ["--out", "x.jsonl"], "--file"), (sample, ["--guidance-scale", "1.5"], "--guidance-scale"),
    (sample, ["--dtype", "fp8"], "--dtype"), (sample, ["--device", "abacus"], "--device"),
    (sample, ["--ckpt", "nowhere"], "nowhere"), (sample, ["--file", "nowhere.txt"], "nowhere.txt: No such file"),
    (sample, ["--nonsense"], "--nonsense"), (sample, ["--instruction", "长" * 300], "no room"),
    (sample, ["--file", ".", "--out", "."], "--out"), (train_sft, ["--seed", "-1"], "--seed"),
    (train_sft, ["--out", sample.__file__], "--out"), (train_sft, ["--out", "x\udcff"], "not UTF-8"),
    (train_sft, ["--dtype", "fp8"], "--dtype"), (train_sft, ["--lr", "-1"], "--lr"),
    (train_sft, ["--lr", "x"], "--lr: invalid float value: 'x'"),
    (train_sft, ["--val-fraction", "1"], "--val-fraction"), (train_sft, ["--batch-size", "0"], "--batch-size"),
    (train_sft, ["--min-lr", "1"], "--min-lr 1.0 is above --lr"),
    (train_sft, ["--warmup", "-1"], "--warmup"), (train_sft, ["--device", "cuda:77"], "--device"),
    (train_sft, ["--data", "nowhere.jsonl"], "nowhere.jsonl"), (train_sft, ["--data", "."], "train.jsonl"),
    (train_sft, ["--init", "nowhere"], "nowhere"), (train_sft, ["--block-size", "129"], "--block-size"),
    (train_sft, ["--block-size", "5"], "--block-size"), (train_sft, ["--resume"], "--resume"),
    (train_sft, ["--replay-data", "x.jsonl"], "--replay"),
    (pretrain, ["--preset", "huge"], "--preset"), (pretrain, ["--vocab-size", "100"], "--vocab-size"),
    (pretrain, ["--tokenizer", "nowhere"], "nowhere"), (pretrain, ["--data", "nowhere.jsonl"], "nowhere.jsonl"),
]


@pytest.mark.parametrize("script, argv, word", BAD_FLAGS,
                         ids=lambda v: "_".join(v)[:30] if isinstance(v, list) else None)
def test_bad_flags(script, argv, word, model_dir, pairs_file, stories_file, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    given = {sample: ["--ckpt", model_dir], train_sft: ["--init", model_dir, "--data", pairs_file, "--device", "cpu"],
             pretrain: ["--data", stories_file]}[script]
    refused(script.main, [*given, *argv], word)
    assert not list(tmp_path.iterdir())


def broken(model_dir, path, change):
    shutil.copytree(model_dir, path)
    change(path)
    return path


def without(name):
    return lambda path: (path / name).unlink()


def config(**changes):
    def change(path):
        settings = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**settings, **changes}))
    return change


def weights(edit):
    def change(path):
        tensors = load_file(path / "model.safetensors")
        edit(tensors)
        save_file(tensors, path / "model.safetensors")
    return change


def shard_of(name):
    """The weights at `name`, and an index that says so."""
    def change(path):
        if not name.startswith("/"):
            shutil.copy(path / "model.safetensors", path / name)
        (path / "model.safetensors").unlink()
        index = {"weight_map": {"model.norm.weight": name}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return change


@pytest.mark.parametrize("change, words", [
    (without("tokenizer.model"), ["tokenizer.model"]),
    (without("config.json"), ["config.json"]),
    (without("model.safetensors"), ["model.safetensors"]),
    (config(hidden_size=48), ["model.embed_tokens.weight", "48)"]),
    (config(num_hidden_layers=3), ["model.layers.2", "missing"]),
    (config(num_hidden_layers=1), ["model.layers.1", "no place"]),
    (config(vocab_size=5000), ["model.embed_tokens.weight", "5000"]),
    (config(vocab_size=300), ["vocabulary of 300"]),
    (config(model_type="gpt2"), ["model_type", "gpt2"]),
    (config(attention_bias=True), ["attention_bias"]),
    (config(rope_parameters={"rope_type": "yarn"}), ["rope_parameters", "yarn"]),
    (config(rope_scaling={"type": "linear", "factor": 2.0}), ["rope_scaling", "linear"]),
    *[(config(rope_scaling=GEOMETRIES["llama3"]["rope_scaling"] | {key: value}), ["config.json", key])
      for key, value in (("factor", -1), ("factor", "8"), ("low_freq_factor", None), ("low_freq_factor", 4.0),
                         ("original_max_position_embeddings", math.nan))],
    (config(model_type="qwen3", attention_bias=True), ["attention_bias"]),
    (shard_of("../outside.safetensors"), ["../outside.safetensors", "not the name of a file"]),
    (shard_of("/etc/outside.safetensors"), ["/etc/outside.safetensors", "not the name of a file"]),
    (config(tie_word_embeddings=False), ["lm_head.weight", "missing"]),
    (lambda path: (path / "config.json").write_text("{"), ["config.json", "line 1"]),
    (lambda path: (path / "config.json").write_text("[1]"), ["config.json"]),
    (config(hidden_size="wide"), ["config.json"]),
    (lambda path: (path / "model.safetensors").rename(path / "model.safetensors.index.json"), ["index"]),
    (lambda path: (path / "config.json").write_text('{"model_type": "llama"}'), ["config.json", "missing"]),
    (lambda path: (path / "model.safetensors").write_bytes(b"x" * 99), ["model.safetensors"]),
    (lambda path: (path / "tokenizer.model").write_bytes(b"x" * 99), ["tokenizer.model"]),
    (weights(lambda t: t.update({"model.norm.weight": torch.ones(31)})), ["model.norm.weight", "(31,)", "(32,)"]),
    (weights(lambda t: t.pop("model.norm.weight")), ["model.norm.weight", "missing"]),
    (weights(lambda t: t["model.norm.weight"].fill_(math.nan)), ["model.norm.weight", "NaN"]),
    (weights(lambda t: t["model.norm.weight"].fill_(math.inf)), ["model.norm.weight", "infinite"]),
    (weights(lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int64)})), ["norm.weight", "int64"]),
    (weights(lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.bool)})), ["norm.weight", "bool"]),
    (weights(lambda t: t.update({"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)})), ["float8_e4m3fn"]),
    (weights(lambda t: t.update({"model.norm.weight": torch.full((32,), 1e39, dtype=torch.float64)})), ["infinite"]),
    *[(config(**{key: value}), ["config.json", key])
      for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
                  "intermediate_size", "vocab_size", "max_position_embeddings")
      for value in (True, "4", [4], -1, 0, 1.5, math.nan, math.inf, 10**9)],
    *[(config(**{key: value}), ["config.json", key]) for key in ("rms_norm_eps", "rope_theta")
      for value in (True, "1e-5", [1], -1, 0, math.nan, math.inf, 10**400)],
    *[(config(**{key: value}), ["config.json", key]) for key in ("tie_word_embeddings", "attention_bias", "mlp_bias")
      for value in (1, "true", [])],
    *[(config(sliding_window=value), ["config.json", "sliding_window"]) for value in (True, "x", math.nan, 0)],
    (config(rope_parameters={"rope_theta": "x"}), ["config.json", "rope_theta"]),
    *[(config(**{key: 3}), ["config.json", f"{key} 3"]) for key in ("rope_parameters", "rope_scaling")],
    *[(config(eos_token_id=value), ["config.json", "eos_token_id"]) for value in (True, "x", [1.5], {})],
    (config(partial_rotary_factor=0.5), ["config.json", "partial_rotary_factor"]),
    (config(num_attention_heads=3, num_key_value_heads=2), ["num_key_value_heads 2"]),
    (config(head_dim=15), ["head_dim 15"]),
    (lambda path: (path / "tokenizer_config.json").write_text("[]"), ["tokenizer.model"]),
    (lambda path: (path / "tokenizer.json").write_text("[]"), ["tokenizer.model"]),
], ids=lambda v: v[0] if isinstance(v, list) else None)
def test_a_broken_model_directory(change, words, model_dir, pairs_file, tmp_path, refused):
    base = broken(model_dir, tmp_path / "base", change)
    refused(train_sft.main, ["--init", base, "--data", pairs_file, "--out", tmp_path / "run"], str(base), *words)
    refused(sample.main, ["--ckpt", base], str(base), *words)
    assert not (tmp_path / "run").exists()


def test_no_flag_is_ignored(model_dir, stories_file, tmp_path, refused):
    for script in (train_sft, pretrain):
        refused(script.main, ["--val-data", stories_file, "--out", tmp_path / "x"], "--val-data goes with --data")
    refused(pretrain.main, ["--data", stories_file, "--init", model_dir, "--tokenizer", model_dir, "--out",
                            tmp_path / "x"], "--tokenizer")
    assert not (tmp_path / "x").exists()


def test_a_tokenizer_that_does_not_fit(model_dir, tok, tmp_path, refused):
    save_model(tmp_path / "other", random_model(tiny_config(tok.vocab_size)), tok)
    small = pretrain.train_tokenizer(STORIES, 300)
    save_tokenizer(tmp_path / "other", small)
    save_model(tmp_path / "padded", random_model(tiny_config(1200)), tok)
    assert load_model(tmp_path / "padded")[0].config.vocab_size == 1200
    save_model(tmp_path / "narrow", random_model(tiny_config(300)), tok)
    refused(sample.main, ["--ckpt", tmp_path / "narrow"], "vocabulary of 300")


def test_the_rope_theta_in_rope_parameters_counts(model_dir, tmp_path):
    """As transformers 5 reads it."""
    both = config(rope_theta=5e5, rope_parameters={"rope_type": "default", "rope_theta": 3e4})
    assert load_model(broken(model_dir, tmp_path / "both", both))[0].config.rope_base == 3e4
    old = config(rope_theta=5e5, rope_scaling=None)
    assert load_model(broken(model_dir, tmp_path / "old", old))[0].config.rope_base == 5e5


def test_bad_rows_reach_the_user(model_dir, tmp_path, refused):
    data = tmp_path / "data.jsonl"
    data.write_text('{"instruction": "词汇：猫", "output": "猫。"}\n{"instruction": "词汇：猫"}\n', encoding="utf-8")
    refused(train_sft.main, ["--init", model_dir, "--data", data, "--out", tmp_path / "run"], data, "row 2", "output")
    refused(pretrain.main, ["--data", data, "--out", tmp_path / "run"], data, "row 2", "text")
    refused(sample.main, ["--ckpt", model_dir, "--file", tmp_path], str(tmp_path))
    data.write_bytes("词汇：狗".encode("gbk"))
    refused(sample.main, ["--ckpt", model_dir, "--file", data], data, "not UTF-8")
    data.write_text("\n\n")
    refused(sample.main, ["--ckpt", model_dir, "--file", data], "no prompts")
    assert not (tmp_path / "run").exists()


def test_an_output_directory_that_holds_a_run_is_not_touched(model_dir, pairs_file, stories_file, tmp_path, refused):
    out = broken(model_dir, tmp_path / "run", lambda path: None)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    for more in ([], ["--overwrite"]):  # no run of ours wrote it
        for main, data in ((train_sft.main, pairs_file), (pretrain.main, stories_file)):
            refused(main, ["--data", data, "--out", out, *more], "--out", "never replaced")
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}


def test_bf16_on_a_device_without_it_falls_back_with_a_notice(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert common.pick_dtype("bf16-mixed", torch.device("cuda")) == "32-true"
    assert "bfloat16" in capsys.readouterr().err
    for there in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda there=there: there)
        for name in ("bf16-mixed", "bf16-true"):
            assert common.pick_dtype(name, torch.device("cpu")) == (name if there else "32-true")
            assert bool(capsys.readouterr().err) != there
        assert common.pick_dtype(None, torch.device("cpu")) == "32-true" and not capsys.readouterr().err


@pytest.mark.parametrize("script", ["model.py", "sample.py", "train_sft.py", "pretrain.py", "evaluate.py",
                                    "data/generate.py"])
def test_help(script):
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout
    if script != "model.py":
        assert "--seed" in done.stdout


# ---- real text ----

def test_real_text_end_to_end(real_data, tmp_path):
    base, out = tmp_path / "base", tmp_path / "sft"
    small = ["--block-size", "128", "--device", "cpu", "--batch-size", "2", "--warmup", "5", "--lr", "1e-3"]
    pretrain.main(["--data", str(real_data / "real_stories_zh.jsonl"), "--out", str(base), "--max-steps", "12", *small])
    train_sft.main(["--init", str(base), "--data", str(real_data / "real_instructions_zh.json"), "--out", str(out),
                    "--max-steps", "12", "--val-fraction", "0.01", *small])
    for run in (base, out):
        losses = [json.loads(line)["val_loss"] for line in open(run / "log.jsonl") if "val_loss" in line]
        assert losses[-1] < losses[0]
