"""The study's experiments, made again: python reproduce.py

Runs what is not yet run (Ctrl-C and the same command go on), then writes report.md, report.html, runs.csv and figures
to --out. Every finding of the study gets a verdict that follows from paired differences over seeds.

An experiment is two functions: `runs` lists what it needs, as (key, run, what to do after training), and `tell` makes
blocks of the report, and findings, of the results there are. A key ends in the seed. Seeds are paired: a seed is a data
order, the same for all runs that are compared.

    python reproduce.py --quick             experiments 1 and 2, one seed, 60 steps
    python reproduce.py --only 1,4
    python reproduce.py lora-sweep          what LoRA needs to reach full fine-tuning (sweep.py)
"""
import argparse
import csv
import functools
import math
import os
import random
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import report
import sweep
from runs import Lab, Mix, Run
from tqdm import tqdm

import train_sft
from checkpoint import gpt_config
from common import fail, positive
from constraints import parse, permutations, render
from model import PRESETS
from records import story_hash

SEEDS = (1, 2, 3)
STUDY = {"run 1": (1e-4, "bf16-true", 1), "run 2": (5e-4, "bf16-true", 1), "run 3": (5e-4, "bf16-true", 2),
         "run 4": (5e-4, "bf16-mixed", 2)}  # peak learning rate, precision, --decay-rate
LRS, SEEDED_LRS = (5e-5, 1e-4, 5e-4, 2e-3), (1e-4, 5e-4)  # of each precision; those with all seeds
PRECISIONS = ("bf16-true", "bf16-mixed", "stochastic")
STUDY_RANKS = (8, 256)  # of LoRA, alpha twice as large
SIZES = (500, 2000, 13000)  # stories
REPLAYS, SEEDED_REPLAYS = (0, 0.05, 0.1, 0.25, 0.5), (0, 0.1, 0.5)
MIXES = tuple(i / 10 for i in range(11))
LEAKY_STORIES, LEAKY_FRACTION = 500, 0.05


# ---- verdicts ----

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, 1 to 9 degrees of freedom


@dataclass
class Finding:
    """What the study found, and by how much, seed by seed, we found it too: differences above 0 agree with it."""
    claim: str
    measure: str
    differences: list

    def interval(self):
        """-> (mean, lo, hi), the 95% t interval of the mean; lo and hi None below three seeds."""
        n = len(self.differences)
        mean = statistics.fmean(self.differences)
        if n < 3:
            return mean, None, None
        half = T_975[min(n - 1, len(T_975)) - 1] * statistics.stdev(self.differences) / n ** 0.5
        return mean, mean - half, mean + half

    def verdict(self):
        if not self.differences:
            return "not run"
        _, lo, hi = self.interval()
        if lo is None:
            return "undecided"
        return "holds" if lo > 0 else "does not hold" if hi < 0 else "undecided"

    def row(self):
        if not self.differences:
            return [self.claim, self.measure, "–", "0", self.verdict()]
        mean, lo, hi = self.interval()
        spread = f" [{lo:+.4f}, {hi:+.4f}]" if lo is not None else ""
        return [self.claim, self.measure, f"{mean:+.4f}{spread}", str(len(self.differences)), self.verdict()]


def paired(got, a, b, measure):
    """[measure of a - measure of b] for the seeds that have both. a, b: keys without their seed."""
    both = [(measure(got.get((*a, seed))), measure(got.get((*b, seed)))) for seed in SEEDS]
    return [x - y for x, y in both if x is not None and y is not None]


def single(got, key, measure):
    """[measure] for the seeds that have it."""
    return [x for seed in SEEDS if (x := measure(got.get((*key, seed)))) is not None]


def loss(result):
    return result and result.get("loss")


def of_eval(name):
    return lambda result: result["eval"][name] if result and "eval" in result else None


