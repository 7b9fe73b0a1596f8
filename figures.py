"""Every figure of the product. Only this file imports matplotlib, and only to draw."""
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


RL_PANELS = {  # title: names in log.jsonl of a training step; the same with val_ before them is of validation
    "reward": ["reward"], "met, by kind": ["词汇", "随机句子", "摘要", "特点"], "ended with EOS": ["ended"],
    "groups without a gradient": ["equal_groups"], "entropy (nats per token)": ["entropy"],
    "KL to the start (nats per token)": ["kl"], "tokens a story": ["tokens"], "repeated 4-grams": ["rep4"],
    "loss of plain stories": ["plain_nll"]}


def rl_curves(out):
    """out/rl.png from out/log.jsonl: how the stories of train_rl.py were. Lines: those it learns from; points: of the
    instructions that it is judged by."""
    rows = [json.loads(line) for line in open(Path(out) / "log.jsonl", encoding="utf-8")]
    fig, axes = subplots(3, 3, figsize=(12, 8), sharex=True)
    for ax, (title, names) in zip(axes.flat, RL_PANELS.items()):
        for name, colour, dash in zip(names, COLOURS, DASHES):
            label = {"词汇": "words", "随机句子": "sentence", "摘要": "summary", "特点": "dialogue"}.get(name, name)
            if steps := [(r["step"], r[name]) for r in rows if name in r and "loss" in r]:
                at, values = zip(*steps)
                ax.plot(at, values, color=colour, alpha=0.2, linewidth=1)
                ax.plot(at, smooth(values), dash, color=colour, label=label)
            points = [(r["step"], r.get(f"val_{name}", r.get(name))) for r in rows if "val_loss" in r]
            if points := [point for point in points if point[1] is not None]:
                ax.plot(*zip(*points), "o", markersize=4, color=colour)
        ax.set_title(title, fontsize=9)
        ax.grid(alpha=0.3)
        if len(names) > 1 and ax.get_legend_handles_labels()[1]:
            ax.legend(fontsize=7)
    for ax in axes[-1]:
        ax.set_xlabel("optimizer step")
    fig.suptitle(str(out), parse_math=False)
    save(fig, Path(out) / "rl.png")
