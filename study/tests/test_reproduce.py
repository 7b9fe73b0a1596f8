"""reproduce.py at toy size: every experiment, and verdicts that follow from the numbers."""
import csv
import hashlib
import json
import math
import statistics
from pathlib import Path

from common import has_bf16

import pytest
import torch
from conftest import STORIES
from safetensors.torch import load_file

import pretrain
import sample
import train_sft
from checkpoint import WEIGHTS, gpt_config
from constraints import KEYS
from data import builtin
from study import experiments, findings, reproduce, runs

METHODS = {"full fine-tuning": None, "LoRA r=8, q+v": (8, "q_proj,v_proj"), "LoRA r=64, all-linear": (64, "all-linear")}


@pytest.fixture(autouse=True)
def few_stories(monkeypatch):
    for module in (train_sft, sample):
        monkeypatch.setattr(module, "print_cases", lambda *_: None)
    monkeypatch.setattr(train_sft.figures, "run_curves", lambda out: None)
    monkeypatch.setattr(runs, "STORY_TOKENS", 10)


@pytest.fixture
def toy(model_dir, pairs, tmp_path, monkeypatch):
    """-> argv of reproduce.py for a model of 2 layers and 10 steps."""
    data = tmp_path / "data"
    data.mkdir()
    rows = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs]
    (data / "train.jsonl").write_text("".join(rows[8:]), encoding="utf-8")
    (data / "val.jsonl").write_text("".join(rows[:8]), encoding="utf-8")
    (data / "stories.jsonl").write_text("".join(json.dumps({"text": s}, ensure_ascii=False) + "\n" for s in STORIES),
                                        encoding="utf-8")
    monkeypatch.setattr(runs, "JUDGED", 3)
    monkeypatch.setattr(experiments, "MIXES", (0.0, 1.0))
    monkeypatch.setattr(experiments, "SIZES", (8, 16))
    monkeypatch.setattr(experiments, "STUDY_RANKS", (8, 32))
    monkeypatch.setattr(experiments, "LEAKY_STORIES", 16)
    monkeypatch.setattr(experiments, "METHODS", {name: METHODS[name] for name in list(METHODS)[:2]})
    monkeypatch.setattr(experiments, "FULL_LRS", (1e-3, 1e-2))
    monkeypatch.setattr(experiments, "LORA_LRS", (1e-2,))
    monkeypatch.setattr(experiments, "WIDENED", 0)
    monkeypatch.setattr(experiments, "LORA_RANK", 8)
    monkeypatch.setattr(runs, "ORDERED", 3)
    return ["--init", str(model_dir), "--data", str(data), "--out", str(tmp_path / "out"), "--steps", "10"]


def table_of(out):
    with open(out / "runs.csv", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def verdicts(out):
    """{finding: (mean, verdict)} of report.md's first table."""
    first = (out / "report.md").read_text(encoding="utf-8").split("## ")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in first.splitlines()
            if line.startswith("|")]
    return {row[0]: (row[2], row[4]) for row in rows[2:]}


