"""How varied, and how true, is the built-in corpus? python data/stats.py

Prints what data/README.md shows: variety, labels, summaries, duplicates, and the checks on the authored stories.
"""
import argparse
import lzma
import random
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tqdm import tqdm  # noqa: E402

from constraints import FEATURES, has_dialogue, sentences  # noqa: E402
from data import generate  # noqa: E402

XZ_CHARS = 1_100_000


def skeleton(made):
    """A story as the plot has it, each word replaced by its class: 一天，{who}在{place}{place.at}…"""
    of = {id(table): name for name, table in made["plot"]["lexicon"].items()}
    classes = {slot: "+".join(sorted({of[id(table)] for table in tables}))
               for slot, tables in made["plot"]["slots"].items()}
    named = (part.partition(".") if isinstance(part, generate.Slot) else None for part in made["told"])
    return "".join(part if name is None else f"{{{classes.get(name[0], name[0])}{name[1]}{name[2]}}}"
                   for part, name in zip(made["told"], named))


def longest_common_substring(a, b):
    """Length of the longest string that occurs in both."""
    n = 0
    for i in range(len(a)):
        while i + n < len(a) and a[i:i + n + 1] in b:
            n += 1
    return n


def bits_per_character(texts):
    data = "".join(texts)[:XZ_CHARS].encode("utf-16-le")
    return 8 * len(lzma.compress(data, preset=9)) / (len(data) / 2)


def han(text):
    return {c for c in text if "\u4e00" <= c <= "\u9fff"}


def grammar(n, seed):
    """Lines about n stories of the grammar."""
    _, plots = generate.load()
    made = [generate.compose(plots, random.Random(f"{seed}-{i}"))
            for i in tqdm(range(n), unit="story", file=sys.stderr)]
    records = [record for record, _ in made]
    texts = [record["text"] for record in records]
    share = Counter(what["plot"]["name"] for _, what in made)
    beats = [len(beat[1]) for plot in plots for ending in plot["endings"] for _, beat in ending["beats"]]
    yield "plots", f"{len(plots)}; the most frequent in {max(share.values()) / n:.2%} of stories"
    yield "fewest phrasings of a beat, endings of a plot, summaries of an ending", (
        f"{min(beats)}, {min(len(p['endings']) for p in plots)}, "
        f"{min(len(e['summary']) for p in plots for e in p['endings'])}")
    skeletons = Counter(s for _, what in made for s in sentences(skeleton(what)))
    yield "distinct sentence skeletons", (f"{len(skeletons):,}; the most frequent is "
                                          f"{max(skeletons.values()) / skeletons.total():.3%} of sentences")
    told = [s for text in texts for s in sentences(text)]
    yield "distinct sentences / sentences", f"{len(set(told)) / len(told):.3f}"
    yield "distinct Chinese characters", f"{len(set().union(*map(han, texts))):,}"
    words = {entry["word"] for plot in plots for table in plot["lexicon"].values() if table.get("pos")
             for entry in table["entries"]}
    everything = "\n".join(texts)
    yield "distinct content words (nouns, verbs, adjectives of the word lists that occur)", (
        f"{sum(word in everything for word in words):,}")
    lengths = sorted(map(len, texts))
    yield "characters a story: least, median, most", f"{lengths[0]}, {lengths[n // 2]}, {lengths[-1]}"

    yield "stories in which a labelled word is missing", sum(
        any(word not in r["text"] for word in r["words"]) for r in records)
    yield "stories in which the sentence does not stand exactly once", sum(
        r["text"].count(r["sentence"]) != 1 for r in records)
    yield "stories whose label 对话 is not what is seen in the text", sum(
        ("对话" in r["features"]) != has_dialogue(r["text"]) for r in records)
    for feature in FEATURES:
        yield f"share of stories with {feature}", f"{sum(feature in r['features'] for r in records) / n:.1%}"
    kinds = Counter(tuple(sorted(row["constraints"])) for row in generate.instructions(
        (r | {"story_id": ""} for r in records), seed))
    yield "combinations of constraint kinds, fewest and most instructions of one", (
        f"{len(kinds)}, {min(kinds.values())}, {max(kinds.values())}")

    summaries = [len(r["summary"]) for r in records]
    yield "characters a summary: least, most", f"{min(summaries)}, {max(summaries)}"
    copied = sum(longest_common_substring(r["summary"], r["text"]) >= 15 for r in records)
    yield "summaries that share 15 or more characters in a row with their story", f"{copied / n:.1%}"
    named = sum(any(what["values"][slot] in r["summary"] for slot in what["plot"]["slots"]
                    if slot in what["values"] and what["values"][slot] != what["values"][slot + ".kind"])
                for r, what in made)
    yield "summaries that name a character", f"{named / n:.1%}"
    yield "bits per character, xz -9 of 1.1 million characters in UTF-16LE", f"{bits_per_character(texts):.2f}"


def ceiling(n, seed):
    """Share of grammar stories that evaluate.py's rule tells to fit their own summary best among 20."""
    from evaluate import add_rivals, obedience
    rows = [{"constraints": row["constraints"], "story": row["output"]}
            for row in generate.instructions(generate.stories(n, seed), seed)]
    add_rivals(rows, seed)
    return obedience(rows, [[row["story"]] for row in rows], seed)["by_kind"]["摘要"]["rate"]


def duplicates(n, seed):
    """How often was a story made again while n different ones were made?"""
    last = None
    for last in tqdm(generate.stories(n, seed), total=n, unit="story", file=sys.stderr):  # noqa: B007
        pass
    return int(last["story_id"].rpartition("-")[2]) + 1 - n


def authored():
    """Lines about the stories written one by one."""
    records = generate.authored()
    texts = [record["text"] for record in records]
    grams = [{text[i:i + 5] for i in range(len(text) - 4)} for text in texts]
    alike = max(len(a & b) / len(a | b) for a, b in combinations(grams, 2))
    yield "authored stories, of these held out", f"{len(records)}, {sum(r['split'] == 'heldout' for r in records)}"
    yield "authored: characters a story, least and most", f"{min(map(len, texts))}, {max(map(len, texts))}"
    yield "authored: openings of 8 characters that two share", len(texts) - len({text[:8] for text in texts})
    yield "authored: highest Jaccard similarity of character 5-grams", f"{alike:.3f}"
    wrong = [r["story_id"] for r in records if any(word not in r["text"] for word in r["words"])
             or r["text"].count(r["sentence"]) != 1 or ("对话" in r["features"]) != has_dialogue(r["text"])]
    yield "authored: stories with a false word, sentence or 对话", len(wrong)
    for feature in FEATURES:
        yield f"authored: share with {feature}", f"{sum(feature in r['features'] for r in records) / len(records):.1%}"


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure the built-in corpus.")
    parser.add_argument("--n", type=int, default=20_000, help="stories of the grammar (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--unique", type=int, default=200_000, help="stories in which duplicates are looked for "
                                                                    "(default: %(default)s)")
    args = parser.parse_args(argv)
    print("| what | measured |\n|---|---|")
    for what, value in grammar(args.n, args.seed):
        print(f"| {what} | {value} |", flush=True)
    some = max(200, args.n // 10)
    lines = [(f"ceiling of evaluate.py's rule for 摘要, {some:,} stories", f"{ceiling(some, args.seed):.3f}"),
             (f"stories made again on the way to {args.unique:,} different ones", duplicates(args.unique, args.seed)),
             *authored()]
    for what, value in lines:
        print(f"| {what} | {value} |")


if __name__ == "__main__":
    main()
