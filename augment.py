"""Real instruction data in, clean and leak-free training data out: python augment.py IN... --out out/data/NAME

Reads translation caches {id: "特点：…\\n故事：…"}, Alpaca rows, TinyStories-Instruct text, rows of TinyStoriesChinese,
our own records and plain stories, in any mix. Writes train.jsonl and val.jsonl (`train_sft.py --data out/data/NAME`),
rejected.jsonl and report.json.

    read      rows of any format -> constraints and a story
    clean     mend or drop stories and labels (--clean, data/clean.py)
    extract   constraints of the story itself, where a record has none (--extract, data/extract.py)
    split     by story, near-duplicates on one side (data/duplicates.py), before anything is multiplied
    permute   each training record in several orders of its constraints (--permute)
"""
import json
import math
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import common
from common import codec, fail, fraction, positive, seed_number, to_path

import numpy as np
from tqdm import tqdm

import tokenizer as tokenizers
from constraints import (
    FEATURE,
    FEATURES,
    KEYS,
    LIST_KEYS,
    SENTENCE,
    SUMMARY,
    WORDS,
    fold,
    parse_record,
    permutations,
    render,
)
from data.clean import CHECKS, CHINESE, clean
from data.duplicates import near_duplicates
from data.extract import EXTRACTS, candidate_words, choose_words, extract
from records import RowError, instruction_of, scan, story_hash, text_field, to_utf8

BLOCKS = re.compile(r"\A(?!\ufeff?\s*[{[])(?:.*<\|endoftext\|>|.*^\s*(?:story|故事)\s*[:：])", re.S | re.M | re.I)


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
        for row, given in tqdm(read_rows(path, args.encoding), desc=f"reading {path.name}", unit="row", disable=None):
            rows += 1
            changed = Counter()
            try:
                constraints, preamble, story, story_id = read_row(path, row, given)
                constraints, story = usable(constraints, story, changed)
                if args.clean:
                    constraints, story = clean(constraints, story, args.keep, changed)
                constraints = {key: value for key, value in constraints.items() if value}
                if args.extract:
                    constraints = extract(constraints, story, args.extract, tokenizer, df, args.seed)
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


def read_rows(path, encoding="utf-8"):
    """Yield (row, record or RowError): by records.py; of TinyStories-Instruct, which is text with the lines of a
    record in it, the blocks that <|endoftext|> closes, as str."""
    with open(path, "rb") as f:
        head = f.read(1 << 16)
        f.seek(0)
        if not BLOCKS.search(head.decode(encoding, "ignore")):
            yield from scan(f, path, encoding)
            return
        for row, block in enumerate(to_utf8(f, path, encoding).read().split(b"<|endoftext|>"), 1):
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


# ---- split ----

def split(records, args):
    """-> (validation: (N,) bool, clusters of near-duplicates: (N,)). Raises ValueError."""
    hashes, first, story = np.unique(np.array([record.hash for record in records], np.uint64),
                                     return_index=True, return_inverse=True)
    clusters = (np.arange(len(hashes)) if args.exact
                else near_duplicates([fold(records[i].story) for i in first]))
    val = validation(hashes, clusters, args.val_fraction)
    if val.all():
        raise ValueError(f"--val-fraction {args.val_fraction} leaves no story to train on")
    return val[story], clusters[story]


def validation(hashes, clusters, val_fraction):
    """-> (N,) bool, True for validation. A cluster stands where the one of its stories does whose hash is the lowest
    after mixing (the lowest itself would draw large clusters to validation)."""
    order = np.argsort(hashes * np.uint64(0x9E3779B97F4A7C15))
    names, first = np.unique(clusters[order], return_index=True)
    places = hashes[order[first]][np.searchsorted(names, clusters)] / 2**64
    return places < (max(val_fraction, np.nextafter(places.min(), 1)) if val_fraction else 0)


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
    common.check_new(args.out, args.overwrite, "report.json")
    base = Path(__file__).parent / "base"
    tokenizer = tokenizers.load(args.tokenizer or base) if "words" in args.extract else None

    df, report = Counter(), {"inputs": [], "records": 0, "rejected": Counter(), "changed": Counter(),
                             "leading sentences left out": Counter()}
    records, rejected = read(args, tokenizer, df, report)
    val, clusters = split(records, args)
    report |= describe(args, records, val, clusters)
    for name, most in (("rejected", None), ("changed", None), ("leading sentences left out", 5)):
        report[name] = dict(report[name].most_common(most))

    with common.new_directory(args.out) as work:
        for name, of_val in (("train", False), ("val", True)):
            chosen = [i for i in range(len(records)) if val[i] == of_val]
            common.write_jsonl(work / f"{name}.jsonl", (
                row for i in tqdm(chosen, desc=f"writing {name}.jsonl", unit="record", disable=None)
                for row in make_rows(records[i], 1 if of_val else args.permute, args, tokenizer, df, len(records))))
        common.write_jsonl(work / "rejected.jsonl", rejected)
        common.write_json(work / "report.json", report)
    return report


