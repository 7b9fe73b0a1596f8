"""What does LoRA need to reach full fine-tuning? python reproduce.py lora-sweep

Full fine-tuning and LoRA of several ranks and targets, each over its learning rates at equal steps from the same base;
the best of each with all seeds, whose data orders are the same for all, and the first seed's judged. It leaves a table,
a figure and all numbers in --out; a finished run is not made again.
"""
import csv
import math

import numpy as np
from tqdm import tqdm

DTYPE = "bf16-mixed"
FULL_LRS, LORA_LRS = (1e-4, 5e-4, 2e-3), (5e-4, 2e-3, 5e-3)
FACTOR, WIDENED = 2.5, 2  # a best learning rate at the edge of its grid: further ones, so many times at most
METHODS = [("full", None, None), ("q+v", 8, "q_proj,v_proj"),
           *(("study" if targets == "study" else "all-linear", r, targets) for r in (8, 64, 256)
             for targets in ("study", "all-linear"))]


def label(method):
    name, r, _ = method
    return "full fine-tuning" if r is None else f"LoRA r={r}, {name}"


def run(lab, method, lr, seed):
    """alpha is 2r, as in the study."""
    _, r, targets = method
    program = ["train_sft.py"] if r is None else ["lora.py", "--r", r, "--alpha", 2 * r, "--targets", targets]
    return lab.sft(lr, DTYPE, seed, program=program)


def finite(loss):
    return math.inf if loss is None else loss


def sweep(lab, seeds, evaluate):
    grids = {method: list(FULL_LRS if method[1] is None else LORA_LRS) for method in METHODS}
    results = {}  # (method, lr, seed) -> what lab.train gives
    with tqdm(total=sum(map(len, grids.values())) + len(METHODS) * (len(seeds) - 1), unit="run",
              dynamic_ncols=True) as bar:
        def make(method, lr, seed):
            bar.set_postfix_str(f"{label(method)}, lr {lr:g}, seed {seed}")
            results[method, lr, seed] = lab.train(run(lab, method, lr, seed))
            bar.update()
            write(lab, results, {}, seeds)  # so far

        def best_lr(method):
            return min(grids[method], key=lambda lr: finite(results[method, lr, seeds[0]]["loss"]))

        for method, grid in grids.items():
            for lr in grid:
                make(method, lr, seeds[0])
            for _ in range(WIDENED):
                lr = best_lr(method)
                further = {max(grid): lr * FACTOR, min(grid): lr / FACTOR}.get(lr)
                if further is None:
                    break
                grid.append(further)
                bar.total += 1
                make(method, further, seeds[0])
        for seed in seeds[1:]:
            for method in METHODS:
                make(method, best_lr(method), seed)
    rates = {method: lab.judge(run(lab, method, best_lr(method), seeds[0]))["eval"] for method in METHODS if evaluate}
    write(lab, results, rates, seeds)


def best(lab, seed):
    """-> {"best full": (method, lr), "best LoRA": (method, lr)}: what ended lowest in the sweep that was made in this
    laboratory. Empty without one."""
    path = lab.out / "lora-sweep.csv"
    rows = list(csv.DictReader(open(path, encoding="utf-8"))) if path.is_file() else []
    named = {label(method): method for method in METHODS}
    found = {}
    rows = [row for row in rows if row["method"] in named and row["seed"] == str(seed) and row["loss"]]
    for row in sorted(rows, key=lambda row: float(row["loss"]), reverse=True):
        method = named[row["method"]]
        found["best LoRA" if method[1] else "best full"] = method, float(row["lr"])
    return found


