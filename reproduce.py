"""Experiments, each one command and one report: python reproduce.py lora-sweep

lora-sweep: what does LoRA need to reach full fine-tuning? Full fine-tuning and LoRA of several ranks and targets, each
over its learning rates at equal steps from the same base; the best of each with three seeds, whose data orders are the
same for all, and evaluate.py. It leaves a table, a figure and all numbers in --out; a finished run is not run again.
"""
import argparse
import csv
import hashlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from checkpoint import WEIGHTS, find_base, write_atomic
from cli import fail, positive

ROOT = Path(__file__).resolve().parent
SEEDS = (1, 2, 3)  # paired: a seed is a data order (and an adapter's first weights)
FULL_LRS, LORA_LRS = (1e-4, 5e-4, 2e-3), (5e-4, 2e-3, 5e-3)
FACTOR, WIDENED = 2.5, 2  # a best learning rate at the edge of its grid: further ones, so many times at most
METHODS = [("full", None, None), ("q+v", 8, "q_proj,v_proj"),
           *(("study" if targets == "study" else "all-linear", r, targets) for r in (8, 64, 256)
             for targets in ("study", "all-linear"))]


# ---- runs ----

def label(method):
    name, r, _ = method
    return "full fine-tuning" if r is None else f"LoRA r={r}, {name}"


def command(method, lr, seed, args):
    """The arguments of one training run, as a user would type them. alpha is 2r, as in the study."""
    _, r, targets = method
    argv = ["train_sft.py"] if r is None else ["lora.py", "--r", r, "--alpha", 2 * r, "--targets", targets]
    argv += ["--init", args.init, "--lr", f"{lr:g}", "--seed", seed, "--max-steps", args.steps, "--eval-every",
             args.steps, "--dtype", args.dtype]
    return [str(a) for a in argv + (["--data", args.data] if args.data else [])]


