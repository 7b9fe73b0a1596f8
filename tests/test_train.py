import contextlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, STORIES, random_model, tiny_config
from safetensors.torch import load_file

import train_sft
from checkpoint import WEIGHTS, load_last, load_model, save_last, save_model
from dataset import PairBatches, collate, encode_pair, encode_pairs
from records import read_instructions, split_by_story
from train_sft import backward, get_lr, next_token_loss


def lrs(total, warmup, r=1.0, lr=1.0, min_lr=0.1):
    return [get_lr(step, total, warmup, lr, min_lr, r) for step in range(1, total + 1)]


def test_learning_rate():
    curve = lrs(100, 10)
    assert curve[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])  # the first step is > 0
    assert curve[9] == max(curve) == 1 and curve[-1] == pytest.approx(0.1)  # r = 1 ends exactly at the last step
    assert curve[9:] == sorted(curve[9:], reverse=True) and curve[54] == pytest.approx(0.55)
    fast = lrs(100, 10, r=2.0)
    assert fast[54] == pytest.approx(0.1) and fast[54:] == pytest.approx([0.1] * 46)  # halfway, and never again up
    assert fast[30] < curve[30]
    assert lrs(100, 10, r=0.5)[-1] == pytest.approx(0.55)
    no_warmup = lrs(10, 0)
    assert 0.9 < no_warmup[0] < 1 and no_warmup[-1] == pytest.approx(0.1)
    assert lrs(5, 10) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])  # warm-up longer than the run
    assert lrs(10, 10)[-1] == 1
    assert lrs(1, 1) == [1.0] and lrs(1, 0) == pytest.approx([0.1])


def test_one_batch_equals_accumulated_ones_of_unequal_length(tok, pairs):
    model = random_model(tiny_config(tok.vocab_size))
    rows = encode_pairs(tok, [(r["instruction"], r["output"]) for r in pairs[:8]], 128, "rows")
    rows.sort(key=lambda row: len(row[0]))
    micro_batches = [collate(rows[i:i + 2]) for i in range(0, 8, 2)]
    counts = [(y >= 0).sum().item() for _, y in micro_batches]
    assert max(counts) > 1.5 * min(counts)  # unequal enough to tell a mean of means

    def step(batches):
        model.zero_grad()
        loss, n = backward(model, batches, next_token_loss, list(model.parameters()), contextlib.nullcontext())
        assert n == sum(counts)
        return loss, {name: p.grad.clone() for name, p in model.named_parameters()}

    (loss, grads), (loss_4, grads_4) = step([collate(rows)]), step(micro_batches)
    assert loss == pytest.approx(loss_4, rel=1e-6)
    for name in grads:
        torch.testing.assert_close(grads[name], grads_4[name], atol=1e-6, rtol=1e-4)


def settings(model_dir, pairs_file, out, *more):
    return ["--init", model_dir, "--data", pairs_file, "--out", out, "--max-steps", "20", "--save-every", "10",
            "--batch-size", "4", "--grad-accum", "2", "--lr", "1e-2", "--dtype", "32-true", "--device", "cpu",
            "--val-fraction", "0.1", *more]