def describe(args, records, val, clusters):
    """-> what the report says of split and rows."""
    most = math.inf if args.permute == "all" else args.permute
    by_number, by_kind = Counter(), Counter()  # rows
    train = [record for record, of_val in zip(records, val) if not of_val]
    for record in train:
        n = len(record.constraints)
        by_number[n] += min(math.factorial(n), most)
        by_kind.update(dict.fromkeys(record.constraints, min(math.factorial(n), most)))
    stories = len({record.hash for record in train})
    siblings = Counter(clusters.tolist())
    return {
        "split": {
            "val_fraction": args.val_fraction, "train_records": len(train), "val_records": len(records) - len(train),
            "train_stories": stories, "val_stories": len({record.hash for record in records}) - stories,
            "near_duplicates": "not looked for: --exact" if args.exact else "on one side",
            "records_with_a_near_duplicate": None if args.exact else sum(n for n in siblings.values() if n > 1),
        },
        "rows": {"before": len(train), "after": by_number.total(),
                 "per_record": round(by_number.total() / len(train), 3), "validation": len(records) - len(train)},
        "rows_by_number_of_constraints": dict(sorted(by_number.items())),
        "rows_by_kind": {key: by_kind[key] for key in KEYS},
        "settings": {name: str(value) if isinstance(value, Path) else value
                     for name, value in vars(args).items() if name not in ("files", "out", "overwrite")},
    }


def by_commas(text):
    return tuple(filter(None, text.split(",")))


def orders(text):
    return text if text == "all" else positive(int)(text)


def parse_args(argv=None):
    parser = common.command_line("Real instruction data in, clean and leak-free training data out.")
    flag = parser.add_argument
    flag("files", nargs="+", type=to_path, metavar="IN",
         help="JSON, JSONL, .csv, .tsv, stories as .txt, TinyStories-Instruct text, in any mix")
    flag("--out", type=to_path, required=True, help="directory for train.jsonl, val.jsonl, rejected.jsonl, report.json")
    flag("--encoding", type=codec, default="utf-8", help="of IN, say gb18030 (default: %(default)s)")
    flag("--overwrite", action="store_true", help="replace --out")
    flag("--seed", type=seed_number, default=1337, help="(default: %(default)s)")
    # reading
    flag("--clean", action="store_true", help="mend or drop stories that are cut, repeat sentences, have residue "
                                              "behind them or English in them, and labels that do not hold")
    flag("--keep", type=by_commas, default=(), metavar="CHECK,…",
         help=f"what --clean leaves alone: {','.join(CHECKS)}")
    flag("--extract", type=by_commas, default=(), metavar="KIND,…",
         help=f"make constraints of the story where a record has none of the kind: {','.join(EXTRACTS)}")
    flag("--tokenizer", type=to_path, help="whose pieces are the words (default: the base model's)")
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
    rows, sides, rejected = report["rows"], report["split"], report["rejected"]
    why = f" (most often: {max(rejected, key=rejected.get)}; all in rejected.jsonl)" if rejected else ""
    print(f"{report['records']:,} records, {sum(rejected.values()):,} rejected{why}; for training "
          f"{sides['train_records']:,}, of {sides['train_stories']:,} stories, for validation {sides['val_records']:,}")
    for what, n in report["changed"].items():
        print(f"{what}: {n:,}")
    print(f"{rows['after']:,} rows, {rows['per_record']} a record; all in {args.out}")


if __name__ == "__main__":
    from augment import main
    main()
