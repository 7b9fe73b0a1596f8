"""How varied, and how true, is the built-in corpus? python study/stats.py

Prints what data/README.md shows: variety, labels, summaries, duplicates, and the checks on the authored stories.
"""
import lzma
import random
import sys
from collections import Counter
from itertools import chain, combinations, product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import command_line, positive  # noqa: E402

from tqdm import tqdm  # noqa: E402

from constraints import FEATURES, SENTENCE, SUMMARY, WORDS, has_dialogue, sentences  # noqa: E402
from data import generate, language  # noqa: E402
from data.judged import add_rivals  # noqa: E402
from data.language import Slot  # noqa: E402
from evaluate import obedience, repetition  # noqa: E402
from study.places import places  # noqa: E402

XZ_CHARS = 1_100_000
OPENING = 2    # sentences
BESIDE = 2000  # stories of the grammar that the authored ones are compared with


def skeleton(source):
    """A story as the plot has it, each word replaced by its class: 一天，{who}在{place}{place.at}… source: what
    generate.compose made it from."""
    of = {id(table): name for name, table in source["plot"]["lexicon"].items()}
    classes = {slot: "+".join(sorted({of[id(table)] for table in tables}))
               for slot, tables in source["plot"]["slots"].items()}
    parts = ""
    for part in chain(*source["beats"]):
        if isinstance(part, Slot):
            name, dot, column = part.partition(".")
            part = f"{{{classes.get(name, name)}{dot}{column}}}"
        parts += part
    return parts


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


def names(source):
    """Of the characters of a story: 豆豆, not 小兔."""
    values = source["values"]
    return [values[slot] for slot in (source["plot"]["slots"] if source["plot"] else ["hero"])
            if slot in values and values[slot] != values[slot + ".kind"]]


def world_lines(world, stories):
    """Lines about the language files, and how often what is in them is used."""
    opened = [plot for plot in world["plots"] if plot["open"]]
    beats = [len(every) for plot in opened for ending in plot["endings"] for _, (_, every) in ending["beats"]]
    yield "plots, of these open", f"{len(world['plots'])}, {len(opened)}"
    yield "open plots: fewest phrasings of a beat, endings, summaries of an ending", (
        f"{min(beats)}, {min(len(p['endings']) for p in opened)}, "
        f"{min(len(e['summary']) for p in opened for e in p['endings'])}")
    words = [table for table in world["lexicon"].values() if table.get("open")]
    yield "words of open classes, of these held out", (
        f"{sum(len(table['entries']) for table in words):,}, {len(generate.held_out_words())}")
    yield "scenes, fewest of a class", (f"{sum(map(len, world['scenes'].values())):,}, "
                                        f"{min(map(len, world['scenes'].values()))}")
    said = [texts for setting in world["later"].values() for heading, texts in setting.items() if heading != "主角"]
    yield "settings behind a summary, sentences in all", f"{len(world['later'])}, {sum(map(len, said))}"
    yield "summaries that are retold, for training and for judging", ", ".join(
        str(len(generate.authored_summaries(split))) for split in ("train", "heldout"))
    yield "shapes of free sentences", len(world["sentences"])
    share = Counter(source["plot"]["name"] for _, source in stories if source["plot"])
    yield "the most frequent plot", f"{max(share.values()) / share.total():.2%} of stories that have one"


def free_sentences(world, n, seed):
    """Lines about sentences that belong to no plot."""
    rng = random.Random(seed)
    shapes = Counter(id(rng.choice(world["sentences"])) for _ in range(n))
    some = {generate.free_sentence(world, rng, held_out=True) for _ in range(n)}
    yield "free sentences: the most frequent shape", f"{max(shapes.values()) / n:.2%}"
    # if k of n draws differ, there are about n² / 2(n - k) equally likely ones
    yield "free sentences: different ones, about", f"{n * n / (2 * max(1, n - len(some))):,.0f}"


