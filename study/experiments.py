"""The study's experiments.

An experiment is two functions: `plan_…` yields what it needs, as (name, seed, run, measurement or None), and
`report_…` makes blocks of the report, and findings, of the results there are. A plan may depend on results that are
there already: it is asked again after each run.
"""
import functools
import itertools
import math
import os
import random
from dataclasses import dataclass
from pathlib import Path

from common import new_directory

import torch.nn.functional as F

import figures
from checkpoint import gpt_config, load_model, save_model
from constraints import KEYS, parse, permutations, render
from data import generate
from data.builtin import SEEDS as BUILTIN_SEEDS
from records import story_hash
from study import report, runs
from study.findings import (
    MARGIN,
    MORE_SEEDS,
    SEEDS,
    Finding,
    Results,
    mean_and_range,
    measures_of,
    measures_table,
    seeds_needed,
)
from study.runs import Mix, Run
from study.spread import spread


def collect(lab, number):
    """-> the Results of an experiment, with more measures than the lab knows."""
    results = Results()
    for name, seed, run, _ in EXPERIMENTS[number].plan(lab):
        if known := lab.result(run):
            results[name, seed] = known | known.get("eval", {}) | measures_of(known) | {"run": run}
    return results


def more_seeds(lab):
    """For comparisons that the lab's seeds leave undecided; none where it is a quick look at one seed."""
    return MORE_SEEDS if len(lab.seeds) > 1 else ()


def draw_losses(results, path, xlabel):
    """Validation loss and loss on plain stories, over the names that are numbers."""
    numbers = sorted({name for name, _ in results if not isinstance(name, str)})
    report.draw_lines({title: [(x, results.mean(x, measure)) for x in numbers]
                       for title, measure in (("validation loss", "val_loss"), ("loss on plain stories", "plain_nll"))},
                      path, xlabel, "loss (nats per token)")


def draw_curves(lab, labelled, name, caption):
    """The training curves of these runs -> the block of the report. Where some were made on another machine, which has
    their logs, the figure is the one that was drawn there."""
    curves = [(label, lab.log(run)) for label, run in labelled]
    if all(log for _, log in curves):
        figures.loss_curves(curves, lab.out / name)
    return report.figure(lab.out / name, caption)


# ---- 1: the four runs ----

STUDY = {"run 1": (1e-4, "bf16-true", 1), "run 2": (5e-4, "bf16-true", 1), "run 3": (5e-4, "bf16-true", 2),
         "run 4": (5e-4, "bf16-mixed", 2)}  # peak learning rate, precision, --decay-rate
LRS, SEEDED_LRS = (5e-5, 1e-4, 5e-4, 2e-3), (1e-4, 5e-4)  # of each precision; those with all seeds
PRECISIONS = ("bf16-true", "bf16-mixed", "stochastic", "Kahan")


def decay(rate):
    return [] if rate == 1 else ["--decay-rate", rate]


def study_run(lab, name, seed, *more, **others):
    lr, dtype, rate = STUDY[name]
    return lab.sft(lr, dtype, seed, *decay(rate), *more, **others)


def precision_run(lab, precision, lr, seed):
    if precision in ("stochastic", "Kahan"):
        return lab.sft(lr, "bf16-true", seed, optimizer=f"{precision.capitalize()}AdamW")
    return lab.sft(lr, precision, seed)


def plan_four_runs(lab):
    for seed in lab.seeds:
        for name in STUDY:
            yield name, seed, study_run(lab, name, seed), "eval"
    for seed in lab.seeds:
        for precision in PRECISIONS:
            for lr in LRS if seed == SEEDS[0] and len(lab.seeds) > 1 else SEEDED_LRS:
                yield ((precision, lr), seed, precision_run(lab, precision, lr, seed),
                       "eval" if precision == "bf16-mixed" else None)
    for seed in more_seeds(lab):  # does a faster fall do better?
        for name in ("run 2", "run 3", "run 4"):
            yield name, seed, study_run(lab, name, seed), "eval"
        yield ("bf16-mixed", 5e-4), seed, precision_run(lab, "bf16-mixed", 5e-4, seed), "eval"


