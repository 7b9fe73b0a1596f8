"""Two processes do what one does: torchrun --nproc-per-node 2, gloo, float32, no dropout."""
import contextlib
import json
import os
import signal
import subprocess
import sys
import time

from common import rank, start_processes, world

import pytest
import torch
from conftest import ROOT, STORIES
from safetensors.torch import load_file

import train_sft
from checkpoint import WEIGHTS, load_last, load_model, save_model
from dataset import PairBatches, Replay, by_length, encode_pairs, encode_stories
from records import read_instructions
from train_sft import backward, next_token_loss, train

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def a_step_and_some_training(model_dir, pairs_file, out):
    """In each process: the gradients of one step to out.pt, then five steps of SGD to the directory out."""
    start_processes(torch.device("cpu"))
    model, tokenizer = load_model(model_dir)
    rows = encode_pairs(tokenizer, read_instructions(pairs_file), 128, "rows")
    pairs = PairBatches(rows, 4, 1, seed=1, rank=rank(), world=world())  # one micro-batch a step
    batches = Replay(pairs, encode_stories(tokenizer, STORIES[:20], 128, "stories"), 0.3)
    params = list(model.parameters())
    loss, n = backward(model, batches(3), next_token_loss, params, contextlib.nullcontext())
    if rank() == 0:
        torch.save({"loss": loss, "n": n, "gradients": [p.grad for p in params]}, f"{out}.pt")
    model.zero_grad()
    train(model, batches, by_length(rows[:9], 2), out, lambda directory: save_model(directory, model, tokenizer),
          steps=5, lr=0.1, warmup=0, optimizer=torch.optim.SGD(params))


def torchrun(*argv, **options):
    return subprocess.run([*TORCHRUN, *map(str, argv)], cwd=ROOT, env=ENV, capture_output=True, text=True, **options)


def test_gradients_and_sgd_agree_with_one_process(model_dir, pairs_file, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nsys.path.insert(0, 'tests')\nfrom test_torchrun import a_step_and_some_training\n"
                      "a_step_and_some_training(*sys.argv[1:])")
    done = torchrun(script, model_dir, pairs_file, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    a_step_and_some_training(model_dir, pairs_file, tmp_path / "one")
    one, two = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "two"))
    assert one["n"] == two["n"] > 50 and two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    for a, b in zip(one["gradients"], two["gradients"]):
        assert (a - b).norm() <= 1e-6 * a.norm() and a.norm() > 0
    one, two = (load_file(tmp_path / name / "last" / WEIGHTS) for name in ("one", "two"))
    before = load_file(model_dir / WEIGHTS)
    for name in one:
        distance = (one[name] - two[name]).norm() / one[name].norm()
        assert distance <= 1e-6 and (one[name] - before[name]).norm() > 1e-4 * one[name].norm()
    for (step, a), (same, b) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert step == same and b == pytest.approx(a, rel=1e-6)  # one process alone writes


@pytest.fixture(scope="module")
def command(model_dir, pairs_file):
    return ["train_sft.py", "--init", model_dir, "--data", pairs_file, "--max-steps", "20", "--save-every", "10",
            "--batch-size", "6", "--lr", "1e-2", "--dtype", "32-true", "--device", "cpu", "--val-fraction", "0.1"]


def losses(out):
    rows = [json.loads(line) for line in open(out / "log.jsonl", encoding="utf-8")]
    return [(r["step"], r.get("loss", r.get("val_loss"))) for r in rows]


def test_the_commands(model_dir, pairs_file, command, tmp_path):
    done = torchrun(*command, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout and done.stdout.count("汤姆和杰瑞") == 1  # one process prints
    train_sft.main([*map(str, command[1:]), "--out", str(tmp_path / "one")])
    for (step, a), (same, b) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert step == same and b == pytest.approx(a, rel=1e-4)  # AdamW enlarges what rounding leaves

    # stopped as torchrun stops its processes; resumed by two it is the same run bit for bit, by one it is close
    argv = [*TORCHRUN, *map(str, command), "--out", str(tmp_path / "stopped"), "--save-every", "20"]
    process = subprocess.Popen(argv, cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    log = tmp_path / "stopped" / "log.jsonl"
    while not (log.exists() and '"step": 3,' in log.read_text()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C, which torchrun passes on to its processes
    process.communicate(timeout=60)
    assert process.returncode != 0 and 0 < load_last(tmp_path / "stopped")[2]["step"] < 20
    subprocess.run(["cp", "-r", tmp_path / "stopped", tmp_path / "by_one"], check=True)
    assert torchrun("train_sft.py", "--resume", "--out", tmp_path / "stopped").returncode == 0
    a, b = (load_file(tmp_path / name / "last" / WEIGHTS) for name in ("two", "stopped"))
    assert all(torch.equal(a[name], b[name]) for name in a) and losses(tmp_path / "stopped") == losses(tmp_path / "two")
    train_sft.main(["--resume", "--out", str(tmp_path / "by_one")])
    for (_, a), (_, b) in zip(losses(tmp_path / "two"), losses(tmp_path / "by_one"), strict=True):
        assert b == pytest.approx(a, rel=1e-4)


def test_errors_come_once_and_pretraining_and_lora_run(model_dir, pairs_file, tmp_path):
    failed = torchrun("train_sft.py", "--init", model_dir, "--data", "nowhere.jsonl", "--out", tmp_path / "x")
    assert failed.returncode != 0 and failed.stderr.count("error: ") == 1
    stories = tmp_path / "stories.jsonl"
    stories.write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES), encoding="utf-8")
    small = "'--max-steps', '3', '--batch-size', '3', '--device', 'cpu', '--block-size', '128'"
    script = tmp_path / "script.py"
    script.write_text(f"import lora, pretrain\n"
                      f"pretrain.main(['--data', {str(stories)!r}, '--vocab-size', '500', '--out', "
                      f"{str(tmp_path / 'base')!r}, {small}])\n"
                      f"lora.main(['--init', {str(model_dir)!r}, '--data', {str(pairs_file)!r}, '--out', "
                      f"{str(tmp_path / 'lora')!r}, '--dropout', '0.1', {small}])\n")
    done = torchrun(script)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "base")[-1][0] == losses(tmp_path / "lora")[-1][0] == 3