def test_all_experiments_and_findings_that_hold_and_do_not(toy, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    reproduce.main(toy)
    assert capsys.readouterr().out == f"{out / 'report.md'}, {out / 'runs.csv'}\n"
    table = table_of(out)
    assert {row["experiment"] for row in table} == set("012345679")  # 8 is for the base that ships
    assert {row["seed"] for row in table if row["key"] == "run 1"} == {"1", "2", "3"}
    assert {row["seed"] for row in table if row["key"] == "run 2"} == {"1", "2", "3", "4", "5"}

    # a verdict is the t interval of the differences in runs.csv
    def losses(key):
        return [float(row["loss"]) for row in table if row["experiment"] == "1" and row["key"] == key]
    differences = [a - b for a, b in zip(losses("run 1"), losses("run 2"))]
    half = 4.30265 * statistics.stdev(differences) / 3 ** 0.5
    found = verdicts(out)
    mean = statistics.fmean(differences)
    assert found["lr 5e-4 beats 1e-4"] == (f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]",
                                          "holds" if mean > half else "undecided")
    report = (out / "report.md").read_text(encoding="utf-8")
    base, data = (hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]
                  for paths in ([Path(toy[1]) / WEIGHTS], sorted(Path(toy[3]).glob("*.jsonl"))))
    assert f"Base: sha256 {base}; data: {toy[3]}, {data}; code: commit " in report
    images = [line.split("](")[1].rstrip(")") for line in report.splitlines() if line.startswith("![")]
    assert len(images) == 8 and all((out / name).stat().st_size > 5000 for name in images)
    assert report.count("汤姆和杰瑞") == 1
    assert "(ours) the best LoRA ends above full fine-tuning at its best" in found  # 2 takes the best of 7

    # bf16-true loses small updates, and stochastic rounding does not; without bfloat16 units all three are float32
    unchanged = {key: [float(r["unchanged"]) for r in table if r["experiment"] == "1" and r["key"] == f"{key} 0.0001"]
                 for key in ("bf16-true", "bf16-mixed", "stochastic")}
    if has_bf16(torch.device("cpu")):
        assert min(unchanged["bf16-true"]) > max(unchanged["stochastic"]) > max(unchanged["bf16-mixed"])

    # what is judged is judged whole
    lab = runs.Lab(toy[1], toy[3], out, 10, reproduce.SEEDS)
    judged = lab.result(experiments.study_run(lab, "run 4", 1))["eval"]
    assert judged["gen_nll"] and judged["lcs"] and "floor" not in judged and len(judged["cases"]) == 8

    # other numbers give another verdict: one that is true, one that is false, one that cannot be told
    for name, values in (("run 1", (1.0, 1.01, 1.02)), ("run 2", (1.1, 1.12, 1.12, 1.1, 1.1)),
                         ("run 3", (1.2, 1.12, 1.0, 1.0, 1.2)), ("run 4", (0.5, 0.43, 0.3, 0.3, 0.5))):
        for seed, value in enumerate(values, 1):
            run = experiments.study_run(lab, name, seed)
            lab.keep(run, "training", lab.read(run, "training") | {"loss": value})

    # the results alone are enough on another machine: nothing is trained there
    (out / "runs").rename(tmp_path / "runs")
    monkeypatch.setattr(runs, "train_in", None)
    reproduce.main(toy)
    assert not (out / "runs").exists()
    found = verdicts(out)
    mean, verdict = found["lr 5e-4 beats 1e-4"]
    assert mean.startswith("-0.1033 [") and verdict == "does not hold"
    mean, verdict = found["bf16-mixed ends lower than bf16-true"]
    assert mean.startswith("+0.6980 [") and verdict == "holds"  # of all five seeds
    assert found["a faster fall ends lower"][1] == "undecided"


def test_quick_and_interrupted(toy, tmp_path, monkeypatch, capsys):
    calls = []

    def killed_once(argv, **more):
        calls.append(argv)
        if len(calls) == 3:
            raise SystemExit(130)
        train_sft.main(argv, **more)

    monkeypatch.setitem(runs.PROGRAMS, "train_sft.py", killed_once)
    argv = [*toy[:-2], "--quick", "--steps", "2"]
    with pytest.raises(SystemExit) as stopped:
        reproduce.main(argv)
    assert stopped.value.code == 130
    out = tmp_path / "out"
    assert len(table_of(out)) == 4  # of two runs, each in two roles
    reproduce.main(argv)
    table = table_of(out)
    assert {(row["experiment"], row["seed"]) for row in table} == {("1", "1"), ("2", "1")}
    assert {row["plain_nll"] for row in table} == {""}  # losses only
    assert {verdict for _, verdict in verdicts(out).values()} == {"undecided", "not run"}  # what is met, is not
    assert len(calls) == 4 + 8 - 2 + 1  # the four runs; the grid, of which two are among them; the one cut short