def report_four_runs(lab, results):
    labels = {name: f"{name}: lr {lr:g}, {dtype}, decay {rate}" for name, (lr, dtype, rate) in STUDY.items()} | {
        ("bf16-mixed", lr): f"lr {lr:g}, bf16-mixed, decay 1" for lr in LRS}
    rows = [[labels[name], results.cell(name), results.cell(name, "middle"), results.count(name)] for name in STUDY]
    before = next((result["base_nll"] for result in results.values() if "base_nll" in result), None)
    curves = draw_curves(
        lab, [(labels[name], results[name, SEEDS[0]]["run"]) for name in STUDY if (name, SEEDS[0]) in results],
        "four-runs.png", "The study's four runs, seed 1: training loss (pale: each step), and the learning rate")
    grid = [[f"{lr:g}", *(results.cell((p, lr)) for p in PRECISIONS),
             *(results.cell((p, lr), "unchanged", "{:.1%}") for p in PRECISIONS)] for lr in LRS]
    report.draw_lines({f"{p}, decay 1": [(lr, results.mean((p, lr))) for lr in LRS] for p in PRECISIONS},
                      lab.out / "precision.png", "peak learning rate", "validation loss (nats per token)", log_x=True)
    blocks = [
        report.table(["run", "validation loss", "training loss, middle tenth", "seeds"], rows),
        curves,
        "What they obey, and what they forget (losses in float32" + (
            f"; plain stories before fine-tuning: {before:.4f}" if before else "") + "):",
        measures_table(results, "run", labels),
        "Precision and learning rate, decay 1. stochastic: bf16-true, its weights rounded stochastically; Kahan: "
        "bf16-true, with what rounding cuts off kept in a second bfloat16. Unchanged: the share of weights that a step "
        "leaves exactly as they were, mean over all steps.",
        report.table(["lr", *(f"loss, {p}" for p in PRECISIONS), *(f"unchanged, {p}" for p in PRECISIONS)], grid),
        report.figure(lab.out / "precision.png", "Validation loss over the learning rate, by precision"),
    ]
    four = [[results.get(((p, lr), seed), {}).get("loss") for p in ("bf16-true", "bf16-mixed") for lr in SEEDED_LRS]
            for seed in SEEDS]
    best = {p: min(SEEDED_LRS, key=lambda lr: results.mean((p, lr)) or math.inf) for p in PRECISIONS}
    found = [
        Finding("lr 5e-4 beats 1e-4", "loss of run 1 - run 2 (bf16-true)", results.differences("run 1", "run 2")),
        Finding("lr 5e-4 obeys better than 1e-4", "everything met, run 2 - run 1",
                results.differences("run 2", "run 1", "everything"), share=True),
        *(Finding("(ours) " * (precision != "bf16-mixed") + f"lr 5e-4 beats 1e-4 with {precision}, too",
                  "loss at 1e-4 - at 5e-4, decay 1", results.differences((precision, 1e-4), (precision, 5e-4)))
          for precision in PRECISIONS[1:]),
        Finding("lr 5e-4 obeys better than 1e-4 with bf16-mixed, too", "everything met at 5e-4 - at 1e-4, decay 1",
                results.differences(("bf16-mixed", 5e-4), ("bf16-mixed", 1e-4), "everything"), share=True),
        Finding("(ours) part of it is that bf16-true rounds updates away",
                "gain of 5e-4 over 1e-4 with bf16-true - with bf16-mixed",
                [(low - high) - (mixed_low - mixed_high) for low, high, mixed_low, mixed_high in four
                 if None not in (low, high, mixed_low, mixed_high)]),
        Finding("a faster fall converges faster", "training loss in the middle, run 2 - run 3",
                results.differences("run 2", "run 3", "middle")),
        Finding("a faster fall ends lower", "loss of run 2 - run 3", results.differences("run 2", "run 3")),
        Finding("a faster fall obeys better", "everything met, run 3 - run 2",
                results.differences("run 3", "run 2", "everything"), share=True),
        Finding("a faster fall obeys better with bf16-mixed, too", "everything met, run 4 - lr 5e-4, decay 1",
                results.differences("run 4", ("bf16-mixed", 5e-4), "everything"), share=True),
        Finding("bf16-mixed ends lower than bf16-true", "loss of run 3 - run 4",
                results.differences("run 3", "run 4")),
        Finding("bf16-mixed obeys better than bf16-true", "everything met, run 4 - run 3",
                results.differences("run 4", "run 3", "everything"), share=True),
        Finding("bf16-mixed ends lower without the faster fall, too", "loss at 5e-4, decay 1",
                results.differences(("bf16-true", 5e-4), ("bf16-mixed", 5e-4))),
        Finding("bf16-mixed ends lower, each at the better of the two rates",
                f"loss at {best['bf16-true']:g} - at {best['bf16-mixed']:g}, decay 1",
                results.differences(("bf16-true", best["bf16-true"]), ("bf16-mixed", best["bf16-mixed"]))),
        Finding("(ours) stochastic rounding ends lower than bf16-true", "loss at 5e-4, decay 1",
                results.differences(("bf16-true", 5e-4), ("stochastic", 5e-4))),
        Finding("(ours) bf16-mixed ends lower than stochastic rounding", "loss at 5e-4, decay 1",
                results.differences(("stochastic", 5e-4), ("bf16-mixed", 5e-4))),
        Finding("(ours) bf16-mixed ends lower than Kahan summation", "loss at 5e-4, decay 1",
                results.differences(("Kahan", 5e-4), ("bf16-mixed", 5e-4))),
    ]
    return blocks, found


# ---- 7: what LoRA needs to reach full fine-tuning ----

METHODS = {  # rank and targets
    "full fine-tuning": None, "LoRA r=8, q+v": (8, "q_proj,v_proj"),
    "LoRA r=8, study": (8, "study"), "LoRA r=256, study": (256, "study"),
    "LoRA r=8, all-linear": (8, "all-linear"), "LoRA r=64, all-linear": (64, "all-linear"),
    "LoRA r=8, all-linear and embedding": (8, "all-linear,embed_tokens"),
    "LoRA r=64, all-linear and embedding": (64, "all-linear,embed_tokens")}