def grammar(n, seed):
    """Lines about n stories of the grammar."""
    world = language.load()
    stories = []
    for i in tqdm(range(n), unit="story"):
        rng = random.Random(f"{seed}-{i}")
        kinds = generate.COMBINATIONS[i % len(generate.COMBINATIONS)]
        stories.append(generate.compose(world, rng, rng.sample(kinds, len(kinds))))
    records = [record for record, _ in stories]
    texts = [record["text"] for record in records]
    rows = list(generate.instructions((record | {"story_id": ""} for record in records), seed))
    yield from world_lines(world, stories)
    yield from free_sentences(world, n, seed)
    at = sorted(place for row in rows for _, place in places(row["constraints"], row["output"]))
    yield "place of asked words and sentences in their story: median, share in the first third", (
        f"{at[len(at) // 2]:.2f}, {sum(place < 1 / 3 for place in at) / len(at):.0%}")
    opened = [part in "".join(sentences(row["output"])[:OPENING]) for row in rows
              for part in (*row["constraints"].get(WORDS, ()), row["constraints"].get(SENTENCE)) if part]
    yield f"asked words and sentences that stand in the first {OPENING} sentences", f"{sum(opened) / len(opened):.0%}"
    plots = [(record, source) for record, source in stories if source["plot"]]
    woven = [word in {source["values"].get(slot + ".kind") for slot in source["plot"]["slots"]}
             for record, source in plots for word in record["asked"].get(WORDS, [])]
    yield "asked words that fill a slot of the plot", f"{sum(woven) / len(woven):.0%}"
    woven = [word in record["summary"] for record, source in stories if not source["plot"]
             for word in record["asked"].get(WORDS, [])]
    yield "asked words that stand in the asked summary", f"{sum(woven) / len(woven):.0%}"
    skeletons = Counter(s for _, source in plots for s in sentences(skeleton(source)))
    yield "distinct sentence skeletons of plots", (f"{len(skeletons):,}; the most frequent is "
                                          f"{max(skeletons.values()) / skeletons.total():.3%} of sentences")
    every = [s for text in texts for s in sentences(text)]
    yield "distinct sentences / sentences", f"{len(set(every)) / len(every):.3f}"
    yield "distinct Chinese characters", f"{len(set().union(*map(han, texts))):,}"
    words = {word for plot in world["plots"] for table in plot["lexicon"].values() if table.get("pos")
             for word in table["by_word"]}
    everything = "\n".join(texts)
    yield "distinct content words (nouns, verbs, adjectives of the word lists that occur)", (
        f"{sum(word in everything for word in words):,}")
    yield "repeated 4-grams, as evaluate.py counts them", f"{repetition(texts)['rep4']:.2%}"
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
    kinds = Counter(tuple(sorted(row["constraints"])) for row in rows)
    yield "combinations of constraint kinds, fewest and most instructions of one", (
        f"{len(kinds)}, {min(kinds.values())}, {max(kinds.values())}")

    summaries = [len(r["summary"]) for r in records]
    yield "characters a summary: least, most", f"{min(summaries)}, {max(summaries)}"
    copied = [longest_common_substring(record["summary"], record["text"]) >= 15 for record, _ in plots]
    yield "summaries of plots that share 15 or more characters in a row with their story", (
        f"{sum(copied) / len(copied):.1%}")
    named = sum(any(name in record["summary"] for name in names(source)) for record, source in stories)
    yield "summaries that name a character", f"{named / n:.1%}"
    yield "bits per character, xz -9 of 1.1 million characters in UTF-16LE", f"{bits_per_character(texts):.2f}"


def ceiling(n, seed):
    """Share of grammar stories that evaluate.py's rule tells to fit their own summary best among 20."""
    rows = [{"constraints": row["constraints"], "story": row["output"]}
            for row in generate.instructions(generate.stories(n, seed), seed)]
    add_rivals(rows, seed)
    return obedience(rows, [[row["story"]] for row in rows], seed)["by_kind"][SUMMARY]["rate"]


def duplicates(n, seed):
    """How often was a story made again while n different ones were made?"""
    *_, last = (record["story_id"] for record in tqdm(generate.stories(n, seed), total=n, unit="story"))
    return int(last.rpartition("-")[2]) + 1 - n


def grams(text):
    return {text[i:i + 5] for i in range(len(text) - 4)}


def most_alike(pairs):
    """The highest Jaccard similarity of character 5-grams of pairs of `grams`."""
    return max(len(a & b) / len(a | b) for a, b in pairs)


def authored(seed):
    """Lines about the stories written one by one."""
    records = generate.authored()
    texts = [record["text"] for record in records]
    own = list(map(grams, texts))
    generated = [grams(record["text"]) for record in generate.stories(BESIDE, seed)]
    yield "authored stories, of these held out", f"{len(records)}, {sum(r['split'] == 'heldout' for r in records)}"
    yield "authored: characters a story, least and most", f"{min(map(len, texts))}, {max(map(len, texts))}"
    yield "authored: openings of 8 characters that two share", len(texts) - len({text[:8] for text in texts})
    yield "authored: highest Jaccard similarity of character 5-grams", f"{most_alike(combinations(own, 2)):.3f}"
    yield f"authored: the same, to {BESIDE:,} stories of the grammar", f"{most_alike(product(own, generated)):.3f}"
    wrong = [r["story_id"] for r in records if any(word not in r["text"] for word in r["words"])
             or r["text"].count(r["sentence"]) != 1 or ("对话" in r["features"]) != has_dialogue(r["text"])]
    yield "authored: stories with a false word, sentence or 对话", len(wrong)
    for feature in FEATURES:
        yield f"authored: share with {feature}", f"{sum(feature in r['features'] for r in records) / len(records):.1%}"


def main(argv=None):
    parser = command_line("Measure the built-in corpus.")
    parser.add_argument("--n", type=positive(int), default=20_000, help="stories of the grammar (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--unique", type=positive(int), default=200_000,
                        help="stories in which duplicates are looked for (default: %(default)s)")
    args = parser.parse_args(argv)
    print("| what | measured |\n|---|---|")
    for what, value in grammar(args.n, args.seed):
        print(f"| {what} | {value} |", flush=True)
    some = max(200, args.n // 10)
    lines = [(f"ceiling of evaluate.py's rule for 摘要, {some:,} stories", f"{ceiling(some, args.seed):.3f}"),
             (f"stories made again on the way to {args.unique:,} different ones", duplicates(args.unique, args.seed)),
             *authored(args.seed)]
    for what, value in lines:
        print(f"| {what} | {value} |")


if __name__ == "__main__":
    from study.stats import main
    main()
