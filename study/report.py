"""Blocks of a report -> report.md and a report.html that needs no other file; and the figures."""
import base64
import html
import math
from pathlib import Path

from checkpoint import write_atomic
from sample import CASES
from train_sft import smooth

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")  # apart for the colour-blind, too (Okabe and Ito)
DASHES = ("-", "--", "-.", ":", "-")  # and in black and white


# ---- blocks: (kind, what it is made of) ----

def heading(words, level=2):
    return "heading", (words, level)


def text(words):
    return "text", words


def table(header, rows):
    return "table", (header, rows)


def figure(path, caption, draw):
    """draw(path) makes the PNG, now."""
    draw(path)
    return "figure", (path, caption)


def stories(by_run):
    """{run: its stories of the study's test cases} -> a table a case."""
    return "stories", [(prompt, sampling["temperature"], [(run, told[i]) for run, told in by_run.items()])
                       for i, (_, prompt, sampling) in enumerate(CASES)]


# ---- rendering ----

def markdown(block):
    kind, content = block
    if kind == "heading":
        return f"{'#' * content[1]} {content[0]}"
    if kind == "text":
        return content
    if kind == "table":
        header, rows = content
        lines = [header, ["---"] * len(header), *rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    if kind == "figure":
        return f"![{content[1]}]({content[0].name})\n\n{content[1]}."
    return "\n\n".join(f"**{prompt.replace(chr(10), ' / ')}** (temperature {temperature})\n\n" + "\n".join(
        f"* {run}: {' '.join(story.split())}" for run, story in told) for prompt, temperature, told in content)


def as_html(block):
    kind, content = block
    if kind == "heading":
        return f"<h{content[1]}>{html.escape(content[0])}</h{content[1]}>"
    if kind == "text":
        return f"<p>{html.escape(content)}</p>"
    if kind == "table":
        def row(cells, tag):
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
        return "<table>" + row(content[0], "th") + "".join(row(cells, "td") for cells in content[1]) + "</table>"
    if kind == "figure":
        image = base64.b64encode(content[0].read_bytes()).decode()
        caption = html.escape(content[1])
        return (f'<figure><img alt="{caption}" src="data:image/png;base64,{image}"><figcaption>{caption}</figcaption>'
                "</figure>")
    return "".join(
        f"<h3>{html.escape(prompt).replace(chr(10), '<br>')} (temperature {temperature})</h3><table>" + "".join(
            f"<tr><th>{html.escape(run)}</th><td>{html.escape(story)}</td></tr>" for run, story in told) + "</table>"
        for prompt, temperature, told in content)


STYLE = ("body{max-width:60em;margin:auto;padding:1em;font-family:sans-serif;line-height:1.5}img{max-width:100%}"
         "table{border-collapse:collapse}td,th{border:1px solid #bbb;padding:.2em .5em;text-align:left;"
         "vertical-align:top}")


def write(blocks, folder):
    pages = {
        "report.md": "\n\n".join(map(markdown, blocks)) + "\n",
        "report.html": f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>MicroStories</title>'
                       f"<style>{STYLE}</style>{''.join(map(as_html, blocks))}</html>\n",
    }
    for name, page in pages.items():
        write_atomic(Path(folder) / name, lambda p, page=page: p.write_text(page, encoding="utf-8"))


# ---- figures ----

def axes(*shape, **settings):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(*shape, layout="constrained", **settings)


def save(fig, path):
    import matplotlib.pyplot as plt
    fig.savefig(path, dpi=120)
    plt.close(fig)


def curves(runs, path):
    """runs: [(label, lines of log.jsonl)]. The raw training loss pale, smoothed on top; below, the learning rate."""
    fig, (top, bottom) = axes(2, 1, figsize=(8, 6.5), sharex=True, height_ratios=[3, 1])
    for i, (label, log) in enumerate(runs):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
        at, loss, lr = zip(*[(row["step"], row["loss"], row["lr"]) for row in log if "lr" in row])
        top.plot(at, loss, color=colour, alpha=0.15, linewidth=1)
        top.plot(at, smooth(loss), dash, color=colour, label=label)
        bottom.plot(at, lr, dash, color=colour)
    top.set_ylabel("training loss (nats per token)")
    top.legend(fontsize=8)
    bottom.set(ylabel="learning rate", xlabel="optimizer step")
    for ax in (top, bottom):
        ax.grid(alpha=0.3)
    save(fig, path)


def lines(series, xlabel, ylabel, path, logx=False):
    """series: [(label, [(x, y)])], a line each; y that is missing is left out."""
    fig, ax = axes(figsize=(8, 4.5))
    for i, (label, points) in enumerate(series):
        points = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
        if points:
            ax.plot(*zip(*points), DASHES[i % len(DASHES)], marker="os^Dv"[i % 5], color=COLOURS[i % len(COLOURS)],
                    label=label)
            ax.legend(fontsize=8)
    ax.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if logx else "linear")
    ax.grid(alpha=0.3)
    save(fig, path)