SWEEP_DTYPE = "bf16-mixed"
FULL_LRS, LORA_LRS = (1e-4, 5e-4, 2e-3), (2e-3, 5e-3)
FACTOR, WIDENED = 2.5, 2  # a best learning rate at the edge of its grid: further ones, so many times at most


def adapting(r, targets):
    """The command without its other flags; alpha is 2r, as in the study."""
    return "lora.py", "--r", r, "--alpha", 2 * r, "--targets", targets


def sweep_run(lab, method, lr, seed):
    program = adapting(*METHODS[method]) if METHODS[method] else ("train_sft.py",)
    return lab.sft(lr, SWEEP_DTYPE, seed, program=program)


def learning_rates(lab, method):
    """-> (the method's learning rates, with further ones where the best is at the edge; the best of them, None as long
    as some of them are not run)."""
    grid = list(LORA_LRS if METHODS[method] else FULL_LRS)
    for further in range(WIDENED + 1):
        losses = {lr: lab.loss(sweep_run(lab, method, lr, SEEDS[0])) for lr in grid}
        if None in losses.values():
            return grid, None
        best = min(grid, key=losses.get)
        at_edge = {max(grid): best * FACTOR, min(grid): best / FACTOR}
        if best not in at_edge or further == WIDENED:
            break
        grid.append(at_edge[best])
    return grid, best


def best_setups(lab):
    """{"best full": (method, lr), "best LoRA": (method, lr)}: what ends lowest, of the methods whose learning rates are
    all run; {} before some of both are."""
    found = {"best full": [], "best LoRA": []}
    for method in METHODS:
        if lr := learning_rates(lab, method)[1]:
            kind = "best LoRA" if METHODS[method] else "best full"
            found[kind].append((lab.loss(sweep_run(lab, method, lr, SEEDS[0])), method, lr))
    return {kind: min(some)[1:] for kind, some in found.items()} if all(found.values()) else {}


def plan_sweep(lab):
    """All seeds at the best learning rate only; there the models are judged."""
    for method in METHODS:
        grid, best = learning_rates(lab, method)
        for lr in grid:
            yield (method, lr), SEEDS[0], sweep_run(lab, method, lr, SEEDS[0]), "eval" if lr == best else None
        for seed in lab.seeds[1:] if best else ():
            yield (method, best), seed, sweep_run(lab, method, best, seed), "eval"


def report_sweep(lab, results):
    rows, labels, lines, full = [], {}, {}, None
    for method in METHODS:
        grid, best = learning_rates(lab, method)
        tried = {lr: loss for lr in grid
                 if (loss := results.get(((method, lr), SEEDS[0]), {}).get("loss")) is not None}
        lines[method] = sorted(tried.items())
        if not tried:
            continue
        lr = best or min(tried, key=tried.get)
        name = (method, lr)
        labels[name] = f"{method}, lr {lr:g}"
        full = full or name  # the first of the methods
        losses = [[results.get((of, seed), {}).get("loss") for of in (name, full)] for seed in SEEDS]
        base = next(iter(results.values()))["base_loss"]
        recovered = [(base - loss) / (base - best) for loss, best in losses if None not in (loss, best)]
        rows.append([method, f"{lr:g}" + ("" if best else f" of {len(tried)} tried"), results.count(name),
                     f"{results.mean(name):.4f}", f"{results.mean(name) / results.mean(full) - 1:.1%}",
                     mean_and_range(recovered, "{:.1%}"), results.cell(name, "everything", "{:.1%}"),
                     results.cell(name, "plain_nll")])
    ends = [lr for points in lines.values() for lr, _ in points[:1] + points[-1:]]
    report.draw_lines(lines | {"base": [(min(ends), base), (max(ends), base)] if ends else []},
                      lab.out / "lora-sweep.png", "peak learning rate", "validation loss (nats per token)", log_x=True)
    report.draw_lines({label: [(results.mean(name, "plain_nll"), results.mean(name, "everything"))]
                       for name, label in labels.items() if results.mean(name, "plain_nll")},
                      lab.out / "learn-forget.png", "loss on plain stories (nats per token)", "everything met")
    return [
        f"{SWEEP_DTYPE}, decay 1. Recovered: the share of full fine-tuning's improvement, seed by seed. The best "
        "learning rate is chosen by the loss, on seed 1; of a method whose rates are not all run, the best so far.",
        report.table(["method", "best lr", "seeds", "validation loss", "above full", "recovered", "everything met",
                      "loss on plain stories"], rows),
        report.figure(lab.out / "lora-sweep.png", "Validation loss over the learning rate"),
        report.figure(lab.out / "learn-forget.png", "Learnt (up) against forgotten (right), each at its best learning "
                                                    "rate, means of the seeds"),
    ], []


# ---- 2: LoRA ----

STUDY_RANKS = (8, 256)  # alpha is twice as large


