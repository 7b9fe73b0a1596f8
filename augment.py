"""Real instruction data in, clean and leak-free training data out: python augment.py IN... --out out/data/NAME

Reads translation caches {id: "特点：…\\n故事：…"}, Alpaca rows, TinyStories-Instruct text, rows of TinyStoriesChinese,
our own records and plain stories, in any mix. Writes train.jsonl and val.jsonl (`train_sft.py --data out/data/NAME`),
rejected.jsonl and report.json.

    read      rows of any format -> constraints and a story
    clean     mend or drop stories and labels (--clean)
    extract   constraints of the story itself, where a record has none (--extract)
    split     by story, near-duplicates on one side, before anything is multiplied
    permute   each training record in several orders of its constraints (--permute)
"""
import json
import math
import random
import re
import sys
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

import tokenizer as tokenizers
from common import (
    check_new,
    command_line,
    fail,
    fraction,
    new_directory,
    not_negative,
    positive,
    write_json,
    write_jsonl,
)
from constraints import (
    FEATURE,
    FEATURES,
    KEYS,
    LIST_KEYS,
    SENTENCE,
    SUMMARY,
    WORDS,
    check,
    fold,
    has_dialogue,
    parse_record,
    permutations,
    render,
)
from records import BOM, RowError, instruction_of, refuse_other_formats, scan_stream, story_hash, text_field

NEAR_LIMIT = 200_000  # records up to which near-duplicates are looked for
SHINGLE, BANDS, BAND = 8, 32, 8  # characters of a shingle; 32 bands of 8 minima find 99.7% of pairs of Jaccard 0.8
NEAR = 0.8
CHINESE = re.compile("[\u4e00-\u9fff]")


@dataclass(slots=True)
class Record:
    constraints: dict  # by key, in the order of the row; an empty list of 词汇 waits for `choose_words`
    story: str
    story_id: str
    hash: int  # the same for all records of a story


# ---- read ----

def read(args, tokenizer, df, report):
    """All files -> (records, rejected rows). Counts in `report` what it did, in `df` the stories that a candidate for
    词汇 occurs in. Raises ValueError for a file without a usable row."""
    records, rejected = [], []
    for path in args.files:
        before, rows, first = len(records), 0, None
        for row, given in tqdm(read_rows(path), desc=f"reading {path.name}", unit="row", disable=None):
            rows += 1
            changed = Counter()
            try:
                constraints, preamble, story, story_id = read_row(path, row, given)
                constraints, story = usable(constraints, story, changed)
                if args.clean:
                    constraints, story = clean(constraints, story, args.keep, changed)
                constraints = {key: value for key, value in constraints.items() if value}
                if args.extract:
                    constraints = extract(constraints, story, args, tokenizer, df)
                if not constraints:
                    raise ValueError("no constraints" + (
                        f" ({'; '.join(changed)})" if changed else
                        "" if args.extract else " (--extract makes them of the story)"))
            except ValueError as e:
                where = f"{path}: row {row}"
                reason = str(e).removeprefix(where).lstrip(": ")
                first = first or (str(e) if str(e).startswith(where) else f"{where}: {e}")
                report["rejected"][re.sub(r"\d+", "N", reason)] += 1
                rejected.append({"file": str(path), "row": row, "reason": reason, "raw": raw_text(given)})
                continue
            report["changed"].update(changed)
            report["leading sentences left out"].update([preamble[:80]] if preamble else [])
            digest = story_hash(story)
            records.append(Record(constraints, story, story_id or f"{digest:016x}", digest))
        if len(records) == before:
            raise ValueError(f"no usable row; {first}" if first else f"{path}: no rows")
        report["inputs"].append({"file": str(path), "bytes": path.stat().st_size, "rows": rows,
                                 "records": len(records) - before})
    report["records"] = len(records)
    return records, rejected


def read_rows(path):
    """Yield (row, record or RowError): of JSON by records.py; of text the blocks that <|endoftext|> closes, as str."""
    with open(path, "rb") as f:
        head = f.read(1 << 16).removeprefix(BOM).lstrip().split(b"\n")
        f.seek(0)
        if any(line.lstrip().startswith((b"{", b"[")) for line in head):
            yield from scan_stream(f, path)
            return
        refuse_other_formats(path, head[0])
        for row, block in enumerate(f.read().split(b"<|endoftext|>"), 1):
            if block.strip():
                try:
                    yield row, block.decode("utf-8-sig")
                except UnicodeDecodeError:
                    yield row, RowError(f"{path}: row {row} is not UTF-8", block.decode("utf-8", "replace"))


