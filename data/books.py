"""What the base model is pretrained on: the built-in stories, arranged as in children's readers.

    python data/books.py --n 150000 --seed 1 --out out/data/books.jsonl
    python data/books.py --n 80000 --seed 1 --exercises --out out/data/exercises.jsonl

A small model learns to copy from its context only where text repeats itself, and single stories give it little of that.
So a text here may have a title, a list of its new words and a one-sentence retelling behind it, a second story about
the same characters and things. There are no instructions in them: those are left to fine-tuning. The authored stories
come in between. Exercises are texts in which nothing but copying pays: a line, and the same line again.
"""
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tqdm import tqdm  # noqa: E402

import constraints  # noqa: E402
from common import check_writable, command_line, fail, positive, seed_number, write_jsonl  # noqa: E402
from data import generate  # noqa: E402

TITLE, NEW_WORDS, RETOLD, SECOND = 0.5, 0.4, 0.6, 0.5  # probabilities; RETOLD: of a story with a list of new words
AUTHORED = 0.01     # share of texts that are authored stories, in turn: 130 do not bear many repetitions
EXERCISED = 2000    # stories whose sentences are read out in exercises
AGAIN = 7           # times, at most, that an exercise repeats its line
# a general list of characters, GB2312 level 1: 3,755 common ones, by rows 16 to 55 of its table
CHARACTERS = bytes(byte for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF) for byte in (row, cell)).decode(
    "gb2312", errors="ignore")


def book(forms, plots, key, rng):
    """-> a text of one or two stories."""
    record, made = generate.compose(plots, random.Random(key))
    parts = [record["text"]]
    values = made["values"]
    if "hero" in values and rng.random() < TITLE:
        parts.insert(0, rng.choice(forms["title"]).format(hero=values["hero"], full=values["hero.full"],
                                                          thing=values[made["plot"]["central"]]))
    if rng.random() < NEW_WORDS:
        parts.append(rng.choice(forms["new_words"]).format(words="、".join(record["words"])))
        if rng.random() < RETOLD:
            parts.append(rng.choice(forms["retold"]).format(summary=record["summary"]))
    if rng.random() < SECOND:
        second, _ = generate.compose(plots, random.Random(f"{key}-second"), like=made)
        parts += ["", rng.choice(forms["next_story"]) + second["text"]]
    return "\n".join(parts)


def load():
    """-> (plots, phrasings of books.toml). Raises ValueError for bad language files."""
    _, plots = generate.load()
    path = generate.LANGUAGE / "books.toml"
    forms = generate.read_toml(path)
    generate.check(forms, path, dict.fromkeys(("title", "new_words", "retold", "next_story", "again"), list), {})
    return plots, forms


def texts(n, seed):
    """Yield n books, made one by one. Raises ValueError for bad language files."""
    plots, forms = load()
    rng = random.Random(f"books-{seed}")
    authored = [record["text"] for record in generate.authored("train")]
    rng.shuffle(authored)
    told = 0
    for i in range(n):
        if rng.random() < AUTHORED:
            yield authored[told % len(authored)]
            told += 1
        else:
            yield book(forms, plots, f"{seed}-{i}", rng)


def lines(plots, rng):
    """{kind of line: a function that draws one}: sentences of stories, words of the lexicon, characters at random."""
    words = sorted({word for plot in plots for word in plot["slot_words"]})
    sentences = [sentence for _ in range(EXERCISED)
                 for sentence in constraints.sentences(generate.compose(plots, rng)[0]["text"])]
    return {"sentences": lambda: "".join(rng.sample(sentences, rng.choice((1, 1, 2)))),
            "words": lambda: "、".join(rng.sample(words, rng.randint(2, 10))),
            "characters": lambda: "".join(rng.choices(CHARACTERS, k=rng.randint(4, 16)))}


def exercises(n, seed):
    """Yield n exercises, as different kinds of lines in turn. Raises ValueError for bad language files."""
    plots, forms = load()
    rng = random.Random(f"exercises-{seed}")
    kinds = list(lines(plots, rng).values())
    for i in range(n):
        line = kinds[i % len(kinds)]()
        yield "\n".join([line] + [rng.choice(forms["again"]) + line for _ in range(rng.randint(1, AGAIN))])


def main(argv=None):
    parser = command_line("Write the texts that the base model is pretrained on.")
    parser.add_argument("--n", type=positive(int), default=10_000, help="number of texts (default: %(default)s)")
    parser.add_argument("--seed", type=seed_number, default=1, help="same seed, same texts (default: %(default)s)")
    parser.add_argument("--exercises", action="store_true", help="lines that are repeated, instead of books")
    parser.add_argument("--out", default="out/data/books.jsonl", help="JSONL records with a text; overwritten")
    args = parser.parse_args(argv)
    try:
        check_writable(Path(args.out).parent)
        made = (exercises if args.exercises else texts)(args.n, args.seed)
        told = tqdm(made, total=args.n, unit="text", disable=None)
        write_jsonl(args.out, ({"text": text} for text in told))
    except (ValueError, OSError) as e:
        fail(e)
    print(f"{args.n} texts -> {args.out}")


if __name__ == "__main__":
    from data.books import main
    main()