def plan_lora(lab):
    """At the study's learning rate, precision and decay (run 4's), and the best set-ups of experiment 7."""
    for seed in lab.seeds:
        yield "full", seed, study_run(lab, "run 4", seed), "eval"
        for r in STUDY_RANKS:
            yield f"LoRA {r}_{2 * r}", seed, study_run(lab, "run 4", seed, program=adapting(r, "study")), "eval"
    for seed in (*lab.seeds, *more_seeds(lab)):  # are they alike?
        for name, (method, lr) in best_setups(lab).items():
            yield name, seed, sweep_run(lab, method, lr, seed), "eval"


def report_lora(lab, results):
    small, large = (f"LoRA {r}_{2 * r}" for r in STUDY_RANKS)
    lr, dtype, rate = STUDY["run 4"]
    labels = {name: f"{name}, lr {lr:g}, {dtype}, decay {rate}" for name in ("full", small, large)}
    for name, (method, best_lr) in best_setups(lab).items():
        labels[name] = f"{method}, lr {best_lr:g}, {SWEEP_DTYPE}, decay 1"
    rows = [[label, results.cell(name), results.cell(name, "tokens_per_s", "{:,.0f}"), results.count(name)]
            for name, label in labels.items()]
    curves = draw_curves(
        lab, [(label, results[name, SEEDS[0]]["run"]) for name, label in labels.items() if (name, SEEDS[0]) in results],
        "lora.png", "Full fine-tuning and LoRA, seed 1; the study's targets, and the best of experiment 7")
    blocks = [
        report.table(["run", "validation loss", "tokens/s", "seeds"], rows),
        curves,
        measures_table(results, "run", labels),
    ]
    usual = results.mean("full", "tokens_per_s")
    found = [
        Finding(f"{small} ends above full fine-tuning", "loss, LoRA - full", results.differences(small, "full")),
        Finding(f"{small} obeys worse than full", "everything met, full - LoRA",
                results.differences("full", small, "everything"), share=True),
        Finding(f"{large} is better than {small.split()[1]}", f"loss, {small.split()[1]} - {large.split()[1]}",
                results.differences(small, large)),
        Finding(f"{large} still ends above full", "loss, LoRA - full", results.differences(large, "full")),
        Finding(f"{large} obeys worse than full", "everything met, full - LoRA",
                results.differences("full", large, "everything"), share=True),
        Finding(f"{large} is slower than full", "tokens/s lost, as a share of full's",
                [lost / usual for lost in results.differences("full", large, "tokens_per_s")]),
    ]
    if "best LoRA" in labels:
        obeyed = results.differences("best full", "best LoRA", "everything")
        found += [
            Finding("(ours) the best LoRA still ends above full at the study's settings", "loss, LoRA - full",
                    results.differences("best LoRA", "full")),
            Finding("(ours) the best LoRA ends above full fine-tuning at its best", "loss, LoRA - full",
                    results.differences("best LoRA", "best full")),
            Finding(f"(ours) the best LoRA obeys as well, within {MARGIN * 100:g} points",
                    "everything met, best full - best LoRA", obeyed, share=True, within=MARGIN),
            Finding("(ours) the best LoRA forgets less", "loss on plain stories, best full - best LoRA",
                    results.differences("best full", "best LoRA", "plain_nll")),
        ]
        if needed := seeds_needed(obeyed):
            blocks.append(f"For an interval of +-{MARGIN * 100:g} points between what the best LoRA and full "
                          f"fine-tuning meet, {needed} seeds would be needed that differ as these do.")
    else:
        blocks.append("The best set-ups: experiment 7 has not come as far yet.")
    return blocks, found


# ---- 3: constraints, of the runs of 1 and 2 that are judged ----

FAR = 1.2  # times the lowest loss: runs that end higher would squeeze all others together in a figure


def plan_constraints(lab):
    yield from (job for plan in (plan_four_runs, plan_lora) for job in plan(lab) if job[-1])
    for seed in (*lab.seeds, *more_seeds(lab)):
        yield "run 4", seed, study_run(lab, "run 4", seed), "combined"


def draw_obedience(lab):
    """What every judged run of experiments 1, 7 and 2 meets, over its loss."""
    judged = {result["run"]: (name, result) for number in (2, 7, 1)
              for (name, _), result in collect(lab, number).items() if "eval" in result}
    lowest = min((result["val_loss"] for _, result in judged.values()), default=0)
    points = {}
    for name, result in judged.values():
        if result["val_loss"] < FAR * lowest:
            label = name if isinstance(name, str) else f"{name[0]}, lr {name[1]:g}"
            points.setdefault(label, []).append((result["val_loss"], result["everything"]))
    report.draw_lines(points, lab.out / "loss-obedience.png", "validation loss (nats per token)", "everything met",
                      joined=False)