def summarize(results, seeds):
    """-> per method at its best learning rate: [(method, lr, mean loss, losses by seed, share recovered by seed)].

    The share of full fine-tuning's improvement that is recovered: (L_base - L) / (L_base - L_full), full fine-tuning at
    its best and with the same seed."""
    rows = []
    for method in METHODS:
        first = {lr: finite(r["loss"]) for (m, lr, seed), r in results.items() if m == method and seed == seeds[0]}
        if not first or min(first.values()) == math.inf:
            continue
        lr = min(first, key=first.get)
        of_seed = {seed: r for seed in seeds if (r := results.get((method, lr, seed))) and r["loss"] is not None}
        full = rows[0][3] if rows else {seed: r["loss"] for seed, r in of_seed.items()}
        shares = {seed: (r["base_loss"] - r["loss"]) / (r["base_loss"] - full[seed])
                  for seed, r in of_seed.items() if seed in full}
        rows.append((method, lr, np.mean([r["loss"] for r in of_seed.values()]),
                     {seed: r["loss"] for seed, r in of_seed.items()}, shares))
    return rows


def write(lab, results, rates, seeds):
    """Write lora-sweep.csv, .md and .png of what there is so far."""
    lab.out.mkdir(parents=True, exist_ok=True)
    with open(lab.out / "lora-sweep.csv", "w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(("method", "r", "targets", "lr", "seed", "base_loss", "loss", "seconds"))
        for (method, lr, seed), r in results.items():
            writer.writerow((label(method), method[1] or "", method[2] or "", lr, seed, r["base_loss"], r["loss"],
                             r["seconds"]))
    rows = summarize(results, seeds)
    lines = [f"{lab.steps} steps from {lab.init.name}, {DTYPE}; validation loss in nats per token, mean of seeds; "
             f"recovered: share of full fine-tuning's improvement, least to most over seeds", "",
             "| | best lr | seeds | loss | above full | recovered |", "|---|---|---|---|---|---|"]
    for method, lr, loss, losses, shares in rows:
        full = np.mean([rows[0][3][seed] for seed in losses if seed in rows[0][3]])
        least, mean, most = min(shares.values()), np.mean(list(shares.values())), max(shares.values())
        lines.append(f"| {label(method)} | {lr:g} | {len(losses)} | {loss:.4f} | {loss / full - 1:.1%} | "
                     f"{mean:.1%} ({least:.1%} to {most:.1%}) |")
    if rates:
        kinds = ("每个词", "随机句子", "摘要", "特点 对话")
        lines += ["", f"| all of the constraints met (seed {seeds[0]}) | {' | '.join(kinds)} | 1 | 2 | 3 | 4 |",
                  "|---" * (len(kinds) + 5) + "|"]
        for method, result in rates.items():
            met = [result["by_kind"].get(kind) for kind in kinds] + [result["satisfied"].get(n) for n in "1234"]
            lines.append(f"| {label(method)} | {' | '.join('%.1f%%' % (100 * m['rate']) if m else '' for m in met)} |")
    (lab.out / "lora-sweep.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    figure(results, seeds, lab.out / "lora-sweep.png")


def figure(results, seeds, path):
    """Loss over learning rate, a line a method; one colour a rank, one dash a set of targets."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    colour = {None: "black", 8: "#0072B2", 64: "#D55E00", 256: "#009E73"}  # apart for the colour-blind, too
    style = {"full": "-", "all-linear": "-", "study": "--", "q+v": ":"}
    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    for method in METHODS:
        points = sorted((lr, r["loss"]) for (m, lr, seed), r in results.items()
                        if m == method and seed == seeds[0] and r["loss"] is not None)
        if points:
            ax.plot(*zip(*points), style[method[0]], marker="o", markersize=4, color=colour[method[1]],
                    linewidth=2 if method[1] is None else 1.5, label=label(method))
    ax.axhline(next(iter(results.values()))["base_loss"], color="gray", linewidth=1, label="base")
    ax.set(xscale="log", xlabel="learning rate (peak)", ylabel="validation loss (nats per token)")
    ax.grid(alpha=0.3, which="both")
    ax.legend(fontsize=8)
    fig.savefig(path, dpi=120)
    plt.close(fig)
