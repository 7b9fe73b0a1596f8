"""No work is lost: saves by time, two runs in one folder, folders that are not a run's, damaged files at --resume."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import common

import pytest
import torch
from conftest import ROOT

import checkpoint
import lora
import sample
import train_sft
from checkpoint import WEIGHTS, load_last
from data import books, generate


@pytest.fixture(scope="module")
def finished(model_dir, pairs_file, tmp_path_factory):
    """A run of two steps."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train_sft.main(flags(model_dir, pairs_file, out))
    return out


def flags(model_dir, pairs_file, out, *more):
    return ["--init", str(model_dir), "--data", str(pairs_file), "--out", str(out), "--max-steps", "2", "--batch-size",
            "4", "--device", "cpu", "--val-fraction", "0.1", *map(str, more)]


@pytest.fixture
def run_dir(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


# ---- saving ----

def test_the_newest_weights_are_saved_by_time_too(model_dir, pairs_file, tmp_path, monkeypatch):
    saves = []
    monkeypatch.setattr(train_sft, "save_last", lambda out, save, state: saves.append(state["step"]))
    clock = iter(range(0, 10_000, 250))  # seconds; it is asked twice a step, and at each save
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    train_sft.main(flags(model_dir, pairs_file, tmp_path / "run", "--max-steps", "9", "--save-every", "9"))
    assert saves[0] == 0 and saves[-1] == 9 and 2 < len(saves) < 9


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(model_dir, pairs_file, tmp_path):
    usual = "--max-steps", 60, "--save-every", 2, "--eval-every", 3
    train_sft.main(flags(model_dir, pairs_file, tmp_path / "whole", *usual))
    out, rng, kills = tmp_path / "killed", random.Random(5), 0
    for steps in (3, 9, 20, 33, 47, 1000):  # of the log, after which this one is killed
        resume = ["--resume"] if (out / "last").is_dir() else []
        command = [sys.executable, "train_sft.py", *flags(model_dir, pairs_file, out, *usual, *resume)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        log = out / "log.jsonl"
        while process.poll() is None:
            if log.exists() and log.read_bytes().count(b'"loss"') >= steps:
                time.sleep(rng.random() / 50)
                process.kill()
                kills += process.wait() == -signal.SIGKILL
            time.sleep(0.002)
    assert kills >= 3 and process.returncode == 0
    for name in (WEIGHTS, f"last/{WEIGHTS}"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_ctrl_c_while_stories_are_told_gives_no_traceback(model_dir):
    command = [sys.executable, "-u", "sample.py", "--ckpt", model_dir, "--max-new-tokens", "4000"]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()  # it has begun
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT and b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize("script", ["sample.py", "train_sft.py", "pretrain.py", "lora.py", "evaluate.py", "augment.py",
                                    "train_rl.py", "demo.py", "data/generate.py", "data/books.py", "data/prepare.py"])
def test_ctrl_c_while_pytorch_is_imported_gives_no_traceback(tmp_path, script):
    (tmp_path / "torch.py").write_text("import time; print('importing', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, script, "--help"], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT and not process.stderr.read()


def test_what_is_written_is_on_the_disk_before_it_replaces_anything(tmp_path, monkeypatch):
    events = []
    fsync, replace, rename = os.fsync, os.replace, type(tmp_path).rename
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(("sync", os.fstat(fd).st_ino)) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: events.append(("name", os.stat(a).st_ino)) or replace(a, b))
    monkeypatch.setattr(type(tmp_path), "rename",
                        lambda a, b: events.append(("name", a.stat().st_ino)) or rename(a, b))
    common.write_text(tmp_path / "file", "text")
    assert [event for event, _ in events] == ["sync", "name"] and events[0][1] == events[1][1]
    for _ in range(2):
        events.clear()
        with common.new_directory(tmp_path / "folder") as work:
            common.write_text(work / "file", "text")
            inode = work.stat().st_ino
        assert events.index(("sync", inode)) < events.index(("name", inode))
        assert events[-1] == ("sync", tmp_path.stat().st_ino)  # only then the old one goes


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with common.StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- folders ----

def test_a_folder_has_one_run_at_a_time(finished, model_dir, pairs_file, tmp_path, refused):
    out = shutil.copytree(finished, tmp_path / "run")
    code = ("import sys, time; import common\n"
            "common.lock(sys.argv[1]); print('locked', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code, str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    try:
        for more in (["--resume", "--max-steps", "3"], ["--overwrite"]):
            refused(train_sft.main, flags(model_dir, pairs_file, out, *more), out, "another run")
    finally:
        other.kill()
        other.wait()
    train_sft.main(["--resume", "--out", str(out), "--max-steps", "3"])  # the first one has died
    assert load_last(out)[2]["step"] == 3


@pytest.mark.parametrize("holds", [
    {"config.json": "{}"}, {"args.json": '{"seed": 1}'}, {"args.json": "[1]"}, {"pytorch_model.bin": "x"},
    {"model-00001-of-00002.safetensors": "x", "model.safetensors.index.json": "{}"}, {"adapter_config.json": "{}"},
    {"step-001000": "x"}, {"log.jsonl": "x"}, {"loss.png": "x"}, {"eval.json": "{}"}, {"tokenizer.model": "x"},
    {"tensorboard": "x"}, {"last.new": "x"}])
def test_what_is_no_run_of_ours_is_never_replaced(holds, model_dir, pairs_file, tmp_path, refused):
    for name, content in holds.items():
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text(content)
    for more in ([], ["--overwrite"]):
        refused(train_sft.main, flags(model_dir, pairs_file, tmp_path / "out", *more), "--out", "never replaced")
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == holds


def test_overwrite_removes_what_the_run_wrote_and_nothing_else(model_dir, pairs_file, run_dir):
    for name in ("last_good", "step-1000", "step-000001", "last.old"):
        (run_dir / name).mkdir()
    own = {"mine.safetensors", "mine.bin", "my_config.json", "tokenizer.txt"}  # of the user
    for name in own:
        (run_dir / name).touch()
    train_sft.main(flags(model_dir, pairs_file, run_dir, "--overwrite"))
    assert {"last_good", "step-1000"} | own <= {path.name for path in run_dir.iterdir()}
    assert not (run_dir / "step-000001").exists() and not (run_dir / "last.old").exists()


def test_a_run_that_was_killed_before_its_first_save_can_start_anew(model_dir, pairs_file, finished, tmp_path, refused):
    out = tmp_path / "run"
    (out / "last.new").mkdir(parents=True)
    shutil.copy(finished / "args.json", out)
    (out / "log.jsonl").touch()
    refused(train_sft.main, ["--resume", "--out", out], "before its first save", "without --resume")
    train_sft.main(flags(model_dir, pairs_file, out))
    assert load_last(out)[2]["step"] == 2 and not (out / "last.new").exists()


def test_a_run_that_was_killed_while_it_replaced_another_can_start_anew(model_dir, pairs_file, run_dir, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_sft, "save_last", killed)
        train_sft.main(flags(model_dir, pairs_file, run_dir, "--overwrite"))
    train_sft.main(flags(model_dir, pairs_file, run_dir))
    assert load_last(run_dir)[2]["step"] == 2


def test_a_run_that_was_made_meanwhile_is_not_replaced(finished, model_dir, pairs_file, tmp_path, monkeypatch, refused):
    out = tmp_path / "run"  # not there when the second command looks

    def other_run(*_):
        shutil.copytree(finished, out)
    monkeypatch.setattr(common, "wait_for_all", other_run)
    refused(train_sft.main, flags(model_dir, pairs_file, out), out, "already holds")
    assert load_last(out)[2]["step"] == 2


@pytest.mark.parametrize("source", [".", "last"])
def test_the_model_that_a_run_starts_from_is_not_replaced(source, pairs_file, run_dir, refused):
    for main, more in ((train_sft.main, []), (lora.main, ["--r", "2"])):
        before = (run_dir / WEIGHTS).read_bytes()
        refused(main, flags(run_dir / source, pairs_file, run_dir, "--overwrite", *more), run_dir, "starts from")
        assert (run_dir / WEIGHTS).read_bytes() == before


@pytest.mark.parametrize("main, flag", [
    (train_sft.main, "--out"), (train_sft.main, "--init"), (sample.main, "--ckpt"), (sample.main, "--file"),
    (generate.main, "--out"), (books.main, "--out")])
def test_an_empty_path_is_not_the_current_folder(main, flag, refused):
    refused(main, [flag, ""], flag, "empty")


# ---- --resume ----

def spoil(**changes):
    def change(out):
        path = out / "args.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return change


def state(**changes):
    content = {"step": 2, "best": None, "optimizer": {}} | changes
    return lambda out: torch.save(content, out / "last/train_state.pt")


def write(name, content):
    return lambda out: (out / name).write_bytes(content)


def halve(name):
    return lambda out: (out / name).write_bytes((out / name).read_bytes()[:-(out / name).stat().st_size // 2])


@pytest.mark.parametrize("damage, words", [
    (halve("last/train_state.pt"), ["train_state.pt is damaged", "the best model"]),
    (write("last/train_state.pt", b""), ["train_state.pt is damaged"]),
    (write("last/train_state.pt", b"words"), ["train_state.pt is damaged"]),
    (lambda out: torch.save({"step": "2"}, out / "last/train_state.pt"), ["train_state.pt is damaged"]),
    (lambda out: torch.save([1], out / "last/train_state.pt"), ["train_state.pt is damaged"]),
    (state(), ["another optimizer"]), (state(optimizer="x"), ["another optimizer"]),
    *[(state(**wrong), ["train_state.pt is damaged"]) for wrong in (
        {"step": -5}, {"step": True}, {"best": "x"}, {"best": []}, {"best": [float("nan"), 1]}, {"best": [1.0, "1"]})],
    (halve("last/" + WEIGHTS), [WEIGHTS, "the best model"]), (write("last/" + WEIGHTS, b""), [WEIGHTS]),
    (write("last/config.json", b"{}"), ["config.json"]), (write("last/tokenizer.model", b"x"), ["tokenizer.model"]),
    (lambda out: (out / "last/tokenizer.model").unlink(), ["tokenizer.model"]),
    (write("log.jsonl", b'{"loss": 1}\n'), ["log.jsonl is damaged"]), (write("log.jsonl", b"?}\n"), ["log.jsonl"]),
    (write("log.jsonl", b"\xff\n"), ["log.jsonl is damaged"]), (write("args.json", b"{}"), ["args.json"]),
    (write("args.json", b"[]"), ["args.json"]), (write("args.json", b""), ["settings"]),
    (write("args.json", b"3"), ["settings"]),
    (write("args.json", b"\xff"), ["settings"]), (lambda out: (out / "args.json").unlink(), ["args.json"]),
    (spoil(lr="high"), ["--lr"]), (spoil(lr=[1]), ["--lr"]), (spoil(lr=-1), ["--lr"]),
    (spoil(dtype="fp8"), ["--dtype"]),
    (spoil(batch_size=1.5), ["--batch-size"]), (spoil(compile="yes"), ["compile"]), (spoil(seed=-1), ["--seed"]),
])
def test_damage_is_one_line_that_names_the_file(damage, words, run_dir, refused):
    damage(run_dir)
    refused(train_sft.main, ["--resume", "--out", run_dir, "--max-steps", "3"], *words)


def test_a_damaged_best_model_costs_nothing_but_itself(run_dir, capsys):
    state = torch.load(run_dir / "last/train_state.pt", weights_only=True)
    checkpoint.write_atomic(run_dir / "last/train_state.pt",
                            lambda p: torch.save(state | {"best": [0.0, 1]}, p))  # nothing will be better
    halve(WEIGHTS)(run_dir)
    with pytest.raises(SystemExit) as e:
        train_sft.main(["--resume", "--out", str(run_dir), "--max-steps", "3"])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == 2 and WEIGHTS in said and str(run_dir / "last") in said
    assert load_last(run_dir)[2]["step"] == 3
