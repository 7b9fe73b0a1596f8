"""reproduce.py at toy size."""
import csv
import json

import pytest

import reproduce


@pytest.fixture
def few(monkeypatch):
    methods = [("full", None, None), ("q+v", 8, "q_proj,v_proj"), ("all-linear", 64, "all-linear")]
    monkeypatch.setattr(reproduce, "METHODS", methods)
    return methods


def test_the_sweep_at_toy_size_is_resumed_and_not_run_twice(model_dir, pairs_file, tmp_path, few, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "SEEDS", (1, 2))
    monkeypatch.setattr(reproduce, "FULL_LRS", (1e-3, 1e-2))
    monkeypatch.setattr(reproduce, "LORA_LRS", (1e-2,))
    monkeypatch.setattr(reproduce, "WIDENED", 0)
    monkeypatch.setattr(reproduce, "METHODS", few[:2])
    argv = ["lora-sweep", "--init", str(model_dir), "--data", str(pairs_file), "--out", str(tmp_path), "--steps", "3",
            "--dtype", "32-true", "--no-evaluate"]
    reproduce.main(argv)
    rows = list(csv.DictReader(open(tmp_path / "lora-sweep.csv", encoding="utf-8")))
    assert [(row["method"], row["lr"], row["seed"]) for row in rows] == [
        ("full fine-tuning", "0.001", "1"), ("full fine-tuning", "0.01", "1"), ("LoRA r=8, q+v", "0.01", "1"),
        ("full fine-tuning", "0.01", "2"), ("LoRA r=8, q+v", "0.01", "2")]
    assert all(float(row["loss"]) < float(row["base_loss"]) for row in rows)
    assert (tmp_path / "lora-sweep.png").stat().st_size > 5000
    said = capsys.readouterr().out
    assert said.endswith((tmp_path / "lora-sweep.md").read_text(encoding="utf-8")) and "100.0%" in said
    ran = list((tmp_path / "runs").glob("*/done.json"))
    assert len(ran) == 5
    before = [p.stat().st_mtime_ns for p in ran]
    reproduce.main(argv)
    assert [p.stat().st_mtime_ns for p in ran] == before
    reproduce.main([*argv, "--steps", "2"])
    assert len(list((tmp_path / "runs").glob("*/done.json"))) == 10


def outcome(losses):
    """{(method number, lr): loss} of a made-up landscape in place of training."""
    def train(argv, args):
        lr, seed = (float(argv[argv.index(flag) + 1]) for flag in ("--lr", "--seed"))
        method = 0 if argv[0] == "train_sft.py" else 1 if "q_proj,v_proj" in argv else 2
        return {"base_loss": 2.0, "loss": losses(method, lr, seed), "seconds": 1.0, "directory": None}
    return train


def test_the_grid_is_widened_at_its_edges_and_the_shares_follow_from_the_losses(tmp_path, model_dir, few, monkeypatch):
    best = [5e-4, 2e-2, 2e-3]  # inside, above, inside
    ends = [1.0, 1.5, 1.1]

    def losses(method, lr, seed):
        if method == 2 and lr == 5e-3:
            return None  # diverged
        return ends[method] + 0.01 * seed + abs(lr / best[method] - 1) * 0.1

    monkeypatch.setattr(reproduce, "train", outcome(losses))
    monkeypatch.setattr(reproduce, "figure", lambda results, path: None)
    reproduce.main(["lora-sweep", "--init", str(model_dir), "--out", str(tmp_path), "--no-evaluate"])
    rows = list(csv.DictReader(open(tmp_path / "lora-sweep.csv", encoding="utf-8")))
    lrs = {m: {float(r["lr"]) for r in rows if r["method"] == m} for m in dict.fromkeys(r["method"] for r in rows)}
    assert list(lrs.values()) == [{1e-4, 5e-4, 2e-3}, {5e-4, 2e-3, 5e-3, 1.25e-2, 3.125e-2}, {5e-4, 2e-3, 5e-3}]
    results = {(m, float(r["lr"]), int(r["seed"])): {"base_loss": 2.0, "loss": float(r["loss"]) if r["loss"] else None}
               for m in few for r in rows if r["method"] == reproduce.label(m)}
    (_, full_lr, full, _, ones), (_, lr, _, _, _), (_, _, loss, of_seed, shares) = reproduce.summarize(results)
    assert full_lr == 5e-4 and full == pytest.approx(1.02) and set(ones.values()) == {1.0}
    assert lr == 1.25e-2 and loss == pytest.approx(1.12) and len(of_seed) == 3
    assert shares[1] == pytest.approx((2 - 1.11) / (2 - 1.01))
    assert json.dumps(reproduce.digest(["a"], "b")) != json.dumps(reproduce.digest(["a"], "c"))


def test_mistakes(tmp_path, refused):
    refused(reproduce.main, ["lora-sweep", "--init", tmp_path], tmp_path)
    refused(reproduce.main, ["lora-sweep", "--steps", "0"], "--steps")
    refused(reproduce.main, [], "experiment")