def read_row(path, row, record):
    """-> (constraints, preamble, story, story_id or None). Raises ValueError saying what is wrong with the row."""
    if isinstance(record, RowError):
        raise record
    if isinstance(record, str):  # of a translation cache or of TinyStories-Instruct
        return *parse_record(text_field(path, row, {"text": record}, ["text"])), None
    story = text_field(path, row, record, ["output", "story_zh", "text", "story"])
    given = {FEATURE: record.get("features"), WORDS: record.get("words"), SENTENCE: record.get("sentence"),
             SUMMARY: record.get("summary")}
    lines = []
    if isinstance(record.get("instruction"), dict):  # TinyStoriesChinese
        given |= {WORDS: record["instruction"].get("words"), FEATURE: record["instruction"].get("features")}
    elif "constraints" in record:
        given = record["constraints"]
        if not isinstance(given, dict):
            raise ValueError(f"{path}: row {row}: 'constraints' is {type(given).__name__}, not an object")
    else:
        lines.append(instruction_of(path, row, record, required=False))
    for key, value in given.items():
        items = value if isinstance(value, list) else [value] if value else []
        if not all(isinstance(item, str) for item in items):
            raise ValueError(f"{path}: row {row}: {key} is not made of strings")
        lines.append(f"{key}：{('，' if key in LIST_KEYS else '').join(items)}")
    text = text_field(path, row, {"text": "\n".join([*lines, f"故事：{story}"])}, ["text"])
    story_id = record.get("story_id")
    return *parse_record(text), story_id if isinstance(story_id, str) else None


def raw_text(given):
    """The beginning of a row for rejected.jsonl."""
    text = given.raw if isinstance(given, RowError) else given
    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    return text[:2000].encode("utf-8", "backslashreplace").decode()  # half of a surrogate pair is no character


def usable(constraints, story, counts):
    """Leave out what can be no constraint: unknown features, and English words and summaries of a Chinese story, as
    rows of TinyStoriesChinese carry them. Raises ValueError without a story. Counts what is left out."""
    if not story:
        raise ValueError("no story")
    for name in [name for name in constraints.get(FEATURE, []) if name not in FEATURES]:
        counts[f"left out: unknown feature {name}"] += 1
        constraints[FEATURE].remove(name)
    if CHINESE.search(story):
        for word in [w for w in constraints.get(WORDS, []) if not CHINESE.search(w) and w not in story]:
            counts["left out: word of another language"] += 1
            constraints[WORDS].remove(word)
        if SUMMARY in constraints and not CHINESE.search(constraints[SUMMARY]):
            counts["left out: summary of another language"] += 1
            del constraints[SUMMARY]
    return constraints, story


# ---- clean (--clean) ----

CHECKS = ("cut", "residue", "english", "repeats", "labels")
CLOSING = r"[”’」』\"'）)]"
FULL_STOP = rf"\.+(?=\s|$|{CLOSING})"  # no decimal point
SENTENCES = re.compile(rf"(?:[^。！？!?…\n.]|(?!{FULL_STOP})\.)*(?:[。！？!?…]+|{FULL_STOP}|\n|$){CLOSING}*\s*")
ENDING = re.compile(rf"[。！？!?…~～.—”」』\"]{CLOSING}*\Z")
BEHIND = r"(?:^|(?<=[。！？!?…”」\"\n]))\s*"  # 老师总结：… is part of a story
RESIDUE = re.compile("|".join((
    rf"{BEHIND}(?:总结一下|总结|小结)[：:，,]",
    rf"{BEHIND}(?:这个|我们的)?故事(?:就?到此|到这里)?(?:就?结束|讲完|完)(?:了|啦)?[。！!]?\s*\Z",
    r"[（(【](?:全文)?(?:完|剧终)[）)】]\s*\Z", r"\bThe end\.?\s*\Z", r"<\|endoftext\|>",
    r"^(?:以上就是|希望你喜欢)[^\n]*\Z")), re.M | re.I)
ENGLISH = re.compile(r"[A-Za-z]*[a-z]{2,}[A-Za-z]*")
SHORTEST = 0.6  # of a story that must be left when its end is cut off