def all_met(*numbers):
    """-> measure: the share of stories that meet all constraints, over the instructions with so many of them."""
    def rate(result):
        if not (result and "eval" in result):
            return None
        met = [result["eval"]["satisfied"][str(k)] for k in numbers if str(k) in result["eval"]["satisfied"]]
        n = sum(m["n"] for m in met)
        return sum(m["rate"] * m["n"] for m in met) / n if n else None
    return rate


def middle(result):
    """Mean training loss over the middle tenth of the steps, where schedules differ; seeds share the batches."""
    if not result or result["loss"] is None:
        return None
    losses = [row["loss"] for row in result["log"] if "lr" in row]
    half, width = len(losses) // 2, max(1, len(losses) // 20)
    return statistics.fmean(losses[half - width:half + width])


def cell(got, key, measure=loss, form="{:.4f}"):
    """Mean over the seeds, and the least and the most, as text."""
    values = single(got, key, measure)
    if not values:
        return "–"
    spread = f" ({form.format(min(values))} to {form.format(max(values))})" if len(values) > 1 else ""
    return form.format(statistics.fmean(values)) + spread


def seeds(got, key, measure=loss):
    return str(len(single(got, key, measure)))


def mean(got, key, measure=loss):
    """Mean over the seeds, None without any."""
    values = single(got, key, measure)
    return statistics.fmean(values) if values else None


# What evaluate.py measures, as columns of tables.
val_loss, plain_loss = of_eval("val_loss"), of_eval("plain_nll")
MEASURES = [
    ("validation loss", val_loss, "{:.4f}"), ("all of 1 met", all_met(1), "{:.1%}"),
    ("all of 2, 3, 4", all_met(2, 3, 4), "{:.1%}"), ("loss on plain stories", plain_loss, "{:.4f}"),
    ("loss of its stories under the base", of_eval("gen_nll"), "{:.4f}"),
    ("4-grams repeated", of_eval("rep4"), "{:.1%}"),
    ("longest shared with training (characters)", of_eval("lcs"), "{:.1f}"),
]


def measured(got, first):
    """A table of MEASURES, a row a key, and the line of each loss over keys that are numbers."""
    names = list(dict.fromkeys(key[0] for key in got))
    rows = [[str(name), *(cell(got, (name,), measure, form) for _, measure, form in MEASURES),
             seeds(got, (name,), val_loss)] for name in names]
    lines = [(title, [(name, mean(got, (name,), measure)) for name in names if not isinstance(name, str)])
             for title, measure, _ in MEASURES if measure in (val_loss, plain_loss)]
    return report.table([first, *(title for title, _, _ in MEASURES), "seeds"], rows), lines


# ---- 1: the four runs ----

def decay(rate):
    return [] if rate == 1 else ["--decay-rate", rate]


def study_run(lab, name, seed, *more, **others):
    lr, dtype, rate = STUDY[name]
    return lab.sft(lr, dtype, seed, *decay(rate), *more, **others)


def precision_run(lab, precision, lr, seed):
    if precision == "stochastic":
        return lab.sft(lr, "bf16-true", seed, optimizer="StochasticAdamW")
    return lab.sft(lr, precision, seed)


def four_runs(lab):
    for seed in lab.seeds:
        for name in STUDY:
            yield (name, seed), study_run(lab, name, seed), lab.judge
    for seed in lab.seeds:
        for precision in PRECISIONS:
            for lr in LRS if seed == SEEDS[0] else SEEDED_LRS:
                yield (precision, lr, seed), precision_run(lab, precision, lr, seed), None