def test_a_run_that_was_interrupted_behind_its_last_step_is_finished(toy, tmp_path, monkeypatch):
    lab = runs.Lab(toy[1], toy[3], tmp_path / "out", 2)
    run = lab.sft(1e-3, "bf16-mixed", 1)

    def killed(*_):
        raise SystemExit(130)
    with monkeypatch.context() as patch:
        patch.setattr(train_sft, "print_cases", killed)
        with pytest.raises(SystemExit):
            lab.train(run)
    assert lab.result(run) is None and runs.steps_made(lab.directory(run) / "model") == 2
    lab.train(run)
    result = lab.result(run)
    assert result["loss"] < result["base_loss"] and len([row for row in lab.log(run) if "lr" in row]) == 2
    assert not (lab.directory(run) / "model" / "last").exists()


def test_a_run_that_was_interrupted_goes_on_from_its_last_save(toy, tmp_path, monkeypatch):
    labs = whole, stopped = [runs.Lab(toy[1], toy[3], tmp_path / name, 6) for name in ("whole", "stopped")]
    run = whole.sft(1e-3, "bf16-mixed", 1, "--save-every", 2)
    whole.train(run)
    step, made = runs.Watched.step, []

    def killed(self):
        made.append(1)
        if len(made) == 5:
            raise SystemExit(130)
        step(self)
    monkeypatch.setattr(runs.Watched, "step", killed)
    with pytest.raises(SystemExit):
        stopped.train(run)
    assert runs.steps_made(stopped.directory(run) / "model") == 4
    stopped.train(run)
    assert len(made) == 5 + 2
    a, b = (lab.result(run) for lab in labs)
    assert a["middle"] == b["middle"]
    assert a["loss"] == b["loss"] and a["unchanged"] == b["unchanged"]
    averages = [load_file(lab.directory(run) / "ema" / WEIGHTS) for lab in labs]
    assert all(torch.equal(value, averages[1][name]) for name, value in averages[0].items())


def test_a_loss_that_is_not_finite_is_a_result(toy, tmp_path, monkeypatch):
    def not_finite(*_):
        raise FloatingPointError("step 1: loss nan")
    lab = runs.Lab(toy[1], toy[3], tmp_path / "out", 2)
    run = lab.sft(1e-3, "bf16-mixed", 1)
    monkeypatch.setattr(runs.Watched, "step", not_finite)
    for job in (run, runs.Mix(run, 0.5), runs.Mix(run, "ema")):
        lab.make(job, "eval")
        assert lab.is_done(job, "eval")
    again = runs.Lab(toy[1], toy[3], tmp_path / "out", 2)  # from results.jsonl
    assert again.result(run)["loss"] is None and again.loss(run) == math.inf


def test_a_model_that_is_on_another_machine_is_trained_again_where_it_is_to_be_judged(toy, tmp_path):
    here, there = (tmp_path / name for name in ("here", "there"))
    lab = runs.Lab(toy[1], toy[3], here, 2)
    run = lab.sft(1e-3, "bf16-mixed", 1)
    lab.make(run, None)
    there.mkdir()
    (there / runs.RESULTS).write_bytes((here / runs.RESULTS).read_bytes())
    lab = runs.Lab(toy[1], toy[3], there, 2)
    lab.make(run, None)
    assert not (there / "runs").exists()
    lab.keep(run, "eval", {})  # of the model of the other machine
    lab.make(run, "loss_by_story")
    assert "eval" not in lab.known[run.command()]
    assert (there / "runs").exists() and lab.result(run)["loss_by_story"] == pytest.approx(
        lab.result(run)["loss"], rel=1e-3)


def test_a_mistake_in_a_run_is_told(toy, tmp_path, refused):
    lab = runs.Lab(toy[1], toy[3], tmp_path / "out", 2)
    with pytest.raises(ValueError, match="exit code 2.*output.txt"):
        lab.train(lab.sft(1e-3, "bf16-mixed", 1, "--val-fraction", 2))


