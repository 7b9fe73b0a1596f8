"""What a report is made of: blocks of Markdown (strings), and the figures that are not figures.py's."""
import math

from figures import COLOURS, DASHES, save, subplots
from sample import CASES


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def figure(path, caption):
    return f"![{caption}]({path.name})\n\n{caption}."


def stories(by_run):
    """{run: its stories of the study's test cases} -> a list a case."""
    blocks = []
    for i, (_, prompt, sampling) in enumerate(CASES):
        title = f"**{prompt.replace(chr(10), ' / ')}** (temperature {sampling['temperature']})"
        blocks.append("\n".join([title, "", *(f"* {run}: {' '.join(cases[i].split())}"
                                              for run, cases in by_run.items())]))
    return "\n\n".join(blocks)


def draw_lines(series, path, xlabel, ylabel, log_x=False, joined=True):
    """series: {label: [(x, y)]}, a line each, or single points; points without a finite y are left out."""
    fig, ax = subplots(figsize=(8, 4.5))
    for i, (label, points) in enumerate(series.items()):
        points = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
        if points:
            # four dashes and five colours: no two of twenty lines are alike
            ax.plot(*zip(*points), linestyle=DASHES[i % 4] if joined else "none", color=COLOURS[i % 5],
                    marker="os^Dv"[(i if joined else i + i // 5) % 5], label=label)
            ax.legend(fontsize=8)
    ax.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if log_x else "linear")
    ax.grid(alpha=0.3)
    save(fig, path)