def digest(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def train(argv, args):
    """Run one training command, or find it done. -> {"loss", "base_loss", "seconds", "directory"}; loss is None where
    training failed (a loss that is not finite)."""
    directory = args.out / "runs" / digest(argv, args.base)
    done, model = directory / "done.json", directory / "model"
    if not done.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        going_on = ["--resume"] if (model / "last").is_dir() else []
        start = time.perf_counter()
        with open(directory / "output.txt", "w", encoding="utf-8") as output:
            code = subprocess.run([sys.executable, *argv, "--out", str(model), *going_on], cwd=ROOT, stdout=output,
                                  stderr=subprocess.STDOUT).returncode
        if code not in (0, 1):  # 1: the loss was not finite, which is a result
            raise ValueError(f"{' '.join(argv)} ended with exit code {code}; see {directory / 'output.txt'}")
        losses = [row["val_loss"] for row in map(json.loads, open(model / "log.jsonl", encoding="utf-8"))
                  if "val_loss" in row]
        result = {"argv": argv, "base_loss": losses[0], "loss": losses[-1] if code == 0 else None,
                  "seconds": round(time.perf_counter() - start, 1)}
        write_atomic(done, lambda p: p.write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8"))
    return json.loads(done.read_text(encoding="utf-8")) | {"directory": model}


def evaluate(method, model, args):
    """evaluate.py on a trained model or adapter -> the content of its eval.json."""
    result = model / "eval.json"
    if not result.is_file():
        which = ["--ckpt", str(model)] if method[1] is None else ["--ckpt", args.init, "--adapter", str(model)]
        done = subprocess.run([sys.executable, "evaluate.py", *which, "--base", args.init, "--out", str(model)],
                              cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"evaluate.py on {model}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(result.read_text(encoding="utf-8"))


def finite(loss):
    return math.inf if loss is None else loss


# ---- lora-sweep ----

def lora_sweep(args):
    grids = {method: list(FULL_LRS if method[1] is None else LORA_LRS) for method in METHODS}
    results = {}  # (method, lr, seed) -> what `train` gives
    with tqdm(total=sum(map(len, grids.values())) + len(METHODS) * (len(SEEDS) - 1), unit="run",
              dynamic_ncols=True) as bar:
        def run(method, lr, seed):
            bar.set_postfix_str(f"{label(method)}, lr {lr:g}, seed {seed}")
            results[method, lr, seed] = train(command(method, lr, seed, args), args)
            bar.update()
            report(results, {}, args)  # so far

        def best(method):
            return min(grids[method], key=lambda lr: finite(results[method, lr, SEEDS[0]]["loss"]))

        for method, grid in grids.items():
            for lr in grid:
                run(method, lr, SEEDS[0])
            for _ in range(WIDENED):
                lr = best(method)
                further = {max(grid): lr * FACTOR, min(grid): lr / FACTOR}.get(lr)
                if further is None:
                    break
                grid.append(further)
                bar.total += 1
                run(method, further, SEEDS[0])
        for seed in SEEDS[1:]:
            for method in METHODS:
                run(method, best(method), seed)
    rates = {}
    for method in METHODS if args.evaluate else ():
        rates[method] = evaluate(method, results[method, best(method), SEEDS[0]]["directory"], args)
    report(results, rates, args)


def summarize(results):
    """-> per method at its best learning rate: [(method, lr, mean loss, losses by seed, share recovered by seed)].

    The share of full fine-tuning's improvement that is recovered: (L_base - L) / (L_base - L_full), full fine-tuning at
    its best and with the same seed."""
    rows = []
    for method in METHODS:
        first = {lr: finite(r["loss"]) for (m, lr, seed), r in results.items() if m == method and seed == SEEDS[0]}
        if not first or min(first.values()) == math.inf:
            continue
        lr = min(first, key=first.get)
        of_seed = {seed: r for seed in SEEDS if (r := results.get((method, lr, seed))) and r["loss"] is not None}
        full = rows[0][3] if rows else {seed: r["loss"] for seed, r in of_seed.items()}
        shares = {seed: (r["base_loss"] - r["loss"]) / (r["base_loss"] - full[seed])
                  for seed, r in of_seed.items() if seed in full}
        rows.append((method, lr, np.mean([r["loss"] for r in of_seed.values()]),
                     {seed: r["loss"] for seed, r in of_seed.items()}, shares))
    return rows


def report(results, rates, args):
    """Write lora-sweep.csv, .md and .png of what there is so far."""
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "lora-sweep.csv", "w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(("method", "r", "targets", "lr", "seed", "base_loss", "loss", "seconds"))
        for (method, lr, seed), r in results.items():
            writer.writerow((label(method), method[1] or "", method[2] or "", lr, seed, r["base_loss"], r["loss"],
                             r["seconds"]))
    rows = summarize(results)
    lines = [f"{args.steps} steps from {args.init}, {args.dtype}; validation loss in nats per token, mean of seeds; "
             f"recovered: share of full fine-tuning's improvement, least to most over seeds", "",
             "| | best lr | seeds | loss | above full | recovered |", "|---|---|---|---|---|---|"]
    for method, lr, loss, losses, shares in rows:
        full = np.mean([rows[0][3][seed] for seed in losses if seed in rows[0][3]])
        least, mean, most = min(shares.values()), np.mean(list(shares.values())), max(shares.values())
        lines.append(f"| {label(method)} | {lr:g} | {len(losses)} | {loss:.4f} | {loss / full - 1:.1%} | "
                     f"{mean:.1%} ({least:.1%} to {most:.1%}) |")
    if rates:
        kinds = ("每个词", "随机句子", "摘要", "特点 对话")
        lines += ["", f"| all of the constraints met (seed {SEEDS[0]}) | {' | '.join(kinds)} | 1 | 2 | 3 | 4 |",
                  "|---" * (len(kinds) + 5) + "|"]
        for method, result in rates.items():
            met = [result["by_kind"].get(kind) for kind in kinds] + [result["satisfied"].get(n) for n in "1234"]
            lines.append(f"| {label(method)} | {' | '.join('%.1f%%' % (100 * m['rate']) if m else '' for m in met)} |")
    (args.out / "lora-sweep.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    figure(results, args.out / "lora-sweep.png")


def figure(results, path):
    """Loss over learning rate, a line a method; one colour a rank, one dash a set of targets."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    colour = {None: "black", 8: "#0072B2", 64: "#D55E00", 256: "#009E73"}  # apart for the colour-blind, too
    style = {"full": "-", "all-linear": "-", "study": "--", "q+v": ":"}
    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    for method in METHODS:
        points = sorted((lr, r["loss"]) for (m, lr, seed), r in results.items()
                        if m == method and seed == SEEDS[0] and r["loss"] is not None)
        if points:
            ax.plot(*zip(*points), style[method[0]], marker="o", markersize=4, color=colour[method[1]],
                    linewidth=2 if method[1] is None else 1.5, label=label(method))
    ax.axhline(next(iter(results.values()))["base_loss"], color="gray", linewidth=1, label="base")
    ax.set(xscale="log", xlabel="learning rate (peak)", ylabel="validation loss (nats per token)")
    ax.grid(alpha=0.3, which="both")
    ax.legend(fontsize=8)
    fig.savefig(path, dpi=120)
    plt.close(fig)


# ---- the command line ----

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Experiments, each one command and one report.")
    parser.error = fail
    sweep = parser.add_subparsers(dest="experiment", required=True).add_parser(
        "lora-sweep", help="LoRA of several ranks and targets against full fine-tuning")
    sweep.error = fail
    flag = sweep.add_argument
    flag("--init", help="model directory to start from (default: the base that ships)")
    flag("--data", help="as train_sft.py's (default: the built-in corpus)")
    flag("--out", type=Path, default=Path("out/reproduce"), help="(default: %(default)s)")
    flag("--steps", type=positive(int), default=150, help="optimizer steps of each run (default: %(default)s)")
    flag("--dtype", default="bf16-mixed", choices=["32-true", "bf16-true", "bf16-mixed"], help="(default: %(default)s)")
    flag("--no-evaluate", dest="evaluate", action="store_false", help="losses only")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    args.out = args.out.resolve()
    init = Path(args.init) if args.init else find_base()
    try:
        if init is None or not (init / WEIGHTS).is_file():
            raise ValueError(f"no model in {init}" if init else "there is no base model in base/: name one with --init")
        args.init = str(init)
        args.base = hashlib.sha256((init / WEIGHTS).read_bytes()).hexdigest()  # runs from another base are others
        lora_sweep(args)
    except (ValueError, OSError) as e:
        fail(e)
    print((args.out / "lora-sweep.md").read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    from reproduce import main
    main()
