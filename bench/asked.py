"""What is a constraint line worth? python bench/asked.py out/sft [more model directories] --data out/held/judged.jsonl

A rate of met constraints counts also what would be met unasked: a summary names words, a plot has few phrasings. So here
every instruction of two or more constraints is told twice, with one of its lines and without it, one story each. The
difference is what the line does. And since sampled stories tell little until a model copies well, the loss that it
saves: nats at the first piece of the words (where each comes first) and of the sentence, in the instruction's own story.
"""
import argparse
import random
import sys
from itertools import accumulate
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from checkpoint import load_model  # noqa: E402
from cli import fail  # noqa: E402
from constraints import KEYS, SENTENCE, WORDS, render  # noqa: E402
from dataset import encode_prompt  # noqa: E402
from evaluate import add_rivals, interval, read_rows, verdicts, write_stories  # noqa: E402

SAMPLING = {"temperature": 0.2, "top_p": 0.9, "top_k": 30, "max_new_tokens": 400}  # evaluate.py's
SEED = 1337


def without(row, key):
    return {"constraints": {k: v for k, v in row["constraints"].items() if k != key}}


def share_met(row, key, story):
    """The share of this constraint that the story meets: of its words, of its features that a rule can tell; or None."""
    found = verdicts(row, story)[key]
    known = [ok for ok in (found.values() if isinstance(found, dict) else [found]) if ok is not None]
    return float(np.mean(known)) if known else None


@torch.no_grad()
def first_pieces(model, tokenizer, row, asked, parts):
    """Nats at the first piece of each of these parts of the row's story, after the instruction `asked`."""
    prompt, story = encode_prompt(tokenizer, render(asked["constraints"])), tokenizer.encode(row["story"])
    starts = list(accumulate((len(tokenizer.decode([i])) for i in story), initial=0))  # character offsets of pieces
    ids = torch.tensor([(prompt + story)[:model.config.block_size]])
    loss = F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="none")[len(prompt) - 1:]
    at = dict(zip(starts, loss.tolist()))
    return [at[place] for part in parts if (place := row["story"].find(part)) in at]


def main(argv=None):
    parser = argparse.ArgumentParser(description="What is a constraint line worth?")
    parser.error = fail
    parser.add_argument("ckpt", type=Path, nargs="+", help="model directories")
    parser.add_argument("--data", type=Path, required=True, help="instruction records with their stories (held out)")
    args = parser.parse_args(argv)
    try:
        rows = [row for row in read_rows(args.data) if len(row["constraints"]) > 1 and row["story"]]
        models = [load_model(path) for path in args.ckpt]
    except (ValueError, OSError) as e:
        fail(e)
    add_rivals(rows, SEED)
    for path, (model, tokenizer) in zip(args.ckpt, models):
        model.float().eval()
        print(f"{path}\n{'line':<10}{'n':>5}{'met with it':>14}{'without':>10}{'difference':>24}   nats, with and without")
        for key in KEYS:
            some = [row for row in rows if key in row["constraints"]]
            shares = []
            for asked in (some, [without(row, key) for row in some]):
                told, _ = write_stories(model, tokenizer, [render(a["constraints"]) for a in asked], 1, SEED, SAMPLING)
                shares.append([share_met(row, key, story) for row, [story] in zip(some, told)])
            pairs = [(a, b) for a, b in zip(*shares) if a is not None]
            change = interval([[a - b] for a, b in pairs], SEED)
            nats = ""
            if key in (WORDS, SENTENCE):
                losses = [[loss for row, a in zip(some, asked) for loss in first_pieces(
                    model, tokenizer, row, a, row["constraints"][key] if key == WORDS else [row["constraints"][key]])]
                    for asked in (some, [without(row, key) for row in some])]
                nats = f"{np.mean(losses[0]):10.2f}{np.mean(losses[1]):6.2f}"
            with_it, bare = np.mean(pairs, axis=0) if pairs else (np.nan, np.nan)
            bounds = f"{change['rate']:+8.1%} [{change['lo']:+4.0%}, {change['hi']:+4.0%}]"
            print(f"{key + ' ' * (10 - 2 * len(key))}{len(pairs):5}{with_it:14.1%}{bare:10.1%}{bounds:>24}{nats}",
                  flush=True)


if __name__ == "__main__":
    main()