def tell_four_runs(lab, got):
    rows, curves = [], []
    for name, (lr, dtype, rate) in STUDY.items():
        label = f"{name}: lr {lr:g}, {dtype}, decay {rate}"
        rows.append([label, cell(got, (name,)), cell(got, (name,), middle), seeds(got, (name,))])
        if (name, SEEDS[0]) in got:
            curves.append((label, got[name, SEEDS[0]]["log"]))

    def unchanged(result):
        return result and result.get("unchanged")

    grid = [[f"{lr:g}", *(cell(got, (p, lr)) for p in PRECISIONS),
             *(cell(got, (p, lr), unchanged, "{:.1%}") for p in PRECISIONS)] for lr in LRS]
    lines = [(f"{p}, decay 1", [(lr, mean(got, (p, lr))) for lr in LRS]) for p in PRECISIONS]
    best = {p: min(SEEDED_LRS, key=lambda lr: mean(got, (p, lr)) or math.inf) for p in PRECISIONS}
    blocks = [
        report.table(["run", "validation loss", "training loss, middle tenth", "seeds"], rows),
        report.figure(lab.out / "four-runs.png", "The study's four runs, seed 1: training loss (pale: each step), and "
                      "the learning rate", functools.partial(report.curves, curves)),
        report.text("Precision and learning rate, decay 1. stochastic: bf16-true, its weights rounded stochastically. "
                    "Unchanged: the share of weights that a step leaves exactly as they were, mean over all steps."),
        report.table(["lr", *(f"loss, {p}" for p in PRECISIONS), *(f"unchanged, {p}" for p in PRECISIONS)], grid),
        report.figure(lab.out / "precision.png", "Validation loss over the learning rate, by precision",
                      functools.partial(report.lines, lines, "peak learning rate", "validation loss (nats per token)",
                                        logx=True)),
    ]
    wins = [paired(got, (p, 1e-4), (p, 5e-4), loss) for p in ("bf16-true", "bf16-mixed")]  # of 5e-4 over 1e-4
    findings = [
        Finding("lr 5e-4 beats 1e-4", "loss of run 1 - run 2 (bf16-true)", paired(got, ("run 1",), ("run 2",), loss)),
        *(Finding(f"… and with {precision}", "loss at 1e-4 - at 5e-4, decay 1",
                  paired(got, (precision, 1e-4), (precision, 5e-4), loss)) for precision in PRECISIONS[1:]),
        Finding("(ours) part of it is that bf16-true rounds updates away", "the first difference - that of bf16-mixed",
                [a - b for a, b in zip(*wins)] if len(wins[0]) == len(wins[1]) else []),
        Finding("a faster fall converges faster", "training loss in the middle, run 2 - run 3",
                paired(got, ("run 2",), ("run 3",), middle)),
        Finding("… and ends lower", "loss of run 2 - run 3", paired(got, ("run 2",), ("run 3",), loss)),
        Finding("bf16-mixed ends lower than bf16-true", "loss of run 3 - run 4",
                paired(got, ("run 3",), ("run 4",), loss)),
        Finding("… without the faster fall, too", "loss at 5e-4, decay 1",
                paired(got, ("bf16-true", 5e-4), ("bf16-mixed", 5e-4), loss)),
        Finding("… each at its best learning rate", f"loss at {best['bf16-true']:g} - at "
                f"{best['bf16-mixed']:g}, decay 1", paired(got, ("bf16-true", best["bf16-true"]),
                                                           ("bf16-mixed", best["bf16-mixed"]), loss)),
        Finding("(ours) stochastic rounding ends lower than bf16-true", "loss at 5e-4, decay 1",
                paired(got, ("bf16-true", 5e-4), ("stochastic", 5e-4), loss)),
        Finding("(ours) bf16-mixed ends lower than stochastic rounding", "loss at 5e-4, decay 1",
                paired(got, ("stochastic", 5e-4), ("bf16-mixed", 5e-4), loss)),
    ]
    return blocks, findings


# ---- 2: LoRA ----

def lora_runs(lab):
    """At the study's learning rate, precision and decay (run 4's), and the best set-ups of the sweep."""
    lr, dtype, rate = STUDY["run 4"]
    found = sweep.best(lab, SEEDS[0])
    for seed in lab.seeds:
        yield ("full", seed), study_run(lab, "run 4", seed), None
        for r in STUDY_RANKS:
            program = ("lora.py", "--r", r, "--alpha", 2 * r, "--targets", "study")
            yield (f"LoRA {r}_{2 * r}", seed), lab.sft(lr, dtype, seed, *decay(rate), program=program), (
                lab.judge if seed == SEEDS[0] else None)
        for name, setup in found.items():
            yield (name, seed), sweep.run(lab, *setup, seed), lab.judge if seed == SEEDS[0] else None