def test_a_base_of_a_quarter_of_the_tokens(model_dir, tmp_path, monkeypatch):
    for module in (runs, train_sft):
        monkeypatch.setattr(module, "find_base", lambda: model_dir)
    for module, name, value in ((builtin, "STORIES", 60), (builtin, "BOOKS", 60), (builtin, "EXERCISES", 9),
                                (builtin, "VALIDATION_STORIES", 8), (builtin, "REPLAYED", 9), (runs, "JUDGED", 2),
                                (pretrain, "BUILTIN_TOKENIZER", 60),
                                (experiments, "SIZES", (10, 20)), (reproduce, "SEEDS", (1,))):
        monkeypatch.setattr(module, name, value)
    builtin.fine_tuning.cache_clear()
    monkeypatch.setattr(experiments, "REWARMED", ("--lr", "1e-2", "--warmup", "1", "--max-steps", "3"))
    reproduce.main(["--only", "0,8", "--out", str(tmp_path), "--steps", "2"])
    table = table_of(tmp_path)
    [quarter] = [row for row in table if row["key"] == "pretraining a quarter"]
    assert "--epochs 0.25" in quarter["command"]
    before = {row["key"]: float(row["base_loss"]) for row in table if row["key"].startswith("base")}
    assert before["base of a quarter"] != before["base"] and len(table) == 5 + 2 + 1 + 6
    # two bases, one of which was held at its learning rate, each fine-tuned with both decays
    fall = {row["key"]: float(row["base_loss"]) for row in table if row["experiment"] == "8"}
    assert fall["held 1"] == fall["held 2"] != fall["fallen 1"] == fall["fallen 2"] != before["base"]
    assert "base of a quarter" in (tmp_path / "report.md").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in open(tmp_path / "data" / "10-all permutations.jsonl", encoding="utf-8")]
    assert len({row["output"] for row in rows}) == 10 < len(rows)
    fixed = [json.loads(line) for line in open(tmp_path / "data" / "20-fixed order.jsonl", encoding="utf-8")]
    keys = [[line.split("：")[0] for line in row["instruction"].split("\n")] for row in fixed]
    assert keys == [sorted(some, key=KEYS.index) for some in keys] and max(map(len, keys)) > 1
    held = {json.loads(line)["output"] for line in open(tmp_path / "data" / "val.jsonl", encoding="utf-8")}
    assert held and not held & {row["output"] for row in rows}


def test_what_is_frozen_stays_as_it_is(toy, tmp_path):
    lab = runs.Lab(toy[1], toy[3], tmp_path / "out", 2)
    run = lab.sft(1e-2, "bf16-mixed", 1, frozen=("embed_tokens", "norm"))
    lab.make(run, "loss_by_story")  # of the trained model, not of another run with the same flags
    assert lab.result(run)["loss_by_story"] == pytest.approx(lab.loss(run), rel=1e-3)
    assert lab.loss(lab.sft(1e-2, "bf16-mixed", 1)) is None
    before, after = (load_file(Path(directory) / WEIGHTS) for directory in (toy[1], lab.model(run)))
    for name, weight in after.items():
        same = torch.equal(weight, before[name])
        assert same == ("norm" in name or "embed_tokens" in name), name


def test_an_instruction_in_every_order_of_its_lines(toy, tmp_path, monkeypatch):
    rows = [{"constraints": {"词汇": ["小猫"], "随机句子": "天黑了。"}, "story": None},
            {"constraints": {"词汇": ["小狗"], "随机句子": "天亮了。", "特点": ["对话"]}, "story": None},
            {"constraints": {"词汇": ["小狗"]}, "story": None}]

    def write(model, tokenizer, prompts, *_):  # obeys where the words stand first, and with two lines always
        return [["“好！”小猫和小狗。天黑了。天亮了。" if prompt.startswith("词汇") or prompt.count("\n") == 1 else "。"]
                for prompt in prompts], 1.0, None
    monkeypatch.setattr(runs.combined, "write_stories", write)
    lab = runs.Lab(toy[1], toy[3], tmp_path / "out", 2)
    lab.yardstick = (rows, [], {})
    assert lab.in_every_order(None, None) == {"n": 2, "met": pytest.approx((1 + 2 / 6) / 2), "every": 0.5, "some": 1.0}
    monkeypatch.setattr(runs, "ORDERS", 1)
    found = lab.in_every_order(None, None)
    assert found["every"] == found["some"]