def run(argv, before=""):
    """The command in a process of its own, after some code that interferes with it."""
    code = f"import os, signal, sys\n{before}\nimport train_sft\ntrain_sft.main(sys.argv[1:])"
    return subprocess.run([sys.executable, "-c", code, *map(str, argv)], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def straight(model_dir, pairs_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "straight"
    done = run(settings(model_dir, pairs_file, out))
    assert done.returncode == 0, done.stderr
    return out, done


def logged(out):
    rows = [json.loads(line) for line in open(out / "log.jsonl", encoding="utf-8")]
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows]


# before step 14 (of 20, saved at 10) something happens to the process
HAPPENS = """
from dataset import PairBatches
usual = PairBatches.__call__
def call(self, step):
    if step == 13:
        os.kill(os.getpid(), signal.{})
    return usual(self, step)
PairBatches.__call__ = call
"""


@pytest.mark.parametrize("name, code, saved", [("SIGKILL", -9, 10), ("SIGTERM", 130, 14), ("SIGINT", 130, 14),
                                                ("SIGHUP", 130, 14)])
def test_an_interrupted_and_resumed_run_equals_the_straight_one(straight, model_dir, pairs_file, tmp_path, name, code,
                                                                saved):
    out = tmp_path / "run"
    stopped = run(settings(model_dir, pairs_file, out), HAPPENS.format(name))
    assert stopped.returncode == code, stopped.stderr
    assert load_last(out)[2]["step"] == saved
    train_sft.main(["--out", str(out), "--resume"])  # the settings come from the run
    for file in ("last/model.safetensors", "model.safetensors"):
        assert (out / file).read_bytes() == (straight[0] / file).read_bytes()
    assert logged(out) == logged(straight[0])


def test_replay_changes_training_and_resumes(straight, model_dir, pairs_file, tmp_path, refused):
    stories = tmp_path / "stories.jsonl"
    stories.write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES[:20]), encoding="utf-8")
    replay = ["--replay", "0.5", "--replay-data", stories]
    whole, parts = (settings(model_dir, pairs_file, tmp_path / name, *replay) for name in ("whole", "parts"))
    train_sft.main(list(map(str, whole)))
    assert run(parts, HAPPENS.format("SIGKILL")).returncode == -9
    train_sft.main(list(map(str, [*parts, "--resume"])))
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts") != logged(straight[0])
    assert load_file(tmp_path / "whole" / WEIGHTS).keys() == load_file(tmp_path / "parts" / WEIGHTS).keys()
    for name, value in load_file(tmp_path / "whole" / WEIGHTS).items():
        assert torch.equal(value, load_file(tmp_path / "parts" / WEIGHTS)[name])
    refused(train_sft.main, settings(model_dir, pairs_file, tmp_path / "none", "--replay", "0.5"), "--replay-data")
    refused(train_sft.main, settings(model_dir, pairs_file, tmp_path / "none", "--replay", "1"), "--replay")
    refused(train_sft.main, settings(model_dir, pairs_file, tmp_path / "none", *replay[:3], tmp_path / "no.jsonl"),
            "no.jsonl")