def tell_lora(lab, got):
    small, large = (f"LoRA {r}_{2 * r}" for r in STUDY_RANKS)
    lr, dtype, rate = STUDY["run 4"]
    study = f"lr {lr:g}, {dtype}, decay {rate}"
    labels = {"full": f"full, {study}", small: f"{small}, {study}", large: f"{large}, {study}"}
    for name, (method, best_lr) in sweep.best(lab, SEEDS[0]).items():
        labels[name] = f"{sweep.label(method)}, lr {best_lr:g}, {sweep.DTYPE}, decay 1"

    def speed(result):
        return result and result["tokens_per_s"]

    usual = mean(got, ("full",), speed)

    rows = [[label, cell(got, (name,)), cell(got, (name,), speed, "{:,.0f}"), seeds(got, (name,))]
            for name, label in labels.items()]
    curves = [(labels[name], got[name, SEEDS[0]]["log"]) for name in labels if (name, SEEDS[0]) in got]
    blocks = [
        report.table(["run", "validation loss", "tokens/s", "seeds"], rows),
        report.figure(lab.out / "lora.png", "Full fine-tuning and LoRA, seed 1; the study's targets, and the best of "
                      "lora-sweep",
                      functools.partial(report.curves, curves)),
    ]
    if "best LoRA" not in labels:
        blocks.append(report.text("The best set-ups: `python reproduce.py lora-sweep` has not been run yet."))
    findings = [
        Finding(f"{small} ends above full fine-tuning", "loss", paired(got, (small,), ("full",), loss)),
        Finding(f"{large} is better than {small.split()[1]}", "loss", paired(got, (small,), (large,), loss)),
        Finding(f"{large} still ends above full", "loss", paired(got, (large,), ("full",), loss)),
        Finding(f"{large} is slower than full", "tokens/s lost, as a share of full's",
                [lost / usual for lost in paired(got, ("full",), (large,), speed)]),
    ]
    if "best LoRA" in labels:
        findings += [
            Finding("(ours) the best LoRA still ends above full at the study's lr", "loss",
                    paired(got, ("best LoRA",), ("full",), loss)),
            Finding("(ours) … and above full at its own best lr", "loss",
                    paired(got, ("best LoRA",), ("best full",), loss)),
        ]
    return blocks, findings


# ---- 3: constraints, of the runs of 1 and 2 that were judged ----

def constraint_runs(lab):
    yield from (job for job in four_runs(lab) if job[2])
    yield from (job for job in lora_runs(lab) if job[2])


def tell_constraints(lab, got):
    names = dict.fromkeys(key[:-1] for key in got if "eval" in got[key])
    rows = [[" ".join(map(str, name)), *(cell(got, name, all_met(k), "{:.0%}") for k in (1, 2, 3, 4)),
             seeds(got, name, all_met(1))] for name in names]
    blocks = [
        report.text("All constraints met, by their number; one story an instruction, temperature 0.2, instructions of "
                    "generated stories that are held out."),
        report.table(["run", "1", "2", "3", "4", "seeds"], rows),
        report.stories({" ".join(map(str, name)): got[(*name, SEEDS[0])]["eval"]["cases"] for name in names
                        if "eval" in got.get((*name, SEEDS[0]), {})}),
    ]
    findings = [
        Finding("single constraints mostly work", "all of 1 met in run 4, less one half",
                [x - 0.5 for x in single(got, ("run 4",), all_met(1))]),
        Finding("combined ones work poorly", "one half, less all of 2, 3, 4 met in run 4",
                [0.5 - x for x in single(got, ("run 4",), all_met(2, 3, 4))]),
    ]
    return blocks, findings


# ---- 0: how little data is enough, how much pretraining? ----

