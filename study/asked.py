"""What is a constraint line worth? python study/asked.py out/sft [more model directories] --data out/held/judged.jsonl

A rate of met constraints counts also what is met by chance: a summary names words, a plot has few phrasings. So a story
is written for every instruction of two or more constraints twice, with one of its lines and without it; the difference
is what the line does. And since these stories say little until a model copies well, the loss that the line saves: nats
at the first piece of each word (at its first occurrence) and of the sentence, in the instruction's own story.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import command_line, fail  # noqa: E402

import numpy as np  # noqa: E402

from checkpoint import load_model  # noqa: E402
from constraints import KEYS, SENTENCE, WORDS, check, render  # noqa: E402
from data.judged import add_rivals, read_rows  # noqa: E402
from dataset import encode_prompt  # noqa: E402
from evaluate import interval, write_stories  # noqa: E402
from study.copying import piece_losses  # noqa: E402

SAMPLING = {"temperature": 0.2, "top_p": 0.9, "top_k": 30, "max_new_tokens": 400}  # evaluate.py's
SEED = 1337


def share_met(row, key, story):
    """The share of its words, or of its features that a rule can tell, that the story meets; None where no rule can."""
    verdict = check(story, {key: row["constraints"][key]}, row["rivals"])[key]
    known = [ok for ok in (verdict.values() if isinstance(verdict, dict) else [verdict]) if ok is not None]
    return float(np.mean(known)) if known else None


def first_pieces(model, tokenizer, row, constraints, key):
    """Nats at the first piece of each word, or of the sentence, in the row's own story after these constraints."""
    losses = piece_losses(model, tokenizer, encode_prompt(tokenizer, render(constraints)), row["story"])
    parts = row["constraints"][key] if key == WORDS else [row["constraints"][key]]
    return [losses[place] for part in parts if (place := row["story"].find(part)) in losses]


def measure(model, tokenizer, rows, key):
    """What this key's line does in these rows, all of which have it: {"n", "with", "without": shares met, "change": its
    interval, "nats": [with, without] or []}; None where no rule can tell."""
    full = [row["constraints"] for row in rows]
    bare = [{k: v for k, v in constraints.items() if k != key} for constraints in full]
    shares, nats = [], []
    for asked in (full, bare):
        stories, *_ = write_stories(model, tokenizer, [render(constraints) for constraints in asked], 1, SEED, SAMPLING)
        shares.append([share_met(row, key, story) for row, [story] in zip(rows, stories)])
        if key in (WORDS, SENTENCE):
            nats.append(float(np.mean([loss for row, constraints in zip(rows, asked)
                                       for loss in first_pieces(model, tokenizer, row, constraints, key)])))
    pairs = np.array([pair for pair in zip(*shares) if pair[0] is not None])
    if not len(pairs):
        return None
    with_it, without = pairs.mean(0).tolist()
    change = interval([[a - b] for a, b in pairs], SEED)
    return {"n": len(pairs), "with": with_it, "without": without, "change": change, "nats": nats}


def line(key, measured):
    """A line of the table."""
    if not measured:
        return f"{key}: nothing that a rule can tell"
    change = measured["change"]
    bounds = f"{change['rate']:+8.1%} [{change['lo']:+4.0%}, {change['hi']:+4.0%}]"
    nats = "".join(f"{loss:8.2f}" for loss in measured["nats"])
    return (f"{key + ' ' * (10 - 2 * len(key))}{measured['n']:5}{measured['with']:14.1%}{measured['without']:10.1%}"
            f"{bounds:>24}{nats}")


def main(argv=None):
    parser = command_line("What is a constraint line worth?")
    parser.add_argument("ckpt", type=Path, nargs="+", help="model directories")
    parser.add_argument("--data", type=Path, required=True, help="instruction records with their stories (held out)")
    args = parser.parse_args(argv)
    try:
        rows = [row for row in read_rows(args.data) if len(row["constraints"]) > 1 and row["story"]]
        if not rows:
            raise ValueError(f"{args.data}: no row with two constraints and a story")
        models = [load_model(path) for path in args.ckpt]
        add_rivals(rows, SEED)
        for path, (model, tokenizer) in zip(args.ckpt, models):
            model.float().eval()
            print(path)
            print(f"{'line':<10}{'n':>5}{'met with it':>14}{'without':>10}{'difference':>24}   nats: with, without")
            for key in KEYS:
                if some := [row for row in rows if key in row["constraints"]]:
                    print(line(key, measure(model, tokenizer, some, key)), flush=True)
    except (ValueError, OSError) as e:
        fail(e)


if __name__ == "__main__":
    from study.asked import main
    main()