def test_the_run_directory(straight, model_dir):
    out, done = straight
    rows = logged(out)
    steps, evaluations = [r for r in rows if "loss" in r], [r for r in rows if "val_loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 21)) and set(steps[0]) == {"step", "loss", "lr"}
    assert [r["step"] for r in evaluations] == [0, 4, 8, 12, 16, 20]
    assert steps[0]["lr"] == pytest.approx(0.005) and steps[-1]["lr"] == pytest.approx(0.001)
    losses = [r["val_loss"] for r in evaluations]
    assert losses[-1] < losses[0] - 0.3  # it learns
    assert f"{min(losses):.4f}" in done.stdout and "validation loss" in done.stdout
    assert done.stdout.count("────") > 7 and "汤姆和杰瑞" in done.stdout  # ends with the eight cases
    assert (out / "loss.png").stat().st_size > 5000
    assert json.loads((out / "args.json").read_text())["lr"] == 1e-2
    best, _ = load_model(out)
    base, _ = load_model(model_dir)
    assert not torch.equal(best.lm_head.weight, base.lm_head.weight)
    assert not list(out.glob("*.tmp")) and not (out / "last.old").exists()


def test_the_logged_losses_are_true(straight, model_dir, pairs_file, tok):
    train, val = split_by_story(read_instructions(pairs_file), 0.1, story=lambda pair: pair[1])
    model, _ = load_model(model_dir)

    def loss(rows):  # one row at a time, token by token
        total = n = 0
        for ids, labels in rows:
            logp = model(torch.tensor([ids])).log_softmax(-1)[0]
            taken = [-logp[t - 1, labels[t]].item() for t in range(1, len(ids)) if labels[t] >= 0]
            total, n = total + sum(taken), n + len(taken)
        return total / n

    rows = logged(straight[0])
    assert rows[0]["val_loss"] == pytest.approx(loss(encode_pairs(tok, val, 128, "val")), rel=1e-4)
    batches = PairBatches(encode_pairs(tok, train, 128, "train"), 4, 2, 1337)
    first = [tuple(y.tolist()) for _, ys in batches(0) for y in ys]
    chosen = [row for row in batches.rows if any(tuple(y)[:len(row[1]) - 1] == tuple(row[1][1:]) for y in first)]
    assert len(chosen) >= 8
    assert rows[1]["loss"] == pytest.approx(loss(chosen), rel=1e-4)


def test_transformers_loads_the_run(straight):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(straight[0], dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(straight[0])
    ids = tokenizer("小猫", return_tensors="pt")["input_ids"]
    ours, _ = load_model(straight[0])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, ours(ids), atol=1e-4, rtol=0)


def test_a_save_that_was_interrupted_between_its_renames_is_found(straight, tmp_path):
    import shutil
    shutil.copytree(straight[0] / "last", tmp_path / "last.old")
    assert load_last(tmp_path)[2]["step"] == 20


def test_the_only_save_is_kept_until_the_next_one_is_in_its_place(straight, model_dir, tmp_path, monkeypatch):
    import shutil
    shutil.copytree(straight[0] / "last", tmp_path / "last.old")  # killed between the renames

    def killed(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(Path, "rename", killed)  # and again at the next save
    with pytest.raises(KeyboardInterrupt):
        save_last(tmp_path, lambda directory: shutil.copytree(model_dir, directory, dirs_exist_ok=True), {"step": 21})
    assert load_last(tmp_path)[2]["step"] == 20


@pytest.mark.parametrize("dtype, stored", [("bf16-true", torch.bfloat16), ("bf16-mixed", torch.float32)])
def test_precisions_learn_and_resume(dtype, stored, model_dir, pairs_file, tmp_path, monkeypatch):
    emulate = "import common; common.has_bf16 = lambda device: True\n"  # slow without bfloat16 units, but the same
    monkeypatch.setattr("common.has_bf16", lambda device: True)
    argv = list(map(str, settings(model_dir, pairs_file, tmp_path / "a", "--dtype", dtype)))
    train_sft.main(argv)
    losses = [r["val_loss"] for r in logged(tmp_path / "a") if "val_loss" in r]
    assert losses[-1] < losses[0] - 0.2
    weights = load_file(tmp_path / "a" / "last" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {stored}
    moments = {v.dtype for s in load_last(tmp_path / "a")[2]["optimizer"]["state"].values()
               for k, v in s.items() if k != "step"}
    assert moments == {stored}
    stopped = run([*argv, "--out", tmp_path / "b"], emulate + HAPPENS.format("SIGKILL"))
    assert stopped.returncode == -9
    train_sft.main(["--out", str(tmp_path / "b"), "--resume"])
    assert (tmp_path / "b/last/model.safetensors").read_bytes() == (tmp_path / "a/last/model.safetensors").read_bytes()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_good_weights(model_dir, pairs_file, tmp_path):
    with pytest.raises(SystemExit) as e:
        train_sft.main(list(map(str, settings(model_dir, pairs_file, tmp_path / "run", "--lr", "1e25", "--warmup", "0",
                                              "--save-every", "1", "--grad-clip", "0"))))
    assert "loss" in str(e.value.code) and "last good weights" in str(e.value.code)
    model, _, state = load_last(tmp_path / "run")
    assert all(p.isfinite().all() for p in model.parameters()) and state["step"] < 20


def test_a_group_of_parameters_may_have_a_learning_rate_of_its_own(tmp_path, tok):
    model = random_model(tiny_config(tok.vocab_size))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = [{"params": [p], "lr_scale": name.endswith("norm.weight") * 3.0} for name, p in model.named_parameters()]
    x = torch.randint(5, tok.vocab_size, (2, 9))
    train_sft.train(model, lambda step: [(x[:, :-1], x[:, 1:])], [], tmp_path, lambda directory: None, steps=1, lr=0.1,
                    min_lr=0.1, warmup=0, grad_clip=0, optimizer=torch.optim.SGD(groups))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != name.endswith("norm.weight"), name


@pytest.mark.parametrize("tied", [True, False])
def test_a_piece_that_does_not_come_hardly_moves(tied, tok):
    model = random_model(tiny_config(tok.vocab_size, tie_embeddings=tied))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-7)  # of a likelihood near 0
        p.grad[:4] = 1e-3
    train_sft.adamw(model, lr=1e-3).step()
    for name, p in model.named_parameters():
        moved = (p.detach() - before[name]).abs()
        is_pieces = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert moved[:4].min() > 9e-4 and (moved[4:].max() < 1e-4) == is_pieces, name


def test_resume_refuses_other_data(straight, tmp_path, pairs, refused):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(r) + "\n" for r in pairs[:30]), encoding="utf-8")
    refused(train_sft.main, ["--out", straight[0], "--resume", "--data", other], "--resume", "data")


def test_a_finished_run_can_go_on(straight, tmp_path, refused):
    import shutil
    refused(train_sft.main, ["--out", straight[0], "--resume"], "has made 20 steps already, of 20", "--max-steps")
    refused(train_sft.main, ["--out", straight[0], "--resume", "--max-steps", "12"], "20 steps already, of 12")
    shutil.copytree(straight[0], tmp_path / "run")
    train_sft.main(["--out", str(tmp_path / "run"), "--resume", "--max-steps", "24"])
    assert [r["step"] for r in logged(tmp_path / "run") if "loss" in r] == list(range(1, 25))