def data_run(lab, size, order, seed):
    lr, dtype, rate = STUDY["run 4"]
    return lab.sft(lr, dtype, seed, *decay(rate), "--val-data", lab.file("val", lambda: lab.pairs[1]),
                   data=lab.file(f"{size}-{order}", lambda: arranged(lab, size, order)))


@functools.cache
def pool(lab):
    """Instruction pairs of training stories, one of each."""
    if lab.data:
        pairs = lab.pairs[0]
    else:
        from data.generate import instructions, stories
        made = instructions(list(stories(max(SIZES), train_sft.BUILTIN_SEED)), train_sft.BUILTIN_SEED)
        held = {story_hash(story) for _, story in lab.pairs[1]}
        pairs = [(r["instruction"], r["output"]) for r in made if story_hash(r["output"]) not in held]
    return list({story_hash(story): (instruction, story) for instruction, story in reversed(pairs)}.values())[::-1]


def arranged(lab, size, order):
    pairs = pool(lab)[:size]
    if order == "one order":
        return pairs
    return [(render(c), story) for instruction, story in pairs
            for c in permutations(parse(instruction)[0])]


def little_data(lab):
    sizes = SIZES if not lab.data else [n for n in SIZES if n <= len(pool(lab))] or [len(pool(lab))]
    for seed in lab.seeds:
        for size in sizes:
            for order in ("one order", "all permutations"):
                yield (size, order, seed), data_run(lab, size, order, seed), None
    if lab.shipped:
        pretrained = Run(("pretrain.py", "--epochs", "0.25", "--dtype", "bf16-mixed", "--eval-every", "1000",
                          "--tokenizer", os.path.relpath(lab.init / "tokenizer.model")))
        yield ("pretraining a quarter", SEEDS[0]), pretrained, None
        for seed in lab.seeds:
            yield ("base of a quarter", seed), study_run(
                lab, "run 4", seed, "--init", lab.directory(pretrained) / "model"), lab.judge
            yield ("base", seed), study_run(lab, "run 4", seed), lab.judge


def tell_little_data(lab, got):
    sizes = sorted({key[0] for key in got if isinstance(key[0], int)})
    orders = ("one order", "all permutations")
    rows = [[f"{size:,}", *(cell(got, (size, order)) for order in orders), seeds(got, (size, orders[0]))]
            for size in sizes]
    blocks = [report.text(f"At {lab.steps} steps each, the settings of run 4, on the same validation stories."),
              report.table(["stories", *(f"loss, {order}" for order in orders), "seeds"], rows)]
    if lab.shipped:
        rows = [[name, cell(got, (name,), lambda r: r and r["base_loss"]), cell(got, (name,)),
                 cell(got, (name,), all_met(1), "{:.0%}"), seeds(got, (name,))]
                for name in ("base of a quarter", "base")]
        blocks.append(report.table(["base", "loss before", "loss after", "all of 1 met", "seeds"], rows))
    else:
        blocks.append(report.text("A base of a quarter of one pass: only with the base that ships, which can be made "
                                  "again."))
    findings = [
        Finding("too little data holds it back", "loss of 500 stories - of 13,000, one order",
                paired(got, (500, orders[0]), (13000, orders[0]), loss)),
        Finding("permuting constraints helps", "loss of 500 stories, one order - all permutations",
                paired(got, (500, orders[0]), (500, orders[1]), loss)),
        Finding("… and of 13,000", "the same", paired(got, (13000, orders[0]), (13000, orders[1]), loss)),
    ]
    if lab.shipped:
        findings.append(Finding("an undertrained base holds it back", "loss from a quarter's base - from the base",
                                paired(got, ("base of a quarter",), ("base",), loss)))
    return blocks, findings


# ---- 4: replay ----

def replay_runs(lab):
    stories = []
    if lab.data:
        path = Path(lab.data) / "stories.jsonl"
        if not path.is_file():
            return
        stories = ["--replay-data", path]
    for seed in lab.seeds:
        for share in REPLAYS if seed == SEEDS[0] else SEEDED_REPLAYS:
            flags = ["--replay", f"{share:g}", *stories] if share else []
            yield (share, seed), study_run(lab, "run 4", seed, *flags), lab.judge
        yield ("twice the rows", seed), study_run(lab, "run 4", seed, "--grad-accum", 2), lab.judge