def clean(constraints, story, keep, counts):
    """Mend a story, and leave out labels that it does not meet. -> (constraints, story). Raises ValueError when it
    cannot be mended; counts what was mended. keep: names of CHECKS that are left alone."""
    whole = len(story)
    if "residue" not in keep and (found := RESIDUE.search(story, whole // 3)):
        story = story[:found.start()].rstrip()
        counts["mended: residue behind the story"] += 1
    if "repeats" not in keep:
        sentences = SENTENCES.findall(story)
        kept = [s for i, s in enumerate(sentences) if not i or fold(s) != fold(sentences[i - 1]) or len(fold(s)) < 4]
        if len(kept) < len(sentences):
            story = "".join(kept).rstrip()
            counts["mended: a sentence twice in a row"] += 1
        often = Counter(fold(s) for s in kept if len(fold(s)) >= 6)
        if often and max(often.values()) > 3:
            raise ValueError("clean: a sentence comes more than three times")
    if "cut" not in keep and not ENDING.search(story):
        story = "".join(SENTENCES.findall(story)[:-2]).rstrip()  # the last match is the empty one behind the end
        if not ENDING.search(story):
            raise ValueError("clean: cut in the middle of a sentence")
        counts["mended: cut in the middle of a sentence"] += 1
    if len(story) < SHORTEST * whole:
        raise ValueError("clean: too little of the story is left")
    if "english" not in keep and CHINESE.search(story) and ENGLISH.search(story):
        raise ValueError("clean: mixed with English")
    if "labels" not in keep:
        drop_false_labels(constraints, story, counts)
    return constraints, story


def drop_false_labels(constraints, story, counts):
    """Take out what the story does not have: words, the sentence, 对话. What no rule can tell stays."""
    for key, met in check(story, constraints).items():
        if key in LIST_KEYS:
            for item in [item for item, holds in met.items() if holds is False]:
                counts[f"left out: {key} that is not in the story"] += 1
                constraints[key].remove(item)
        elif met is False:
            counts[f"left out: {key} that is not in the story"] += 1
            constraints[key] = ""


# ---- extract (--extract) ----

EXTRACTS = ("words", "sentence", "features")

# In a word of more than one character these are signs of a piece that is cut across words.
FUNCTION = re.compile("[的了着过吗呢吧啊呀哦是在我你他她它们这那和与就也都还又很把被给对从到向不没有个只条一两几"
                      "上下里去来说道想要会能让地得之为于其而且但却才再]")


def candidate_words(story, tokenizer):
    """Words that a story could be asked for: pieces of the tokenizer of two or more characters -> how often each."""
    pieces = Counter(tokenizer.sp.encode_as_pieces(story))
    return {piece: n for piece, n in pieces.items()
            if len(piece) >= 2 and len(CHINESE.findall(piece)) == len(piece) and not FUNCTION.search(piece)}


def candidate_sentences(story):
    """Sentences of 6 to 30 characters that stand in the story once, with quotation marks that close."""
    found = [s.strip() for s in SENTENCES.findall(story)]
    return [s for s in found if 6 <= len(s) <= 30 and len(fold(s)) >= 5 and story.count(s) == 1
            and all(s.count(a) == s.count(b) for a, b in ("“”", "「」", "『』", "‘’", "（）"))
            and s.count('"') % 2 == 0]


def extract(constraints, story, args, tokenizer, df):
    """Add constraints of the asked kinds that the record lacks: a random choice of those that the story offers, so
    that single and combined ones both come. 词汇 stays empty until all stories have been seen: see `choose_words`."""
    rng = random.Random(f"{args.seed}-{fold(story)}")
    offered, words = {}, {}
    if "words" in args.extract and WORDS not in constraints:
        words = candidate_words(story, tokenizer)
        if len(words) >= 2:
            offered[WORDS] = []
    if "sentence" in args.extract and SENTENCE not in constraints and (found := candidate_sentences(story)):
        offered[SENTENCE] = rng.choice(found)
    if "features" in args.extract and FEATURE not in constraints and has_dialogue(story):
        offered[FEATURE] = ["对话"]
    chosen = [key for key in offered if rng.random() < 0.5]
    if not constraints and offered and not chosen:
        chosen = [rng.choice(list(offered))]
    if WORDS in chosen:
        df.update(words.keys())
    items = [*constraints.items(), *((key, offered[key]) for key in chosen)]
    rng.shuffle(items)
    return dict(items)


def choose_words(story, candidates, df, stories, rng):
    """Two or three words out of the best by tf-idf, in random order."""
    def score(word):
        return candidates[word] * math.log(stories / (1 + df[word]))
    best = sorted(candidates, key=lambda word: (-score(word), word))[:5]
    return rng.sample(best, min(len(best), rng.choice((2, 3, 3))))


# ---- split ----

def split(records, args):
    """-> (validation: (N,) bool, clusters of near-duplicates: (N,), were these looked for?). Raises ValueError."""
    hashes, first, story = np.unique(np.array([record.hash for record in records], np.uint64),
                                     return_index=True, return_inverse=True)
    near = not args.exact and len(records) <= NEAR_LIMIT
    clusters = near_duplicates([fold(records[i].story) for i in first]) if near else np.arange(len(hashes))
    val = validation(hashes, clusters, args.val_fraction)
    if val.all():
        raise ValueError(f"--val-fraction {args.val_fraction} leaves no story to train on")
    return val[story], clusters[story], near


def validation(hashes, clusters, val_fraction):
    """-> (N,) bool, True for validation. A cluster stands where the one of its stories does whose hash is the lowest
    after mixing (the lowest itself would draw large clusters to validation)."""
    order = np.argsort(hashes * np.uint64(0x9E3779B97F4A7C15))
    names, first = np.unique(clusters[order], return_index=True)
    places = hashes[order[first]][np.searchsorted(names, clusters)] / 2**64
    return places < (max(val_fraction, np.nextafter(places.min(), 1)) if val_fraction else 0)


def shingles(text):
    """Hashes (32 bits) of every SHINGLE characters in a row, sorted; of the whole text if it is shorter."""
    starts = range(max(1, len(text) - SHINGLE + 1))
    return np.unique(np.array([zlib.crc32(text[i:i + SHINGLE].encode()) for i in starts], np.uint32))


def near_duplicates(texts):
    """Folded texts -> (N,) the number of the cluster that each is in. MinHash in bands (Broder 1997) finds the pairs to
    compare; they are near-duplicates if the Jaccard similarity of their shingles is at least NEAR."""
    rng = np.random.default_rng(0)
    multipliers = rng.integers(1 << 31, size=(BANDS * BAND, 1), dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    mixers = rng.integers(1 << 62, size=BAND, dtype=np.uint64)
    sets = [shingles(text) for text in tqdm(texts, desc="near-duplicates", unit="story", disable=None)]
    # each minimum is the first shingle in another random order of all
    bands = np.stack([((s * multipliers).min(1).reshape(BANDS, BAND) * mixers).sum(1) for s in sets])
    parent = list(range(len(sets)))

    def root(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    @cache
    def alike(i, j):
        common = len(np.intersect1d(sets[i], sets[j], assume_unique=True))
        return common >= NEAR * (len(sets[i]) + len(sets[j]) - common)

    for band in bands.T:
        order = np.argsort(band, kind="stable")
        for same in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
            leaders = []  # one text of each cluster, so that a thousand copies take a thousand comparisons
            for i in same.tolist() if len(same) > 1 else ():
                leader = next((j for j in leaders if root(i) == root(j) or alike(j, i)), None)
                if leader is None:
                    leaders.append(i)
                else:
                    parent[root(i)] = root(leader)
    return np.array([root(i) for i in parent])


# ---- permute ----

def make_rows(record, permute, args, tokenizer, df, stories):
    """Yield the rows of a record: `permute` ("all" or a number) different orders of its constraints, as far as there
    are so many; 1 is the order that it has."""
    constraints = dict(record.constraints)
    rng = random.Random(f"{args.seed}-{record.story_id}-{render(constraints)}")
    if constraints.get(WORDS) == []:
        constraints[WORDS] = choose_words(record.story, candidate_words(record.story, tokenizer), df, stories, rng)
    orders = [constraints]
    if permute != 1:
        orders = list(permutations(constraints))
        rng.shuffle(orders)
    for order in orders if permute == "all" else orders[:permute]:
        yield {"instruction": render(order), "input": "", "output": record.story, "constraints": order,
               "story_id": record.story_id}


# ---- the command ----

def augment(args):
    """All stages, one after the other. -> the report. Raises ValueError and OSError."""
    check_new(args.out, args.overwrite, "report.json")
    base = Path(__file__).parent / "base"
    tokenizer = tokenizers.load(args.tokenizer or base) if "words" in args.extract else None

    df, report = Counter(), {"inputs": [], "records": 0, "rejected": Counter(), "changed": Counter(),
                             "leading sentences left out": Counter()}
    records, rejected = read(args, tokenizer, df, report)
    val, clusters, near = split(records, args)
    report |= describe(args, records, val, clusters, near)
    for name, most in (("rejected", None), ("changed", None), ("leading sentences left out", 5)):
        report[name] = dict(report[name].most_common(most))

    with new_directory(args.out) as work:
        for name, of_val in (("train", False), ("val", True)):
            chosen = [i for i in range(len(records)) if val[i] == of_val]
            write_jsonl(work / f"{name}.jsonl", (
                row for i in tqdm(chosen, desc=f"writing {name}.jsonl", unit="record", disable=None)
                for row in make_rows(records[i], 1 if of_val else args.permute, args, tokenizer, df, len(records))))
        write_jsonl(work / "rejected.jsonl", rejected)
        write_json(work / "report.json", report)
    return report


def describe(args, records, val, clusters, near):
    """-> what the report says of split and rows."""
    most = math.inf if args.permute == "all" else args.permute
    train = [(record, min(math.factorial(len(record.constraints)), most))  # and its number of rows
             for record, of_val in zip(records, val) if not of_val]
    rows = sum(n for _, n in train)
    exposure, by_number, by_kind = Counter(), defaultdict(list), Counter()
    for record, n in train:
        exposure[record.hash] += n
        by_number[len(record.constraints)].append(n)
        by_kind.update(dict.fromkeys(record.constraints, n))
    siblings = Counter(clusters.tolist())
    return {
        "split": {
            "val_fraction": args.val_fraction, "train_records": len(train), "val_records": len(records) - len(train),
            "train_stories": len(exposure), "val_stories": len({r.hash for r in records}) - len(exposure),
            "near_duplicates": f"on one side: {SHINGLE}-grams of characters, Jaccard at least {NEAR}" if near else
                               f"not looked for: {'--exact' if args.exact else f'more than {NEAR_LIMIT:,} records'}",
            "records_with_a_near_duplicate": sum(n for n in siblings.values() if n > 1) if near else None,
        },
        "rows": {"before": len(train), "after": rows, "per_record": round(rows / len(train), 3),
                 "validation": len(records) - len(train)},
        "exposure": {"rows_per_story": {"least": min(exposure.values()), "mean": round(rows / len(exposure), 3),
                                        "most": max(exposure.values())},
                     "mean_by_number_of_constraints": {n: round(sum(ns) / len(ns), 3)
                                                       for n, ns in sorted(by_number.items())}},
        "rows_by_number_of_constraints": {n: sum(ns) for n, ns in sorted(by_number.items())},
        "rows_by_kind": {key: by_kind[key] for key in KEYS},
        "settings": {name: str(value) if isinstance(value, Path) else value
                     for name, value in vars(args).items() if name not in ("files", "out", "overwrite")},
    }


def by_commas(text):
    return tuple(filter(None, text.split(",")))


def orders(text):
    return text if text == "all" else positive(int)(text)


def parse_args(argv=None):
    parser = command_line("Real instruction data in, clean and leak-free training data out.")
    flag = parser.add_argument
    flag("files", nargs="+", type=Path, metavar="IN", help="JSON, JSONL or TinyStories-Instruct text, in any mix")
    flag("--out", type=Path, required=True, help="directory for train.jsonl, val.jsonl, rejected.jsonl, report.json")
    flag("--overwrite", action="store_true", help="replace --out")
    flag("--seed", type=not_negative(int), default=1337, help="(default: %(default)s)")
    # reading
    flag("--clean", action="store_true", help="mend or drop stories that are cut, repeat sentences, have residue "
                                              "behind them or English in them, and labels that do not hold")
    flag("--keep", type=by_commas, default=(), metavar="CHECK,…",
         help=f"what --clean leaves alone: {','.join(CHECKS)}")
    flag("--extract", type=by_commas, default=(), metavar="KIND,…",
         help=f"make constraints of the story where a record has none of the kind: {','.join(EXTRACTS)}")
    flag("--tokenizer", type=Path, help="whose pieces are the words (default: the base model's)")
    # splitting
    flag("--val-fraction", type=fraction, default=0.01, help="share of the stories (default: %(default)s)")
    flag("--exact", action="store_true", help="do not look for near-duplicate stories before the split")
    # augmenting
    flag("--permute", type=orders, default="all", metavar="all|K|1",
         help="rows of a record: all orders of its constraints (n!), K distinct ones, or the one it has (default: all)")
    args = parser.parse_args(argv)
    for name, chosen, known in (("--keep", args.keep, CHECKS), ("--extract", args.extract, EXTRACTS)):
        if unknown := set(chosen) - set(known):
            fail(f"{name}: unknown {', '.join(sorted(unknown))} (known: {', '.join(known)})")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        report = augment(args)
    except KeyboardInterrupt:
        print("augment.py: interrupted; nothing is written", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError) as e:
        fail(e)
    rows, sides = report["rows"], report["split"]
    print(f"{report['records']:,} records, {sum(report['rejected'].values()):,} rejected; {sides['train_records']:,} "
          f"of {sides['train_stories']:,} stories to train on, {sides['val_records']:,} for validation")
    print(f"{rows['after']:,} rows, {rows['per_record']} a record; all in {args.out}")


if __name__ == "__main__":
    from augment import main
    main()
