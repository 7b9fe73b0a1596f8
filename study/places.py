"""Where in its stories does a model tell what is asked? python study/places.py out/sft [more model directories]

One story for each handwritten instruction, as evaluate.py has them written. Prints the share of the asked words, the
first of the list and the others, and of the sentences that stand in each fifth of their stories, and of those that are
missing: what is asked is not to stand behind the end, nor as a list at the start. Then, how often stories begin alike,
and how often one repeats itself.
"""
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import command_line, fail  # noqa: E402

from checkpoint import load_model  # noqa: E402
from constraints import SENTENCE, WORDS, render  # noqa: E402
from data.judged import HANDWRITTEN, read_rows  # noqa: E402
from evaluate import told_twice, write_stories  # noqa: E402
from study.combined import SAMPLING, SEED  # noqa: E402

PARTS = 5
BEGINNING = 10  # characters


def places(constraints, story):
    """[(kind, where in the story it comes first, from 0 to 1, or None)] of what is asked."""
    asked = [("first word" if i == 0 else "other words", word) for i, word in enumerate(constraints.get(WORDS, []))]
    if SENTENCE in constraints:
        asked.append(("sentence", constraints[SENTENCE]))
    found = [(kind, story.find(part)) for kind, part in asked]
    return [(kind, at / len(story) if at >= 0 else None) for kind, at in found]


def lines(found):
    """A Markdown table of such places, a row for each kind."""
    yield "| |" + "".join(f" fifth {i + 1} |" for i in range(PARTS)) + " missing | n |"
    yield "|---|" + "---|" * (PARTS + 2)
    for kind in dict.fromkeys(kind for kind, _ in found):
        where = [place if place is None else int(PARTS * place) for other, place in found if other == kind]
        shares = [where.count(part) / len(where) for part in (*range(PARTS), None)]
        yield f"| {kind} |" + "".join(f" {share:.0%} |" for share in shares) + f" {len(where)} |"


def alike(constraints, stories):
    """A line: how many stories tell a sentence twice, and how many, at most, have one and the same beginning. Where a
    sentence is asked for, the story begins with it: those do not count."""
    free = [story[:BEGINNING] for asked, story in zip(constraints, stories) if SENTENCE not in asked]
    most = Counter(free).most_common(1)[0][1] if free else 0
    return (f"{len(stories)} stories: {sum(map(told_twice, stories))} tell a sentence twice; "
            f"of {len(free)} without an asked sentence {most} begin alike")


def main(argv=None):
    parser = command_line("Where in its stories does a model tell what is asked?")
    parser.add_argument("ckpt", type=Path, nargs="+", help="model directories")
    args = parser.parse_args(argv)
    rows = [row["constraints"] for row in read_rows(HANDWRITTEN)]
    try:
        for path in args.ckpt:
            model, tokenizer = load_model(path)
            written, *_ = write_stories(model.float().eval(), tokenizer, list(map(render, rows)), 1, SEED, SAMPLING)
            stories = [story for story, in written]
            found = [place for row, story in zip(rows, stories) for place in places(row, story)]
            print("\n".join([f"{path}\n", *lines(found), f"\n{alike(rows, stories)}\n"]), flush=True)
    except (ValueError, OSError) as e:
        fail(e)


if __name__ == "__main__":
    from study.places import main
    main()
