"""Every figure: loss.png of a run, eval.png of a judged model. Only this file imports matplotlib, and only to draw."""
import json
from pathlib import Path

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")  # apart for the colour-blind, too (Okabe and Ito)
DASHES = ("-", "--", "-.", ":", "-")  # and in black and white


def subplots(*shape, **settings):
    import matplotlib
    matplotlib.use("Agg")  # files only, also where there is no screen
    import matplotlib.pyplot as plt
    return plt.subplots(*shape, layout="constrained", **settings)


def save(fig, path):
    import matplotlib.pyplot as plt
    fig.savefig(path, dpi=120)
    plt.close(fig)


def smooth(values):
    """Exponential means over about 20 values, without the bias towards the start."""
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean, weight = 0.95 * mean + 0.05 * value, 0.95 * weight + 0.05
        means.append(mean / weight)
    return means


def run_curves(out):
    """out/loss.png from out/log.jsonl."""
    rows = [json.loads(line) for line in open(Path(out) / "log.jsonl", encoding="utf-8")]
    loss_curves([("training", rows)], Path(out) / "loss.png", title=str(out))


def loss_curves(runs, path, title=None):
    """runs: [(label, lines of log.jsonl)]. The training loss of each step pale, smoothed on top, validation as points;
    below, the learning rate."""
    fig, (top, bottom) = subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=[3, 1])
    for i, (label, rows) in enumerate(runs):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
        steps = [(r["step"], r["loss"], r["lr"]) for r in rows if "loss" in r]
        points = [(r["step"], r["val_loss"]) for r in rows if "val_loss" in r]
        if steps:
            at, loss, lr = zip(*steps)
            top.plot(at, loss, color=colour, alpha=0.2, linewidth=1)
            top.plot(at, smooth(loss), dash, color=colour, label=label)
            bottom.plot(at, lr, dash, color=colour)
        if points:
            top.plot(*zip(*points), "o", markersize=5, color=colour if len(runs) > 1 else COLOURS[1],
                     label=None if len(runs) > 1 else "validation")
    top.set_ylabel("loss (nats per token)")
    top.legend(fontsize=8)
    bottom.set(ylabel="learning rate", xlabel="optimizer step")
    for ax in (top, bottom):
        ax.grid(alpha=0.3)
    if title:
        fig.suptitle(title, parse_math=False)  # a $ in a file name is no formula
    save(fig, path)


def obedience(result, path):
    """eval.png: the share of stories that meet all of 1, 2, 3, 4 constraints. result: what `evaluate` gives."""
    fig, ax = subplots(figsize=(7, 4))
    parts = [("model", result, "o-"), ("ceiling", result["ceiling"], "^--"), ("floor", result["floor"], "s:")]
    for (label, part, style), colour in zip(parts, COLOURS):
        if part and part["satisfied"]:
            rate, lo, hi = zip(*((v["rate"], v["lo"], v["hi"]) for v in part["satisfied"].values()))
            bounds = [[max(0, r - x) for r, x in zip(rate, lo)], [max(0, x - r) for r, x in zip(rate, hi)]]
            ax.errorbar([int(k) for k in part["satisfied"]], rate, yerr=bounds, fmt=style, color=colour, capsize=3,
                        label=label)
    if independent := result["independent"]:
        ax.plot([int(k) for k in independent], list(independent.values()), "x", color=COLOURS[-1],
                label="model, were errors independent")
    ax.set(xlabel="checkable constraints in the instruction", ylabel="all met (share of stories)", ylim=(-0.03, 1.03),
           xticks=range(1, 5))
    ax.grid(alpha=0.3)
    ax.legend()
    save(fig, path)