def tell_replay(lab, got):
    if not got:
        return [report.text("Not run: with --data it needs plain stories, stories.jsonl in that directory.")], []
    before = mean(got, (0,), of_eval("base_nll"))
    table, lines = measured(got, "replay")
    blocks = [
        report.text("The settings of run 4; whole plain stories are added so that they are this share of supervised "
                    "tokens, SFT rows per step unchanged. twice the rows: as many tokens as with 0.5, without replay."
                    + (f" Loss on plain stories before fine-tuning: {before:.4f}." if before else "")),
        table,
        report.figure(lab.out / "replay.png", "Replay: what is won on plain stories, what instructions pay",
                      functools.partial(report.lines, lines, "replay, share of supervised tokens",
                                        "loss (nats per token)")),
    ]
    findings = [
        Finding("coherence drops after SFT", "loss on plain stories, after - before",
                [x - before for x in single(got, (0,), plain_loss)]),
        Finding("replay (0.5) buys it back", "loss on plain stories, without - with",
                paired(got, (0,), (0.5,), plain_loss)),
        Finding("(ours) replay (0.5) costs instructions", "validation loss, with - without",
                paired(got, (0.5,), (0,), loss)),
        Finding("(ours) the same tokens as instructions are worth more", "validation loss, replay 0.5 - twice the rows",
                paired(got, (0.5,), ("twice the rows",), loss)),
        Finding("(ours) replay (0.5) lowers obedience", "all of 1 met, without - with",
                paired(got, (0,), (0.5,), all_met(1))),
    ]
    return blocks, findings


# ---- 5: weight averaging ----

def averages(lab):
    for seed in lab.seeds:
        tuned = study_run(lab, "run 4", seed)
        yield ("tuned", seed), tuned, lab.judge
        yield ("ema", seed), Mix(tuned, "ema"), lab.judge
    tuned = study_run(lab, "run 4", SEEDS[0])
    for share in MIXES:
        yield (share, SEEDS[0]), Mix(tuned, share), lab.judge


def tell_averages(lab, got):
    table, lines = measured(got, "share")
    blocks = [
        report.text("base + share x (run 4 - base), seed 1; ema: the moving average of run 4's weights over a tenth of "
                    "the steps. No further training."),
        table,
        report.figure(lab.out / "averages.png", "Between the base (0) and run 4 (1)",
                      functools.partial(report.lines, lines, "share of fine-tuning", "loss (nats per token)")),
    ]
    findings = [
        Finding("(ours) a moving average of the weights ends lower", "validation loss, last weights - average",
                paired(got, ("tuned",), ("ema",), val_loss)),
        Finding("(ours) … and forgets less", "loss on plain stories, last weights - average",
                paired(got, ("tuned",), ("ema",), plain_loss)),
    ]
    return blocks, findings


# ---- 6: the leak ----

def leaky(lab, side):
    """Permuted, then split at random, as the study did: siblings of a validation row are in training."""
    rows = arranged(lab, LEAKY_STORIES, "all permutations")
    random.Random(LEAKY_STORIES).shuffle(rows)
    n = max(1, int(LEAKY_FRACTION * len(rows)))
    return rows[:n] if side == "val" else rows[n:]


def leaks(lab):
    lr, dtype, rate = STUDY["run 4"]
    for seed in lab.seeds:
        run = lab.sft(lr, dtype, seed, *decay(rate), "--val-data", lab.file("leaky-val", lambda: leaky(lab, "val")),
                      data=lab.file("leaky-train", lambda: leaky(lab, "train")))
        yield ("leak", seed), run, lab.loss_by_story