def test_runs_keep_their_names_when_the_checkout_moves(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "find_base", lambda: Path.cwd() / "base")
    names = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "base").symlink_to(model_dir)
        monkeypatch.chdir(tmp_path / place)
        lab = runs.Lab(None, None, "out", 2)
        [(_, _, pretraining, _)] = experiments.plan_little_data(lab)
        tuning = lab.sft(1e-4, "bf16-true", 1, data=lab.file("pairs", lambda: []))
        names.append([lab.directory(pretraining), lab.directory(tuning)])
    assert names[0] == names[1]


def test_verdicts():
    def verdict(*differences):
        return findings.Finding("", "", list(differences)).verdict()
    assert verdict(0.10, 0.11, 0.12) == "holds" and verdict(-0.10, -0.11, -0.12) == "does not hold"
    assert verdict(0.1, -0.1, 0.05) == "undecided"
    assert verdict(0.1, 0.11) == "undecided" and verdict() == "not run"
    def alike(*differences):
        return findings.Finding("", "", list(differences), within=0.02).verdict()
    assert alike(0.010, 0.011, 0.012) == "holds" == alike(0.001, 0.0, -0.001)
    assert alike(0.10, 0.11, 0.12) == "does not hold" == alike(-0.10, -0.11, -0.12)
    assert alike(0.019, 0.02, 0.021) == "undecided" == alike(-0.05, 0.0, 0.05) == alike(0.0)
    row = findings.Finding("", "", [0.10, 0.11, 0.12], share=True).row()
    assert row[2].startswith("+11.0 points [+8.5, ") and row[4] == "holds"
    # 12.706 x 0.01 / sqrt(2) > 0.02, and so on: t(3) 3.182 / sqrt(4) x 0.01 is the first that is not
    assert findings.seeds_needed([0.10, 0.11, 0.12]) == 4 and findings.seeds_needed([0.1, 0.2]) is None
    mean, lo, hi = findings.Finding("", "", [1.0, 2.0, 3.0]).interval()
    assert (mean, lo, hi) == pytest.approx((2, 2 - 4.30265 / 3 ** 0.5, 2 + 4.30265 / 3 ** 0.5), abs=1e-4)


def test_the_leaky_split_leaks_and_ours_does_not(toy, tmp_path):
    lab = runs.Lab(toy[1], toy[3], tmp_path / "out", 2)
    sides = [{story for _, story in experiments.leaky(lab, side)} for side in ("train", "val")]
    assert sides[1] and not sides[0] & {story for _, story in lab.pairs[1]}
    rows = [experiments.leaky(lab, side) for side in ("train", "val")]
    assert sorted(rows[0] + rows[1]) == sorted(experiments.arranged(lab, 16, experiments.ALL))


# ---- the optimizers ----

def steps_of(optimizer, weights, gradients, **settings):
    params = [torch.nn.Parameter(weights.clone())]
    made = optimizer(params, lr=1e-3, betas=(0.9, 0.95), **settings)
    seen = []
    for gradient in gradients:
        params[0].grad = gradient.to(weights.dtype)
        made.step()
        seen.append(params[0].detach().clone())
    return made, seen


def test_watching_changes_nothing_and_averages():
    torch.manual_seed(0)
    weights, gradients = torch.randn(50), [torch.randn(50) for _ in range(6)]
    _, plain = steps_of(torch.optim.AdamW, weights, gradients, fused=True)
    watched, same = steps_of(runs.Watched, weights, gradients, horizon=4, fused=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, same))
    average = plain[0]
    for step in plain[1:]:
        average = average + (step - average) / 4
    [state] = watched.state_dict()["state"].values()
    torch.testing.assert_close(state["ema"], average)
    group = watched.param_groups[0]
    assert group["counted"] == 6 and group["unchanged"] < 0.1


