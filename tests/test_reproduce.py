"""reproduce.py at toy size: every experiment, and verdicts that follow from the numbers."""
import csv
import json
import re
import statistics

import pytest
import torch

import pretrain
import reproduce
import runs
import sweep
import train_sft
from conftest import STORIES


@pytest.fixture
def toy(model_dir, pairs, tmp_path, monkeypatch):
    """-> argv of reproduce.py for a model of 2 layers and 20 steps of 2 rows."""
    data = tmp_path / "data"
    data.mkdir()
    rows = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs]
    (data / "train.jsonl").write_text("".join(rows[8:]), encoding="utf-8")
    (data / "val.jsonl").write_text("".join(rows[:8]), encoding="utf-8")
    (data / "stories.jsonl").write_text("".join(json.dumps({"text": s}, ensure_ascii=False) + "\n" for s in STORIES),
                                        encoding="utf-8")
    monkeypatch.setattr(runs, "JUDGED", 3)
    monkeypatch.setattr(reproduce, "MIXES", (0.0, 1.0))
    monkeypatch.setattr(reproduce, "SIZES", (8, 16))
    monkeypatch.setattr(reproduce, "STUDY_RANKS", (8, 32))
    monkeypatch.setattr(reproduce, "LEAKY_STORIES", 16)
    monkeypatch.setattr(runs.train_sft, "plot", lambda out: None)
    return ["--init", str(model_dir), "--data", str(data), "--out", str(tmp_path / "out"), "--steps", "20"]


def verdicts(out):
    """{finding: (mean, verdict)} of report.md's last table."""
    last = (out / "report.md").read_text(encoding="utf-8").split("## Verdicts")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in last.splitlines() if line.startswith("|")]
    return {row[0]: (row[2], row[4]) for row in rows[2:]}


def test_all_experiments_and_a_finding_that_does_not_hold(toy, tmp_path, capsys):
    out = tmp_path / "out"
    reproduce.main(toy)
    assert "report.html" in capsys.readouterr().out
    table = list(csv.DictReader(open(out / "runs.csv", encoding="utf-8")))
    assert {row["experiment"] for row in table} == set("0123456")
    assert {row["seed"] for row in table} == {"1", "2", "3"}

    # a verdict is the t interval of the differences in runs.csv
    def losses(key):
        return [float(row["loss"]) for row in table if row["experiment"] == "1" and row["key"] == key]
    differences = [a - b for a, b in zip(losses("run 1"), losses("run 2"))]
    half = 4.303 * statistics.stdev(differences) / 3 ** 0.5
    found = verdicts(out)
    mean = statistics.fmean(differences)
    assert found["lr 5e-4 beats 1e-4"] == (f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]",
                                          "holds" if mean > half else "undecided")
    report = (out / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!data:)', report) and report.count("<img") == 5
    assert (out / "report.md").read_text(encoding="utf-8").count("汤姆和杰瑞") == 1

    # bf16-true loses small updates, and stochastic rounding does not
    unchanged = {key: [float(r["unchanged"]) for r in table if r["experiment"] == "1" and r["key"] == f"{key} 0.0001"]
                 for key in ("bf16-true", "bf16-mixed", "stochastic")}
    assert min(unchanged["bf16-true"]) > max(unchanged["stochastic"]) > max(unchanged["bf16-mixed"])

    # nothing is run twice, and other numbers give other verdicts
    lab = runs.Lab(toy[1], toy[3], out, 20)
    lab.seeds = reproduce.SEEDS
    for name in ("run 1", "run 2"):
        for seed, value in zip(reproduce.SEEDS, (1.0, 1.01, 1.02)):
            path = lab.directory(reproduce.study_run(lab, name, seed)) / "done.json"
            planted = json.loads(path.read_text(encoding="utf-8")) | {"loss": value + 0.1 * (name == "run 2") + seed / 1e3}
            path.write_text(json.dumps(planted), encoding="utf-8")
    path = lab.directory(reproduce.study_run(lab, "run 2", 3)) / "done.json"
    path.write_text(path.read_text(encoding="utf-8").replace("1.123", "1.12"), encoding="utf-8")
    done = {p: p.stat().st_mtime_ns for p in out.glob("runs/*/*.json")}
    reproduce.main(toy)
    assert done == {p: p.stat().st_mtime_ns for p in out.glob("runs/*/*.json")}
    assert verdicts(out)["lr 5e-4 beats 1e-4"][1] == "does not hold"