def report_constraints(lab, results):
    draw_obedience(lab)
    firsts = {}  # run of the first seed -> its first name
    for (name, seed), result in results.items():
        if seed == SEEDS[0] and "eval" in result and isinstance(name, str):
            firsts.setdefault(result["run"], name)
    rows = [[name, *(results.cell(name, f"all_of_{k}", "{:.0%}") for k in (1, 2, 3, 4)),
             results.count(name, "all_of_1")] for name in firsts.values()]
    blocks = [
        "All constraints met, by their number; one story an instruction, temperature 0.2, instructions of generated "
        "stories that are held out.",
        report.table(["run", "1", "2", "3", "4", "seeds"], rows),
        report.figure(lab.out / "loss-obedience.png", "A point a run: what it meets over how low it ends; without runs "
                                                      f"that end above {FAR:g} times the lowest loss"),
    ]
    pairs = list(filter(None, results.per_seed("run 4", "combined")))  # {}: no instruction has two constraints
    if pairs:
        kinds = [name for name in pairs[0] if all(name in pair for pair in pairs)]
        blocks += [
            "Run 4, each instruction with two constraints or more as it is (together) and with each of its constraints "
            "alone; for all of k, alone is the product of the single outcomes. Paired by instruction, in points; mean, "
            "and the least and the most of the seeds.",
            report.table(["", "n", "together", "alone", "difference", "seeds"], [[
                name, pairs[0][name]["n"], *(mean_and_range([pair[name][side] for pair in pairs], "{:.1%}")
                                             for side in ("together", "alone")),
                mean_and_range([pair[name]["rate"] * 100 for pair in pairs], "{:+.1f}"), len(pairs)]
                for name in kinds]),
        ]
    if firsts:
        blocks.append(report.stories({name: results[name, SEEDS[0]]["cases"] for name in firsts.values()}))
    found = [
        Finding("single constraints mostly work", "all of 1 met in run 4, less one half",
                [rate - 0.5 for rate in results.per_seed("run 4", "all_of_1")], share=True),
        Finding("combined ones work poorly", "one half, less all of 2, 3, 4 met in run 4",
                [0.5 - rate for rate in results.per_seed("run 4", "all_of_more")], share=True),
        Finding("coherence drops after SFT", "run 4: loss on plain stories, after - before",
                [result["plain_nll"] - result["base_nll"] for (name, _), result in results.items()
                 if name == "run 4" and "eval" in result]),
        *(Finding(f"(ours) {k} at once are harder than their parts", "run 4: all met, as expected from each "
                  "alone - together", [-pair[f"all of {k}"]["rate"] for pair in pairs if f"all of {k}" in pair],
                  share=True) for k in (2, 3, 4)),
    ]
    return blocks, found


# ---- 0: how little data is enough, how much pretraining? ----

SIZES = (500, 2000, 13000)  # stories
FIXED, DRAWN, ALL = ORDERS = ("fixed order", "drawn order", "all permutations")  # of an instruction's lines


def data_run(lab, size, order, seed):
    return study_run(lab, "run 4", seed, "--val-data", lab.file("val", lambda: lab.pairs[1]),
                     data=lab.file(f"{size}-{order}", lambda: arranged(lab, size, order)))


@functools.cache
def pool(lab):
    """Instruction pairs of training stories, one of each story."""
    pairs = lab.pairs[0]
    if not lab.data:
        stories = list(generate.stories(max(SIZES), BUILTIN_SEEDS["fine-tuning"]))
        held = {story_hash(story) for _, story in lab.pairs[1]}
        pairs = [(r["instruction"], r["output"]) for r in generate.instructions(stories, BUILTIN_SEEDS["fine-tuning"])
                 if story_hash(r["output"]) not in held]
    return list({story_hash(story): (instruction, story) for instruction, story in reversed(pairs)}.values())[::-1]


def arranged(lab, size, order):
    """pool's first pairs, their lines in the order drawn for each, or in that of KEYS, or each in all orders."""
    pairs = pool(lab)[:size]
    if order == DRAWN:
        return pairs
    parsed = [(parse(instruction)[0], story) for instruction, story in pairs]
    if order == FIXED:
        return [(render({key: c[key] for key in KEYS if key in c}), story) for c, story in parsed]
    return [(render(permuted), story) for c, story in parsed for permuted in permutations(c)]


def plan_little_data(lab):
    sizes = SIZES if not lab.data else [n for n in SIZES if n <= len(pool(lab))] or [len(pool(lab))]
    for seed in lab.seeds:
        for size in sizes:
            for order in ORDERS if size == sizes[-1] else (DRAWN, ALL):
                yield (size, order), seed, data_run(lab, size, order, seed), "eval"
        for order in ORDERS:
            yield (sizes[-1], order), seed, data_run(lab, sizes[-1], order, seed), "orders"
    if lab.shipped:
        pretrained = Run(("pretrain.py", "--epochs", "0.25", "--dtype", "bf16-mixed", "--eval-every", "1000",
                          "--tokenizer", os.path.relpath(lab.init / "tokenizer.model")))
        yield "pretraining a quarter", SEEDS[0], pretrained, None
        for seed in lab.seeds:
            yield "base of a quarter", seed, study_run(
                lab, "run 4", seed, "--init", lab.model(pretrained)), "eval"
            yield "base", seed, study_run(lab, "run 4", seed), "eval"


