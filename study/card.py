"""What the model card (base/README.md) says of the base model: python study/card.py

Losses on plain stories that it has not been trained on, and ten samples. The real stories are those in the folder
$MICROSTORIES_REAL_DATA, where there is one.
"""
import math
import os
import random
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import command_line, fail  # noqa: E402

import decoding  # noqa: E402
from checkpoint import find_base, load_model  # noqa: E402
from data import books, builtin, generate, language  # noqa: E402
from data.builtin import SEEDS  # noqa: E402
from evaluate import plain_loss  # noqa: E402
from records import read_stories  # noqa: E402
from study.copying import piece_losses  # noqa: E402

SEED = SEEDS["plain stories"]
REAL = "real stories, the first 300"
SAMPLES = {"temperature": 0.8, "top_p": 1.0, "seed": 1}


def texts():
    """{name: plain stories that the base has not been trained on}"""
    by_name = {f"those of 640 stories of seed {SEED} that have a plot": builtin.plain_stories(640),
               "the authored stories that are held out": [r["text"] for r in generate.authored("heldout")]}
    folder = os.environ.get("MICROSTORIES_REAL_DATA")
    if folder:
        by_name[REAL] = read_stories(Path(folder, "real_stories_zh.jsonl"))[:300]
    return by_name


def copying(model, tokenizer, n=200):
    """Does it copy from its context? Mean loss (nats per token) on the first pieces of names and central words of n
    stories, where they come for the first time and where they have come before."""
    world = language.load()
    losses = {"first": [], "again": []}
    for i in range(n):
        record, source = generate.compose(world, random.Random(f"{SEED}-{i}"))
        text, values, plot = record["text"], source["values"], source["plot"]
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
    lines = {kind: [draw() for _ in range(n)] for kind, draw in books.lines(books.load()[0], rng).items()}
    if real:
        lines["real stories"] = [story.replace("\n", "")[:30] for story in real[:n]]
    means = {}
    for kind, some in lines.items():
        losses = [loss for line in some for loss in piece_losses(
            model, tokenizer, [tokenizer.eos_id, *tokenizer.encode(line + "\n")], line).values()]
        means[kind] = sum(losses) / len(losses)
    return means


def main(argv=None):
    parser = command_line("Measure the base model and let it write ten times.")
    parser.add_argument("--ckpt", type=Path, help="model directory (default: base/)")
    args = parser.parse_args(argv)
    try:
        model, tokenizer = load_model(args.ckpt or find_base())
        stories = texts()
    except (ValueError, OSError) as e:
        fail(e)
    model.float().eval()
    print("| text | nats per token | tokens per character | bits per character |\n|---|---|---|---|")
    for name, some in stories.items():
        # a story is cut at the model's context, and an EOS is predicted behind it: both count as its text
        fit = [s for s in some if len(tokenizer.encode(s)) <= model.config.block_size - 2]
        tokens, chars = sum(len(tokenizer.encode(s)) + 1 for s in fit), sum(map(len, fit))
        loss = plain_loss(model, tokenizer, fit)
        print(f"| {name} ({len(fit)} fit into the context) | {loss:.3f} | {tokens / chars:.3f} "
              f"| {loss * tokens / chars / math.log(2):.3f} |")
    losses = copying(model, tokenizer)
    print(f"\nNames and central words, nats at their first piece: {losses['first']:.2f} where they come for the first "
          f"time, {losses['again']:.2f} where they have come before.")
    again = reading_again(model, tokenizer, stories.get(REAL))
    print("Lines read out a second time, nats per token: "
          + ", ".join(f"{kind} {loss:.2f}" for kind, loss in again.items()) + ".")
    for ids in decoding.generate(model, [[tokenizer.eos_id]] * 10, model.config.block_size - 1, eos_id=tokenizer.eos_id,
                                 **SAMPLES):
        print("\n" + "\n".join("> " + (line or "<br>") for line in tokenizer.decode(ids).split("\n")))


if __name__ == "__main__":
    from study.card import main
    main()
