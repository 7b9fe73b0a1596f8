"""What the model card (README.md) says of the base model: python base/card.py

Losses on plain stories that it has not been trained on, and ten samples. The real stories are those in the folder
$MICROSTORIES_REAL_DATA, where there is one.
"""
import argparse
import math
import os
import random
import re
import sys
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import load_model  # noqa: E402
from common import fail  # noqa: E402
from data import books, generate  # noqa: E402
from evaluate import piece_losses, plain_loss  # noqa: E402
from records import read_stories  # noqa: E402

SEED = 98  # of stories that nothing is trained on
REAL = "real stories, the first 300"
SAMPLES = {"temperature": 0.8, "top_p": 1.0, "seed": 1}


def texts():
    """{name: stories}"""
    found = {"the grammar's stories, 300 of seed 98": [r["text"] for r in generate.stories(300, SEED)],
             "the authored stories that are held out, 30": [r["text"] for r in generate.authored("heldout")]}
    folder = os.environ.get("MICROSTORIES_REAL_DATA")
    if folder:
        path = Path(folder, "real_stories_zh.jsonl")
        found[REAL] = list(islice(read_stories(path), 300))
    return found


def copying(model, tokenizer, n=200):
    """Does it copy from its context? Mean loss (nats per token) on the first pieces of names and central words of n
    stories, where they come for the first time and where they have come before."""
    _, plots = generate.load()
    losses = {"first": [], "again": []}
    for i in range(n):
        record, made = generate.compose(plots, random.Random(f"{SEED}-{i}"))
        text, values, plot = record["text"], made["values"], made["plot"]
        loss = piece_losses(model, tokenizer, [tokenizer.eos_id], text)
        for slot in plot["slots"]:
            if slot in values and (slot == plot["central"] or values[slot] != values[slot + ".kind"]):
                for nth, match in enumerate(re.finditer(values[slot], text)):
                    if match.start() in loss:
                        losses["again" if nth else "first"].append(loss[match.start()])
    return {name: sum(some) / len(some) for name, some in losses.items()}


def reading_again(model, tokenizer, real=(), n=100):
    """Does it copy word for word? {kind of line: loss in nats per token of n lines where they are read out a second
    time}: of exercises that it has not seen, and of the first 30 characters of real stories, where there are some."""
    rng = random.Random(SEED)
    drawn = {kind: [draw() for _ in range(n)] for kind, draw in books.lines(books.load()[0], rng).items()}
    if real:
        drawn["real stories"] = [story.replace("\n", "")[:30] for story in real[:n]]
    found = {}
    for kind, lines in drawn.items():
        losses = [loss for line in lines for loss in piece_losses(
            model, tokenizer, [tokenizer.eos_id, *tokenizer.encode(line + "\n")], line).values()]
        found[kind] = sum(losses) / len(losses)
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure the base model and let it write ten times.")
    parser.error = fail
    parser.add_argument("--ckpt", type=Path, default=ROOT / "base", help="model directory (default: base/)")
    args = parser.parse_args(argv)
    try:
        model, tokenizer = load_model(args.ckpt)
        told = texts()
    except (ValueError, OSError) as e:
        fail(e)
    model.float().eval()
    print("| text | nats per token | tokens per character | bits per character |\n|---|---|---|---|")
    for name, stories in told.items():
        # a story is cut at the model's context, and an EOS is predicted behind it: both count as its text
        fit = [s for s in stories if len(tokenizer.encode(s)) <= model.config.block_size - 2]
        tokens, chars = sum(len(tokenizer.encode(s)) + 1 for s in fit), sum(map(len, fit))
        loss = plain_loss(model, tokenizer, fit)
        print(f"| {name} ({len(fit)} fit into the context) | {loss:.3f} | {tokens / chars:.3f} "
              f"| {loss * tokens / chars / math.log(2):.3f} |")
    found = copying(model, tokenizer)
    print(f"\nNames and central words, nats at their first piece: {found['first']:.2f} where they come for the first "
          f"time, {found['again']:.2f} where they have come before.")
    again = reading_again(model, tokenizer, told.get(REAL))
    print("Lines read out a second time, nats per token: "
          + ", ".join(f"{kind} {loss:.2f}" for kind, loss in again.items()) + ".")
    for ids in model.generate([[tokenizer.eos_id]] * 10, model.config.block_size - 1, eos_id=tokenizer.eos_id,
                              **SAMPLES):
        print("\n" + "\n".join("> " + (line or "<br>") for line in tokenizer.decode(ids).split("\n")))


if __name__ == "__main__":
    main()