def report_little_data(lab, results):
    sizes = sorted({name[0] for name, _ in results if isinstance(name, tuple)})
    rows = [[f"{size:,}", *(results.cell((size, order)) for order in ORDERS), results.count((size, DRAWN))]
            for size in sizes]
    labels = {(size, order): f"{size:,} stories, {order}" for size in sizes for order in ORDERS}
    largest = [(sizes[-1], order) for order in ORDERS] if sizes else []
    ordered = [[labels[name], *(results.cell(name, f"orders_{share}", "{:.1%}") for share in ("met", "every", "some")),
                results.count(name, "orders_met")] for name in largest]
    blocks = [f"At {lab.steps} steps each, the settings of run 4, on the same validation stories.",
              report.table(["stories", *(f"loss, {order}" for order in ORDERS), "seeds"], rows),
              measures_table(results, "data", labels),
              f"{runs.ORDERED} instructions of two constraints or more, their lines in up to {runs.ORDERS} orders:",
              report.table(["data", "met, mean", "met in every order", "in one at least", "seeds"], ordered)]
    found = [
        Finding("too little data holds it back", "loss of 500 stories - of 13,000, drawn order",
                results.differences((500, DRAWN), (13000, DRAWN))),
        Finding("too little data: it obeys worse", "everything met, 13,000 stories - 500, drawn order",
                results.differences((13000, DRAWN), (500, DRAWN), "everything"), share=True),
        Finding("permuting constraints helps", "loss of 13,000 stories, fixed order - all permutations",
                results.differences((13000, FIXED), (13000, ALL))),
        Finding("permuting constraints: it obeys better", "everything met, 13,000 stories, all permutations - fixed",
                results.differences((13000, ALL), (13000, FIXED), "everything"), share=True),
        Finding("(ours) permuting makes the order of the lines matter less",
                "met in one order, not in every: fixed order - all permutations",
                results.differences((13000, FIXED), (13000, ALL), "order_decides"), share=True),
        Finding("(ours) drawing one order serves as well as permuting", "everything met, 13,000 stories, drawn - all",
                results.differences((13000, DRAWN), (13000, ALL), "everything"), share=True, within=MARGIN),
        Finding("(ours) with few stories, too", "everything met, 500 stories, drawn - all",
                results.differences((500, DRAWN), (500, ALL), "everything"), share=True, within=MARGIN),
    ]
    if lab.shipped:
        rows = [[name, results.cell(name, "base_loss"), results.cell(name), results.cell(name, "all_of_1", "{:.0%}"),
                 results.count(name)] for name in ("base of a quarter", "base")]
        blocks.append(report.table(["base", "loss before", "loss after", "all of 1 met", "seeds"], rows))
        found.append(Finding("an undertrained base holds it back", "loss from a quarter's base - from the base",
                                results.differences("base of a quarter", "base")))
    else:
        blocks.append("A base of a quarter of one pass: only with the base that ships, which can be made again.")
    return blocks, found


# ---- 4: replay ----

REPLAYS, SEEDED_REPLAYS = (0, 0.05, 0.1, 0.25, 0.5), (0, 0.1, 0.5)


def plan_replay(lab):
    stories = []
    if lab.data:
        path = Path(lab.data) / "stories.jsonl"
        if not path.is_file():
            return
        stories = ["--replay-data", path]
    for seed in lab.seeds:
        for share in REPLAYS if seed == SEEDS[0] else SEEDED_REPLAYS:
            flags = ["--replay", f"{share:g}", *stories] if share else []
            yield share, seed, study_run(lab, "run 4", seed, *flags), "eval"
        yield "twice the rows", seed, study_run(lab, "run 4", seed, "--grad-accum", 2), "eval"


def report_replay(lab, results):
    if not results:
        return ["Not run: with --data it needs plain stories, stories.jsonl in that directory."], []
    before = results.mean(0, "base_nll")
    draw_losses(results, lab.out / "replay.png", "replay, share of supervised tokens")
    blocks = [
        "The settings of run 4; whole plain stories are added so that they are this share of supervised tokens, SFT "
        "rows per step unchanged. twice the rows: as many tokens as with 0.5, without replay."
        + (f" Loss on plain stories before fine-tuning: {before:.4f}." if before else ""),
        measures_table(results, "replay"),
        report.figure(lab.out / "replay.png", "Replay: what is won on plain stories, what instructions pay"),
    ]
    found = [
        Finding("replay (0.5) buys it back", "loss on plain stories, without - with",
                results.differences(0, 0.5, "plain_nll")),
        Finding("(ours) replay (0.5) costs instructions", "validation loss, with - without",
                results.differences(0.5, 0)),
        Finding("(ours) the same tokens as instructions are worth more", "validation loss, replay 0.5 - twice the rows",
                results.differences(0.5, "twice the rows")),
        Finding("(ours) replay (0.5) lowers obedience", "everything met, without - with",
                results.differences(0, 0.5, "everything"), share=True),
    ]
    return blocks, found


# ---- 5: weight averaging ----

MIXES = tuple(i / 10 for i in range(11))


