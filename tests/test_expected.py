"""What people who come from other projects expect: loggers, checkpoints by step, a shape by flags, typing to a model,
chat templates, perplexity."""
import builtins
import json
import math
import os
import sys
import types

import pytest
import torch
from conftest import STORIES, random_model, tiny_config

import evaluate
import pretrain
import sample
import train_sft
from checkpoint import load_model, save_model
from dataset import encode_prompt


def sft(model_dir, pairs_file, out, *more):
    train_sft.main(["--init", str(model_dir), "--data", str(pairs_file), "--out", str(out), "--max-steps", "4",
                    "--save-every", "1", "--eval-every", "2", "--batch-size", "4", "--device", "cpu", *more])
    return [json.loads(line) for line in open(out / "log.jsonl", encoding="utf-8")]


# ---- logging ----

def test_the_settings_are_printed(model_dir, pairs_file, tmp_path, capsys):
    sft(model_dir, pairs_file, tmp_path / "run", "--beta2", "0.97", "--seed", "0")
    line = next(line for line in capsys.readouterr().out.splitlines() if "beta2 0.97" in line)
    assert "lr 0.0005" in line and "seed 0" in line and "batch_size 4" in line and "fingerprint" not in line


def test_wandb_hears_what_the_log_has(model_dir, pairs_file, tmp_path, monkeypatch):
    heard, began = [], []
    run = types.SimpleNamespace(log=lambda fields, step: heard.append({"step": step} | fields))
    fake = types.SimpleNamespace(
        init=lambda **settings: began.append(settings) or os.stat(settings["dir"]) and run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert sft(model_dir, pairs_file, tmp_path / "run", "--log", "wandb") == heard and len(heard) == 7
    assert began[0]["config"]["lr"] == 5e-4 and began[0]["name"] == "run"

    def no_login(**settings):
        raise RuntimeError("no API key\nsee …")
    monkeypatch.setattr(fake, "init", no_login)
    with pytest.raises(SystemExit) as e:
        sft(model_dir, pairs_file, tmp_path / "other", "--log", "wandb")
    assert e.value.code == 2


def test_tensorboard_hears_what_the_log_has(model_dir, pairs_file, tmp_path, monkeypatch):
    heard = []

    class Writer:
        def __init__(self, folder):
            assert folder == tmp_path / "run" / "tensorboard"

        def add_text(self, name, text):
            assert json.loads(text)["lr"] == 5e-4

        def add_scalar(self, name, value, step):
            heard.append((step, name, value))

        def close(self):
            pass
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    log = sft(model_dir, pairs_file, tmp_path / "run", "--log", "tensorboard")
    assert heard == [(line["step"], name, line[name]) for line in log for name in line if name != "step"]


@pytest.mark.parametrize("name, module", [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_logger_that_is_not_installed_is_one_line(name, module, model_dir, pairs_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as e:
        sft(model_dir, pairs_file, tmp_path / "run", "--log", name)
    assert e.value.code == 2 and capsys.readouterr().err.splitlines()[-1].endswith(f"--log {name}: pip install {name}")


@pytest.mark.parametrize("main", [train_sft.main, pretrain.main, sample.main, evaluate.main])
def test_version(main, capsys):
    with pytest.raises(SystemExit) as e:
        main(["--version"])
    assert e.value.code == 0 and capsys.readouterr().out.startswith("MicroStories ")


# ---- checkpoints and shapes ----

def test_the_last_saves_are_kept_as_models(model_dir, pairs_file, tmp_path):
    out = tmp_path / "run"
    sft(model_dir, pairs_file, out, "--keep", "2")
    assert sorted(path.name for path in out.glob("step*")) == ["step-000003", "step-000004"]
    kept, last = (load_model(out / name)[0].state_dict() for name in ("step-000004", "last"))
    assert all(torch.equal(kept[name], last[name]) for name in last)
    assert not (out / "step-000004" / "train_state.pt").exists()
    sft(model_dir, pairs_file, out, "--overwrite")
    assert not list(out.glob("step*"))


def test_a_new_model_has_the_shape_that_is_asked_for(tmp_path, refused):
    data = tmp_path / "stories.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES), encoding="utf-8")
    shape = ["--n-layer", "1", "--n-head", "6", "--head-size", "8", "--n-embd", "40", "--intermediate-size", "56"]
    common = ["--data", str(data), "--vocab-size", "500", "--block-size", "32", "--max-steps", "1", "--device", "cpu"]
    pretrain.main([*common, *shape, "--out", str(tmp_path / "a")])
    config = load_model(tmp_path / "a")[0].config
    assert (config.n_layer, config.n_head, config.n_kv_head, config.head_size) == (1, 6, 6, 8)
    assert (config.n_embd, config.intermediate_size, config.block_size) == (40, 56, 32)
    pretrain.main([*common, *shape, "--n-kv-head", "2", "--out", str(tmp_path / "b")])
    assert load_model(tmp_path / "b")[0].config.n_kv_head == 2
    for wrong, word in ((["--n-kv-head", "4"], "--n-kv-head 4"), (["--head-size", "7"], "--head-size 7"),
                        (["--n-layer", "0"], "--n-layer"), (["--init", tmp_path / "a"], "--n-layer")):
        refused(pretrain.main, [*common, *shape, *wrong, "--out", tmp_path / "c"], word)
    refused(pretrain.main, ["--resume", "--out", tmp_path / "a", "--n-layer", "2", "--max-steps", "2"], "--n-layer")


# ---- other programs ----

def test_a_chat_template_is_our_prompt_and_generation_our_sampling(model_dir, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, tok = load_model(model_dir)
    theirs = transformers.AutoTokenizer.from_pretrained(model_dir)
    asked = {"role": "user", "content": "词汇：铲子，草地\n特点：对话"}
    prompt = theirs.apply_chat_template([asked], tokenize=False, add_generation_prompt=True)
    assert theirs(prompt)["input_ids"] == encode_prompt(tok, asked["content"])
    whole = theirs.apply_chat_template([asked, {"role": "assistant", "content": "小猫。"}], tokenize=False)
    assert whole == prompt + "小猫。" + tok.sp.id_to_piece(tok.eos_id)
    settings = transformers.GenerationConfig.from_pretrained(model_dir)
    assert (settings.temperature, settings.top_p, settings.top_k, settings.eos_token_id) == (0.2, 0.9, 30, tok.eos_id)
    assert {name: getattr(settings, name) for name in sample.SINGLE} == sample.SINGLE


def test_perplexity_of_a_plain_file(tok, tmp_path, capsys):
    model = random_model(tiny_config(tok.vocab_size))
    save_model(tmp_path / "model", model, tok)
    (tmp_path / "a.txt").write_text("小猫在河边。\n小狗在树下睡着了。\n", encoding="utf-8")
    evaluate.main(["--ckpt", str(tmp_path / "model"), "--text", str(tmp_path / "a.txt"), "--device", "cpu"])
    line = capsys.readouterr().out.splitlines()[-1]
    nats = n = 0
    for text in ("小猫在河边。", "小狗在树下睡着了。"):
        ids = [tok.eos_id, *tok.encode(text), tok.eos_id]
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]]))[0]
        nats += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
        n += len(ids) - 1
    assert f"2 stories, {n} tokens: {nats / n:.4f} nats per token, perplexity {math.exp(nats / n):.2f}" in line
    assert f"{nats / 15 / math.log(2):.3f} bits per character" in line and not (tmp_path / "model/eval.json").exists()


# ---- typing to a model ----

def test_lines_make_an_instruction_and_a_blank_line_tells_it(model_dir, monkeypatch, capsys):
    typed = iter(["词汇：铲子", "特点：对话", "", "", "/temperature 0", "/top-k 5", "/nonsense 1", "/temperature x",
                  "/top-p 2", "/seed 9 --top-k 7", "/force", "词汇：铲子", "", "/no-force", "词汇：铲子", "",
                  "长" * 300, "", "\udcb9", "", "/quit", "never read"])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(typed))
    told = []
    usual = sample.print_story

    def print_story(model, tokenizer, kind, text, n, seed, sampling, best_of):
        told.append((text, seed, dict(sampling)))
        usual(model, tokenizer, kind, text, n, seed, sampling, best_of)
    monkeypatch.setattr(sample, "print_story", print_story)
    sample.main(["--ckpt", str(model_dir), "-i", "--max-new-tokens", "3", "--device", "cpu", "--seed", "5"])
    assert [text for text, _, _ in told] == ["词汇：铲子\n特点：对话", "词汇：铲子", "词汇：铲子", "长" * 300, "\udcb9"]
    assert [seed for _, seed, _ in told] == [5, 6, 7, 8, 9]
    assert told[1][2].pop("steer")
    assert told[0][2] == sample.SINGLE and told[1][2] == told[2][2] == {"temperature": 0, "top_p": 0.9, "top_k": 5}
    said = capsys.readouterr()
    assert "no room" in said.out and "surrogate" in said.out and next(typed) == "never read"
    assert [word in said.err for word in ("/nonsense", "--temperature", "--top-p", "--seed")] == [True] * 4


def test_a_story_can_be_stopped_and_what_stands_at_the_end_is_told(model_dir, monkeypatch, capsys):
    typed = iter(["词汇：铲子", "", "词汇：草地", ""] + ["/best-of 2", "/seed 9", "词汇：小猫"])
    told = []

    def type_line(prompt):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    def print_story(model, tokenizer, kind, text, n, seed, sampling, best_of):
        told.append((text, seed, sampling["temperature"], best_of))
        if len(told) == 1:
            raise KeyboardInterrupt
    monkeypatch.setattr(builtins, "input", type_line)
    monkeypatch.setattr(sample, "print_story", print_story)
    sample.main(["--ckpt", str(model_dir), "-i", "--device", "cpu", "--seed", "5"])
    assert told == [("词汇：铲子", 5, 0.2, 1), ("词汇：草地", 6, 0.2, 1), ("词汇：小猫", 9, 0.7, 2)]


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_the_end_of_typing_is_no_error(end, model_dir, monkeypatch):
    def type_nothing(prompt):
        raise end
    monkeypatch.setattr(builtins, "input", type_nothing)
    sample.main(["--ckpt", str(model_dir), "--interactive", "--device", "cpu"])
