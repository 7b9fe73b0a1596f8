"""What the base model is pretrained on: the built-in stories, arranged as in children's readers.

    python data/books.py --n 100000 --seed 1 --out out/data/books.jsonl

A small model learns to copy from its context only where text repeats itself, and single stories give it little of that.
So a text here may have a title, a list of its new words and a one-sentence retelling behind it, a second story about
the same characters and things; and some texts are words or sentences to be read out twice. There are no instructions
in them: those are left to fine-tuning. The authored stories come in between.
"""
import argparse
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tqdm import tqdm  # noqa: E402

import constraints  # noqa: E402
from data import generate  # noqa: E402

TITLE, NEW_WORDS, RETOLD, SECOND = 0.5, 0.4, 0.6, 0.5  # probabilities; RETOLD: of a story with a list of new words
RECITED = 0.15      # share of texts that are words or sentences read out twice
AUTHORED = 0.01     # share of texts that are authored stories, in turn: 130 do not bear many repetitions
RECENT = 3000       # sentences, the newest ones, of which some are read out


def book(forms, plots, key, rng):
    """-> a text of one or two stories, and the sentences of the first."""
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
    return "\n".join(parts), constraints.sentences(record["text"])


def recitation(forms, words, sentences, rng):
    """Words or sentences, and the same once or twice more."""
    if not sentences or rng.random() < 0.6:
        line = "、".join(rng.sample(words, rng.randint(3, 20)))
    else:
        line = "".join(rng.choice(sentences) for _ in range(rng.randint(1, 5)))
    return "\n".join([line] + [rng.choice(forms["again"]) + line for _ in range(rng.choice((1, 1, 2)))])


def texts(n, seed):
    """Yield n texts, made one by one. Raises ValueError for bad language files."""
    _, plots = generate.load()
    path = generate.LANGUAGE / "books.toml"
    forms = generate.read_toml(path)
    generate.check(forms, path, dict.fromkeys(("title", "new_words", "retold", "next_story", "again"), list), {})
    words = sorted({entry["word"] for plot in plots for table in plot["lexicon"].values()
                    if table.get("pos") and not table.get("in_text") for entry in table["entries"]})
    rng = random.Random(f"books-{seed}")
    authored = [record["text"] for record in generate.authored("train")]
    rng.shuffle(authored)
    told, recent = 0, []
    for i in range(n):
        kind = rng.random()
        if kind < AUTHORED:
            yield authored[told % len(authored)]
            told += 1
        elif kind < AUTHORED + RECITED:
            yield recitation(forms, words, recent, rng)
        else:
            text, sentences = book(forms, plots, f"{seed}-{i}", rng)
            recent = (recent + sentences)[-RECENT:]
            yield text


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write the texts that the base model is pretrained on.")
    parser.add_argument("--n", type=int, default=10_000, help="number of texts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="same seed, same texts (default: %(default)s)")
    parser.add_argument("--out", default="out/data/books.jsonl", help="JSONL records with a text; overwritten")
    args = parser.parse_args(argv)
    try:
        told = tqdm(texts(args.n, args.seed), total=args.n, unit="text", disable=None)
        generate.write_jsonl(({"text": text} for text in told), args.out)
    except (ValueError, OSError) as error:
        print(f"books.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.n} texts -> {args.out}")


if __name__ == "__main__":
    from data.books import main
    main()