def test_stochastic_rounding():
    torch.manual_seed(0)
    x = torch.cat([torch.full((40000,), 1 + 2 ** -10), torch.full((40000,), -3 - 2 ** -9), torch.tensor([1.5, 0.0])])
    y = runs.stochastic_round(x)
    assert y.dtype == torch.bfloat16 and y[-2:].tolist() == [1.5, 0.0]
    assert set(y[:40000].tolist()) == {1.0, 1 + 2 ** -7} and set(y[40000:-2].tolist()) == {-3.0, -3 - 2 ** -6}
    assert y[:40000].float().mean() == pytest.approx(1 + 2 ** -10, abs=1e-4)


def test_stochastic_adamw_moves_where_bfloat16_stands_still():
    torch.manual_seed(0)
    weights = torch.full((20000,), 1.0)  # lr 1e-3 is a quarter of bfloat16's step below 1
    gradients = [torch.ones(20000)] * 3
    _, exact = steps_of(torch.optim.AdamW, weights, gradients, weight_decay=0.1)
    still, seen = steps_of(runs.Watched, weights.bfloat16(), gradients, horizon=4, weight_decay=0.1, fused=True)
    assert torch.equal(seen[-1], weights.bfloat16()) and still.param_groups[0]["unchanged"] == 3
    _, moved = steps_of(runs.StochasticAdamW, weights.bfloat16(), gradients, horizon=4, weight_decay=0.1)
    assert moved[-1].float().mean() == pytest.approx(exact[-1].mean().item(), abs=1e-4)


def test_kahan_adamw_loses_nothing():
    torch.manual_seed(0)
    weights, gradients = torch.rand(2000) + 1, [torch.randn(2000) for _ in range(40)]
    _, exact = steps_of(torch.optim.AdamW, weights.bfloat16().float(), gradients, weight_decay=0.1)
    _, plain = steps_of(runs.Watched, weights.bfloat16(), gradients, horizon=4, weight_decay=0.1, fused=True)
    kahan, seen = steps_of(runs.KahanAdamW, weights.bfloat16(), gradients, horizon=4, weight_decay=0.1)
    def error(made):
        return (made[-1].float() - exact[-1]).abs().mean().item()
    assert seen[-1].dtype == torch.bfloat16 and error(seen) < 0.3 * error(plain)
    [state] = kahan.state.values()
    torch.testing.assert_close(seen[-1].float() + state["cut_off"].float(), exact[-1], atol=2e-4, rtol=0)


# ---- lora-sweep ----

def test_the_sweep_at_toy_size_is_resumed_and_not_run_twice(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "SEEDS", (1, 2))
    out = tmp_path / "out"
    argv = ["lora-sweep", *toy[:-1], "3"]
    reproduce.main(argv)
    rows = table_of(out)
    assert [(row["key"], row["seed"]) for row in rows] == [
        ("full fine-tuning 0.001", "1"), ("full fine-tuning 0.01", "1"), ("full fine-tuning 0.01", "2"),
        ("LoRA r=8, q+v 0.01", "1"), ("LoRA r=8, q+v 0.01", "2")]
    assert all(float(row["loss"]) < float(row["base_loss"]) for row in rows)
    assert [bool(row["val_loss"]) for row in rows] == [False, True, True, True, True]
    assert (out / "lora-sweep.png").stat().st_size > 5000
    report = (out / "report.md").read_text(encoding="utf-8")
    assert "## 7." in report and "## 2." not in report and "| 0.0% | 100.0% |" in report
    assert report.count("| LoRA r=8, q+v") == 1
    done = list((out / "runs").glob("*/finished"))
    assert len(done) == 5
    before = [p.stat().st_mtime_ns for p in done]
    reproduce.main(argv)
    assert [p.stat().st_mtime_ns for p in done] == before
    lab = runs.Lab(toy[1], toy[3], out, 3, reproduce.SEEDS)
    assert experiments.best_setups(lab) == {"best full": ("full fine-tuning", 0.01),
                                            "best LoRA": ("LoRA r=8, q+v", 0.01)}
    reproduce.main([*argv, "--steps", "2", "--no-evaluate"])
    assert len(list((out / "runs").glob("*/finished"))) == 10
    assert not any(row["val_loss"] for row in table_of(out))