def test_overwrite_starts_anew_and_takes_nothing_over(straight, model_dir, pairs_file, tmp_path, refused):
    import shutil
    out = tmp_path / "run"
    shutil.copytree(straight[0], out)
    (out / "notes.txt").write_text("mine")
    before = (out / "log.jsonl").read_bytes()
    refused(train_sft.main, settings(model_dir, pairs_file, out), "--out", "--overwrite")
    refused(train_sft.main, settings(model_dir, out / "none.jsonl", out, "--overwrite"), "none.jsonl")
    assert (out / "log.jsonl").read_bytes() == before  # a mistake costs nothing
    train_sft.main(list(map(str, settings(model_dir, pairs_file, out, "--overwrite", "--max-steps", "3",
                                          "--epochs", "1"))))
    assert [r["step"] for r in logged(out) if "loss" in r] == [1, 2, 3]
    assert (out / "notes.txt").read_text() == "mine"


def test_without_validation_the_newest_weights_are_the_model(model_dir, pairs_file, tmp_path):
    out = tmp_path / "run"
    train_sft.main(list(map(str, settings(model_dir, pairs_file, out, "--val-fraction", "0", "--max-steps", "4"))))
    assert (out / "model.safetensors").read_bytes() == (out / "last/model.safetensors").read_bytes()
    assert not any("val_loss" in r for r in logged(out))


def test_a_worse_validation_loss_does_not_replace_the_best_model(model_dir, pairs_file, tmp_path):
    out = tmp_path / "run"
    # not more steps: on some processors the gradient is nan after 15
    train_sft.main(list(map(str, settings(model_dir, pairs_file, out, "--lr", "1", "--min-lr", "1", "--warmup", "0",
                                          "--max-steps", "8"))))
    losses = [r["val_loss"] for r in logged(out) if "val_loss" in r]
    assert min(losses) == losses[0] < losses[-1]
    assert (out / "model.safetensors").read_bytes() == (model_dir / "model.safetensors").read_bytes()
    assert (out / "last/model.safetensors").read_bytes() != (model_dir / "model.safetensors").read_bytes()


def test_decay_is_on_matrices_only(model_dir, pairs_file, tmp_path):
    """With a tiny learning rate and an enormous decay only what decays moves."""
    out = tmp_path / "run"
    train_sft.main(list(map(str, settings(model_dir, pairs_file, out, "--lr", "1e-9", "--min-lr", "1e-9",
                                          "--weight-decay", "1e8", "--max-steps", "2", "--warmup", "0"))))
    before, after = (load_file(p / "model.safetensors") for p in (model_dir, out / "last"))
    for name in before:
        assert torch.allclose(before[name] * 0.9 ** 2, after[name], atol=1e-6) == (before[name].dim() == 2), name


def test_steps_follow_from_epochs(model_dir, pairs_file, tmp_path):
    argv = settings(model_dir, pairs_file, tmp_path / "run", "--epochs", "1.5")
    at = argv.index("--max-steps")
    train_sft.main(list(map(str, argv[:at] + argv[at + 2:])))
    rows = len(open(pairs_file, encoding="utf-8").readlines())
    n = max(r["step"] for r in logged(tmp_path / "run"))
    assert math.ceil(1.5 * (rows * 0.8) / 8) <= n <= math.ceil(1.5 * rows / 8) + 1


def test_a_flag_given_to_resume_counts_or_is_refused(straight, model_dir, pairs_file, tmp_path, refused):
    import shutil
    out = tmp_path / "run"
    shutil.copytree(straight[0], out)
    refused(train_sft.main, ["--out", out, "--resume", "--init", tmp_path, "--max-steps", "24"], "--init",
            "cannot change", model_dir)
    train_sft.main(["--out", str(out), "--resume", "--max-steps", "24", "--weight-decay", "5", "--beta1", "0",
                    "--beta2", "0.5", "--init", str(model_dir)])  # the run's own --init is no change
    group = load_last(out)[2]["optimizer"]["param_groups"][0]
    assert group["weight_decay"] == 5 and tuple(group["betas"]) == (0, 0.5)
    plain = tmp_path / "plain"
    shutil.copytree(straight[0], plain)
    train_sft.main(["--out", str(plain), "--resume", "--max-steps", "24"])
    assert (plain / "last" / WEIGHTS).read_bytes() != (out / "last" / WEIGHTS).read_bytes()

    # --epochs now beats the --max-steps of the run; 8 rows a step
    rows, _ = split_by_story(read_instructions(pairs_file), 0.1, story=lambda pair: pair[1])
    per_epoch = math.ceil(len(rows) / 8)
    train_sft.main(["--out", str(out), "--resume", "--epochs", "4"])
    last = max(row["step"] for row in map(json.loads, open(out / "log.jsonl")))
    assert last == 4 * per_epoch > 24