def plan_averages(lab):
    for seed in lab.seeds:
        tuned = study_run(lab, "run 4", seed)
        yield "tuned", seed, tuned, "eval"
        yield "ema", seed, Mix(tuned, "ema"), "eval"
    for share in MIXES:
        yield share, SEEDS[0], Mix(study_run(lab, "run 4", SEEDS[0]), share), "eval"


def report_averages(lab, results):
    draw_losses(results, lab.out / "averages.png", "share of fine-tuning")
    blocks = [
        "base + share x (run 4 - base), seed 1; ema: the moving average of run 4's weights over a tenth of the steps. "
        "No further training.",
        measures_table(results, "share"),
        report.figure(lab.out / "averages.png", "Between the base (0) and run 4 (1)"),
    ]
    found = [
        Finding("(ours) a moving average of the weights ends lower", "validation loss, last weights - average",
                results.differences("tuned", "ema", "val_loss")),
        Finding("(ours) a moving average forgets less", "loss on plain stories, last weights - average",
                results.differences("tuned", "ema", "plain_nll")),
    ]
    return blocks, found


# ---- 6: the leak ----

LEAKY_STORIES, LEAKY_FRACTION = 500, 0.05


def leaky(lab, side):
    """Permuted, then split at random, as the study did: siblings of a validation row are in training."""
    rows = arranged(lab, LEAKY_STORIES, ALL)
    random.Random(LEAKY_STORIES).shuffle(rows)
    n = max(1, int(LEAKY_FRACTION * len(rows)))
    return rows[:n] if side == "val" else rows[n:]


def plan_leak(lab):
    for seed in lab.seeds:
        yield "leak", seed, study_run(
            lab, "run 4", seed, "--val-data", lab.file("leaky-val", lambda: leaky(lab, "val")),
            data=lab.file("leaky-train", lambda: leaky(lab, "train"))), "loss_by_story"


def report_leak(lab, results):
    rows = [["rows of stories that are in training, too", results.cell("leak"), results.count("leak")],
            ["rows of other stories", results.cell("leak", "loss_by_story"), results.count("leak", "loss_by_story")]]
    blocks = [f"{LEAKY_STORIES} stories, all permutations of their constraints; a run has two validation sets.",
              report.table(["validated on", "validation loss", "seeds"], rows)]
    return blocks, [Finding("(ours) the study's validation loss is too low", "loss by story - leaky", [
        result["loss_by_story"] - result["loss"] for result in results.values() if "loss_by_story" in result])]


# ---- 8: the faster fall, and a base whose learning rate has fallen ----

REWARMED = ("--lr", "3e-4", "--warmup", "15", "--max-steps", "160", "--eval-every", "160", "--seed", "2")
BASES = {"held": "3e-4", "fallen": "2e-5"}  # --min-lr of REWARMED pretraining


def plan_fall(lab):
    if not lab.shipped:
        return
    bases = {name: Run(("pretrain.py", "--init", os.path.relpath(lab.init), *REWARMED, "--min-lr", low, "--dtype",
                        "bf16-mixed")) for name, low in BASES.items()}
    for name, base in bases.items():
        yield f"base, {name}", SEEDS[0], base, None
    for seed in lab.seeds:
        for name, base in bases.items():
            for rate in (1, 2):
                yield (name, rate), seed, lab.sft(5e-4, "bf16-mixed", seed, *decay(rate), "--init",
                                                  lab.model(base)), None


def report_fall(lab, results):
    if not lab.shipped:
        return ["Only with the base that ships."], []
    rows = [[f"{name} ({low} at the end)", results.cell(f"base, {name}"), f"{rate}", results.cell((name, rate)),
             results.cell((name, rate), "middle"), results.count((name, rate))]
            for name, low in BASES.items() for rate in (1, 2)]
    blocks = [
        "Two bases, each made by 160 more steps of pretraining from the one that ships, on the same texts: the rate "
        "goes up to 3e-4 and is held there, or falls again. Fine-tuned in bf16-mixed at 5e-4.",
        report.table(["the base's learning rate", "its loss on plain stories", "decay", "validation loss",
                      "training loss, middle tenth", "seeds"], rows)]
    return blocks, [
        finding for name, low in BASES.items() for finding in (
            Finding(f"(ours) a faster fall converges faster from a base whose rate was {name}",
                    "training loss in the middle, decay 1 - 2", results.differences((name, 1), (name, 2), "middle")),
            Finding(f"(ours) a faster fall ends lower from a base whose rate was {name}", "loss, decay 1 - 2",
                    results.differences((name, 1), (name, 2))))]


# ---- 9: what LoRA lacks ----

FULL_LR, LORA_LR, LORA_RANK = 5e-4, 2e-3, 64
FROZEN = {"full": (), "full, norms frozen": ("norm",), "full, embedding frozen": ("embed_tokens",),
          "full, both frozen": ("embed_tokens", "norm")}
ADAPTED = {"LoRA, all-linear": "all-linear", "LoRA, all-linear and head": "all-linear,lm_head",
           "LoRA, all-linear and embedding": "all-linear,embed_tokens", "LoRA, attention": "attention",
           "LoRA, MLP": "mlp"}