def tell_leaks(lab, got):
    def by_story(result):
        return result and result.get("loss_by_story")

    rows = [["rows of stories that are in training, too", cell(got, ("leak",)), seeds(got, ("leak",))],
            ["rows of other stories", cell(got, ("leak",), by_story), seeds(got, ("leak",), by_story)]]
    blocks = [report.text(f"{LEAKY_STORIES} stories, all permutations of their constraints; a run has two validation "
                          "sets."),
              report.table(["validated on", "validation loss", "seeds"], rows)]
    return blocks, [Finding("(ours) the study's validation loss is too low", "loss by story - leaky", [
        r["loss_by_story"] - r["loss"] for r in got.values() if "loss_by_story" in r])]


# ---- all of it ----

EXPERIMENTS = {  # in the order in which they are run: what the others build on comes first
    1: ("The four runs, and precision", four_runs, tell_four_runs),
    2: ("LoRA", lora_runs, tell_lora),
    3: ("Constraints", constraint_runs, tell_constraints),
    4: ("Replay", replay_runs, tell_replay),
    5: ("Weight averaging", averages, tell_averages),
    6: ("The leak", leaks, tell_leaks),
    0: ("How little data is enough?", little_data, tell_little_data),
}


def work(lab, numbers, evaluate=True):
    """Do what is not done yet; evaluate=False: train only."""
    jobs = {}  # (run, what to do after it) -> its first name
    for number in numbers:
        for key, run, after in EXPERIMENTS[number][1](lab):
            jobs.setdefault((run, after if evaluate else None), f"{number}: {', '.join(map(str, key))}")
    done = {job for job in jobs if lab.is_done(*job)}
    with tqdm(total=len(jobs), initial=len(done), unit="run", dynamic_ncols=True) as bar:
        for (run, after), name in jobs.items():
            if (run, after) in done:
                continue
            bar.set_postfix_str(name)
            failed = isinstance(run, Run) and lab.train(run)["loss"] is None
            if after and not failed:
                after(run)
            bar.update()


def results(lab, number):
    """{key: result} of the finished runs of an experiment."""
    found = {}
    for key, run, _ in EXPERIMENTS[number][1](lab):
        result = lab.result(run)
        if result:
            found[key] = result | {"run": run} | ({"log": lab.log(run)} if isinstance(run, Run) else {})
    return found


def write_csv(path, everything):
    """runs.csv: a line a run and experiment."""
    columns = ["experiment", "key", "seed", "command", "base_loss", "loss", "seconds", "tokens_per_s", "unchanged",
               "loss_by_story", "val_loss", "plain_nll", "base_nll", "gen_nll", "rep4", "distinct2", "eos_rate", "lcs",
               "all_of_1", "all_of_2", "all_of_3", "all_of_4"]
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, columns, extrasaction="ignore")
        writer.writeheader()
        for number, got in everything.items():
            for (*key, seed), r in got.items():
                met = {f"all_of_{k}": all_met(k)(r) for k in (1, 2, 3, 4)}
                command = r["run"].command() if isinstance(r["run"], Run) else f"mix {r['run'].share}"
                writer.writerow(r.get("eval", {}) | r | met | {
                    "experiment": number, "key": " ".join(map(str, key)), "seed": seed, "command": command})


def write_report(lab, numbers, command):
    everything = {number: results(lab, number) for number in sorted(numbers)}
    planned = {run for number in numbers for _, run, _ in EXPERIMENTS[number][1](lab) if isinstance(run, Run)}
    trained = {r["run"]: r for got in everything.values() for r in got.values() if isinstance(r["run"], Run)}
    facts = defaultdict(set)
    for r in trained.values():
        facts["torch"].add(r["torch"])
        facts["device"].add(r["device"])
    blocks = [report.heading("The study's experiments, made again", 1), report.text(
        f"`{command}`: {len(trained)} of {len(planned)} runs of {lab.steps} steps from {lab.init.name}, "
        f"{'the built-in corpus' if not lab.data else lab.data}; torch {', '.join(sorted(facts['torch']))}, "
        f"{', '.join(sorted(facts['device']))}; training took {sum(r['seconds'] for r in trained.values()) / 3600:.1f} "
        f"hours in all. Losses are in nats per token; in brackets the least and the most over the seeds.")]
    findings = []
    for number, got in everything.items():
        title, _, tell = EXPERIMENTS[number]
        blocks.append(report.heading(f"{number}. {title}"))
        if not got and number != 4:
            blocks.append(report.text("Not run yet."))
            continue
        part, found = tell(lab, got)
        blocks += part
        findings += found
    blocks += [report.heading("Verdicts"), report.text(
        "Paired differences over seeds; above 0 agrees with the finding. holds: their 95% t interval lies above 0; "
        "does not hold: below 0; else, or with fewer than three seeds, undecided. (ours): not of the study."),
        report.table(["finding", "measured", "mean and 95% interval", "n", "verdict"], [f.row() for f in findings])]
    lab.out.mkdir(parents=True, exist_ok=True)
    write_csv(lab.out / "runs.csv", everything)
    report.write(blocks, lab.out)