def test_the_grid_is_widened_at_its_edges_and_the_shares_follow_from_the_losses(tmp_path, model_dir, monkeypatch):
    best = [5e-4, 2e-2, 2e-3]  # inside, above, inside
    ends = [1.0, 1.5, 1.1]

    def losses(method, lr, seed):
        if method == 2 and (lr == 5e-3 or seed == 3):
            return None  # diverged
        return ends[method] + 0.01 * seed + abs(lr / best[method] - 1) * 0.1

    def train(lab, run):
        """Losses of a made-up landscape in place of training."""
        lr, seed = (float(run.argv[run.argv.index(flag) + 1]) for flag in ("--lr", "--seed"))
        method = 0 if run.argv[0] == "train_sft.py" else 1 if "q_proj,v_proj" in run.argv else 2
        lab.keep(run, "training", {"base_loss": 2.0, "loss": losses(method, lr, seed), "seconds": 1.0, "torch": "",
                                   "device": ""})

    monkeypatch.setattr(runs.Lab, "train", train)
    monkeypatch.setattr(experiments, "METHODS", METHODS)
    reproduce.main(["lora-sweep", "--init", str(model_dir), "--out", str(tmp_path), "--no-evaluate"])
    lrs = {method: {float(row["key"].split()[-1]) for row in table_of(tmp_path) if row["key"].startswith(method)}
           for method in METHODS}
    assert list(lrs.values()) == [{1e-4, 5e-4, 2e-3}, {2e-3, 5e-3, 1.25e-2, 3.125e-2}, {8e-4, 2e-3, 5e-3}]
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith(("| full", "| LoRA"))]
    shares = [(2 - 1.1 - 0.01 * seed) / (2 - 1 - 0.01 * seed) for seed in (1, 2)]
    assert lines[0][:6] == ["full fine-tuning", "0.0005", "3", "1.0200", "0.0%", "100.0%"]
    assert lines[1][1] == "0.0125"
    assert lines[2][:6] == ["LoRA r=64, all-linear", "0.002", "2", "1.1150", f"{1.115 / 1.02 - 1:.1%}",
                            f"{statistics.fmean(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})"]


def test_mistakes(tmp_path, model_dir, refused):
    refused(reproduce.main, ["lora-sweep", "--init", tmp_path], tmp_path)
    line = {"command": "python train_sft.py", "data": "generator version 9", "base": "another"}
    (tmp_path / runs.RESULTS).write_text(json.dumps(line), encoding="utf-8")
    refused(reproduce.main, ["--out", tmp_path], "line 1 is of another base", "--out")
    (tmp_path / runs.RESULTS).write_text("{", encoding="utf-8")
    refused(reproduce.main, ["--out", tmp_path], "line 1 is no result")
    refused(reproduce.main, ["--steps", "0"], "--steps")
    refused(reproduce.main, ["no-sweep"], "no-sweep")
    refused(reproduce.main, ["--only", "1,10"], "10")
    refused(reproduce.main, ["--only", "1", "--quick"], "--quick")
    refused(reproduce.main, ["lora-sweep", "--only", "1"], "lora-sweep", "--only")
    refused(reproduce.main, ["--preset", "small"], "--init")
    refused(reproduce.main, ["--preset", "small", "--init", model_dir], "n_layer")


def test_the_studys_model_without_a_gpu_says_how_long_it_takes(toy, tmp_path, monkeypatch, refused):
    tiny = gpt_config(Path(toy[1]) / "config.json")
    monkeypatch.setitem(reproduce.PRESETS, "microstories", tiny)
    argv = [*toy[:-2], "--preset", "microstories", "--only", "6", "--steps", "1000000"]
    said = refused(reproduce.main, argv, "without a GPU", "hours", "--yes")
    assert float(said.split("about ")[1].split(" hours")[0].replace(",", "")) > 1
    assert not (tmp_path / "out" / "runs").exists()
    reproduce.main([*argv[:-1], "1", "--yes"])
    assert all("--batch-size 32" in row["command"] for row in table_of(tmp_path / "out"))