def is_tied(lab):
    return gpt_config(lab.init / "config.json").tie_embeddings


def spread_base(lab):
    """The path of --init with all its pieces told apart by study/spread.py; it is made when the first run needs it."""
    def make():
        model, tokenizer = load_model(lab.init)
        weight = model.lm_head.weight.data
        weight.copy_(spread(weight))
        with new_directory(path) as work:
            save_model(work, model, tokenizer)
    path = lab.out / "data" / "spread"
    lab.makers.setdefault(path, functools.cache(make))  # anew in each process, once
    return path


def plan_parts(lab):
    if not is_tied(lab):  # else a frozen embedding is another experiment, and there is no one weight to spread
        return

    def adapted(seed, targets, *more):
        return lab.sft(LORA_LR, SWEEP_DTYPE, seed, *more, program=adapting(LORA_RANK, targets))

    for seed in lab.seeds:
        for name, frozen in FROZEN.items():
            yield name, seed, lab.sft(FULL_LR, SWEEP_DTYPE, seed, frozen=frozen), "eval"
        for name, targets in ADAPTED.items():
            yield name, seed, adapted(seed, targets), "eval"
    init = ["--init", spread_base(lab)]
    for seed in (*lab.seeds, *more_seeds(lab)):
        yield "full, spread base", seed, lab.sft(FULL_LR, SWEEP_DTYPE, seed, *init), "eval"
        yield "LoRA, all-linear, spread base", seed, adapted(seed, "all-linear", *init), "eval"


def key_pieces(lab):
    """A sentence: how alike are the base's embeddings of the prompt's keys?"""
    model, tokenizer = load_model(lab.init)
    keys = {key: ids[0] for key in KEYS if len(ids := tokenizer.encode(key)) == 1}
    pairs = [(a, b, F.cosine_similarity(*model.lm_head.weight[[keys[a], keys[b]]].float(), dim=0))
             for a, b in itertools.combinations(keys, 2)]
    return "Cosines of the base's embeddings of the keys: " + (", ".join(
        f"{a} and {b} {cosine:.4f}" for a, b, cosine in pairs) or "none is a single piece") + "."


def report_parts(lab, results):
    if not is_tied(lab):
        return ["Only where head and embedding are one matrix."], []
    return [
        f"{SWEEP_DTYPE}, decay 1; full at {FULL_LR:g}, LoRA r={LORA_RANK} at {LORA_LR:g}. With both frozen, norms and "
        "embedding (which is the head as well), full fine-tuning trains what all-linear adapts. Spread base: "
        "study/spread.py told apart the pieces that its corpus never had, the prompt's keys among them.",
        key_pieces(lab),
        measures_table(results, "trained"),
    ], [
        *(Finding(f"(ours) with {parts} frozen full fine-tuning obeys worse", "everything met, all trained - frozen",
                  results.differences("full", f"full, {parts} frozen", "everything"), share=True)
          for parts in ("norms", "embedding", "both")),
        Finding("(ours) LoRA obeys worse than full fine-tuning of the same Linears",
                "everything met, both frozen - LoRA",
                results.differences("full, both frozen", "LoRA, all-linear", "everything"), share=True),
        *(Finding(f"(ours) LoRA obeys better with the {more}", "everything met, with it - without",
                  results.differences(f"LoRA, all-linear and {more}", "LoRA, all-linear", "everything"), share=True)
          for more in ("head", "embedding")),
        Finding("(ours) LoRA obeys better from a base that tells the keys apart", "everything met, spread base - base",
                results.differences("LoRA, all-linear, spread base", "LoRA, all-linear", "everything"), share=True),
        *(Finding(f"(ours) LoRA {what} obeys as well as full, within {MARGIN * 100:g} points",
                  "everything met, full - LoRA", results.differences(full, of, "everything"), share=True, within=MARGIN)
          for what, full, of in (
              ("with the embedding", "full", "LoRA, all-linear and embedding"),
              ("from such a base", "full, spread base", "LoRA, all-linear, spread base"))),
    ]


# ---- all of it ----

@dataclass
class Experiment:
    title: str
    plan: callable
    report: callable


EXPERIMENTS = {  # in the order in which they are run: what the others build on comes first
    1: Experiment("The four runs, and precision", plan_four_runs, report_four_runs),
    2: Experiment("LoRA", plan_lora, report_lora),
    7: Experiment("What LoRA needs to reach full fine-tuning", plan_sweep, report_sweep),
    3: Experiment("Constraints", plan_constraints, report_constraints),
    0: Experiment("How little data is enough?", plan_little_data, report_little_data),
    4: Experiment("Replay", plan_replay, report_replay),
    5: Experiment("Weight averaging", plan_averages, report_averages),
    6: Experiment("The leak", plan_leak, report_leak),
    8: Experiment("The faster fall, from a base whose learning rate has fallen", plan_fall, report_fall),
    9: Experiment("What LoRA lacks", plan_parts, report_parts),
}