def numbers(text):
    chosen = [int(n) if n.strip().isdigit() else n for n in text.split(",")]
    unknown = [n for n in chosen if n not in EXPERIMENTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no experiment {unknown[0]} (there are: 0 to {max(EXPERIMENTS)})")
    return [n for n in EXPERIMENTS if n in chosen]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="The study's experiments, made again: one command, one report.")
    parser.error = fail
    flag = parser.add_argument
    flag("experiment", nargs="?", choices=["lora-sweep"], help="LoRA of several ranks and targets against full "
                                                              "fine-tuning, instead of the experiments")
    flag("--quick", action="store_true", help="experiments 1 and 2, one seed, 60 steps, losses only")
    flag("--only", type=numbers, help="these experiments, such as 1,4 (default: 0 to 6)")
    flag("--init", help="model directory to start from (default: the base that ships)")
    flag("--data", help="as train_sft.py's (default: the built-in corpus); with stories.jsonl in it for experiment 4")
    flag("--preset", choices=PRESETS, help="geometry of --init; microstories: with the study's batches of 32")
    flag("--out", type=Path, default=Path("out/reproduce"), help="(default: %(default)s)")
    flag("--steps", type=positive(int), help="optimizer steps of each run (default: 150; 60 with --quick)")
    flag("--no-evaluate", dest="evaluate", action="store_false", help="lora-sweep: losses only")
    args = parser.parse_args(argv)
    if args.preset and not (args.init and args.data):
        parser.error("--preset names the geometry of your own base and data: it needs --init and --data")
    if args.quick and args.only:
        parser.error("--quick and --only: choose one")
    return args


def main(argv=None):
    args = parse_args(argv)
    chosen = [1, 2] if args.quick else args.only or list(EXPERIMENTS)
    try:
        settings = []
        if args.preset:
            preset, own = PRESETS[args.preset], gpt_config(Path(args.init) / "config.json")
            for name in ("n_layer", "n_embd", "n_head", "head_size", "intermediate_size"):
                if getattr(preset, name) != getattr(own, name):
                    raise ValueError(f"--preset {args.preset}: {args.init} has {name} {getattr(own, name)}, not "
                                     f"{getattr(preset, name)}")
            settings = ["--batch-size", 32] if args.preset == "microstories" else []
        lab = Lab(args.init, args.data, args.out, args.steps or (60 if args.quick else 150), settings)
        if args.experiment:
            sweep.sweep(lab, SEEDS, args.evaluate)
            print((lab.out / "lora-sweep.md").read_text(encoding="utf-8"), end="")
            return
        lab.seeds = SEEDS[:1] if args.quick else SEEDS
        try:
            work(lab, chosen, evaluate=not args.quick)
        finally:  # also of what there is when it is interrupted
            write_report(lab, chosen, " ".join(["python reproduce.py", *(sys.argv[1:] if argv is None else argv)]))
    except (ValueError, OSError) as e:
        fail(e)
    print(f"{lab.out / 'report.md'}, {lab.out / 'report.html'}, {lab.out / 'runs.csv'}")


if __name__ == "__main__":
    from reproduce import main
    main()