def test_files_have_the_mode_that_the_umask_says(straight):
    umask = os.umask(0)
    os.umask(umask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in straight[0].iterdir() if path.is_file()}
    assert WEIGHTS in modes and set(modes.values()) == {0o666 & ~umask}


def test_what_cannot_be_written_is_one_line(straight, model_dir, pairs_file, tmp_path, monkeypatch, refused, capsys):
    refused(train_sft.main, settings(model_dir, pairs_file, "/proc/run"), "cannot write to /proc/run")
    import errno
    saved = []

    def full(directory, *rest):
        saved.append(directory)
        if len(saved) == 6:  # last/ at step 0, 10 and the best models between
            raise OSError(errno.ENOSPC, "No space left on device")
        save_model(directory, *rest)
    monkeypatch.setattr(train_sft, "save_model", full)
    refused_argv = list(map(str, settings(model_dir, pairs_file, tmp_path / "run")))
    with pytest.raises(SystemExit) as e:
        train_sft.main(refused_argv)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == 2 and "No space left" in said and str(tmp_path / "run" / "last") in said
    monkeypatch.setattr(train_sft, "save_model", save_model)
    train_sft.main(["--out", str(tmp_path / "run"), "--resume"])  # nothing half made is in the way
    for file in ("last/model.safetensors", "model.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (straight[0] / file).read_bytes()


def test_a_disk_that_is_full_while_weights_or_state_are_written(model_dir, pairs_file, tmp_path):
    """As safetensors and torch.save report it: neither raises an OSError."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({n}, {n})); signal.signal(signal.SIGXFSZ, " \
            "signal.SIG_IGN)"
    size = (model_dir / WEIGHTS).stat().st_size
    for n in (size // 2, size + 1000):  # too small for the weights; for the optimizer's state
        out = tmp_path / str(n)
        done = run(settings(model_dir, pairs_file, out), limit.format(n=n))
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 2 and "cannot write to" in last and str(out) in last, done.stderr[-2000:]
        assert not list(out.rglob("*.tmp")) and not list(out.glob("last.*"))
        assert (out / "last").exists() == ("holds the last good save" in last) == (n > size)


def test_a_dollar_in_the_name_of_a_run_is_no_formula(straight, tmp_path):
    import shutil

    import figures
    out = tmp_path / "a $x_{$ b"
    out.mkdir()
    shutil.copy(straight[0] / "log.jsonl", out)
    figures.run_curves(out)
    assert (out / "loss.png").stat().st_size > 5000


def test_another_loss_is_another_function(model_dir, tok, tmp_path):
    """Direct preference optimization (Rafailov et al., arXiv 2305.18290) on the same loop: its batches are what it
    likes, here pairs (chosen, rejected) of (x, y), and the terms of its mean are pairs."""
    model, frozen = load_model(model_dir)[0], load_model(model_dir)[0].eval()
    prompt = "词汇：铲子"
    rows = [[encode_pair(tok, prompt, text, 128)] for text in ("小猫捡到铲子。", "小狗在树下等了很久。")]
    data = [tuple(map(collate, rows))]

    def log_ratio(model, batch):  # of the stories' probabilities, one row a batch
        return frozen(*batch).detach() - model(*batch)

    def dpo_loss(model, pairs):
        margins = [log_ratio(model, chosen) - log_ratio(model, rejected) for chosen, rejected in pairs]
        return -torch.nn.functional.logsigmoid(0.5 * torch.stack(margins)).sum(), len(pairs)

    best = train_sft.train(model, lambda step: [data], [data], tmp_path / "dpo",
                           lambda directory: save_model(directory, model, tok), steps=20, lr=1e-3, loss_fn=dpo_loss)
    chosen, rejected = (log_ratio(model, batch).item() for batch in data[0])
    assert best < 0.3 < math.log(2) and chosen > 0.5 > -0.5 > rejected
    rows = logged(tmp_path / "dpo")
    assert rows[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-4)
    trained, _ = load_model(tmp_path / "dpo")
    assert not torch.equal(trained.lm_head.weight, frozen.lm_head.weight)
