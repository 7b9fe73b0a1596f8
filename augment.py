"""Real instruction data in, clean and leak-free training data out: python augment.py IN... --out out/data/NAME

Reads translation caches {id: "特点：…\\n故事：…"}, Alpaca rows, TinyStories-Instruct text, rows of TinyStoriesChinese,
our own records and plain stories, in any mix. Writes train.jsonl and val.jsonl (`train_sft.py --data out/data/NAME`),
rejected.jsonl and report.json.

Two passes, so that memory stays small whatever the size: `parse_batch` makes records of what people have, spooled to a
temporary file; then the split is known, and how often each story may be seen, and `write_batch` makes the rows.
"""
import argparse
import json
import math
import random
import re
import shutil
import sys
from array import array
from collections import Counter
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from common import fail, fraction, not_negative, positive
from constraints import (
    FEATURE,
    FEATURES,
    KEYS,
    LIST_KEYS,
    SENTENCE,
    SUMMARY,
    WORDS,
    check,
    extend_aliases,
    fold,
    has_dialogue,
    parse_record,
    permutations,
    render,
)
from parallel import in_order
from records import BOM, LONGEST, PIECE, UTF16, RowError, not_utf8, scan_stream, story_hash, text_field

BATCH = 512  # records that a worker takes at once
SMALL = 20 << 20  # bytes of input that are not worth the start of worker processes
NEAR_LIMIT = 200_000  # records up to which near-duplicates are looked for
SHINGLE, BANDS, BAND = 8, 32, 8  # characters of a shingle; 32 bands of 8 minima find 99.7% of pairs of Jaccard 0.8
NEAR = 0.8
CHINESE = re.compile("[\u4e00-\u9fff]")
NUMBER = np.array([bin(kinds).count("1") for kinds in range(1 << len(KEYS))])  # of constraints, from a bit a kind
STUDY_ROWS = 5.46  # a record, of the study: 71,000 rows of 13,000 records


# ---- one record ----

def read_row(path, row, record):
    """-> (constraints, preamble, story, story_id). Raises ValueError saying what is wrong with the row."""
    if isinstance(record, str):  # of a translation cache or of TinyStories-Instruct
        text_field(path, row, {"text": record}, ["text"])
        return *parse_record(record), None
    story = text_field(path, row, record, ["output", "story_zh", "text", "story"])
    given = {FEATURE: record.get("features"), WORDS: record.get("words"), SENTENCE: record.get("sentence"),
             SUMMARY: record.get("summary")}
    prompt = []
    if isinstance(record.get("instruction"), dict):  # TinyStoriesChinese
        given |= {WORDS: record["instruction"].get("words"), FEATURE: record["instruction"].get("features")}
    elif record.get("constraints") is not None:
        given = record["constraints"]
        if not isinstance(given, dict):
            raise ValueError(f"{path}: row {row}: 'constraints' is {type(given).__name__}, not an object")
    else:
        prompt = [text_field(path, row, record, [name], required=False) for name in ("instruction", "input")]
    for key, value in given.items():
        items = value if isinstance(value, list) else [value] if value else []
        if not all(isinstance(item, str) for item in items):
            raise ValueError(f"{path}: row {row}: {key} is not made of strings")
        prompt.append(f"{key}：{('，' if key in LIST_KEYS else '').join(items)}")
    story_id = record.get("story_id")
    return *parse_record("\n".join([*prompt, f"故事：{story}"])), story_id if isinstance(story_id, str) else None


def make_record(constraints, story, settings, counts):
    """Keep of the constraints what can be one, mend the story (--clean), add what --extract asks for.
    -> (constraints, story, candidates for 词汇 or None). Raises ValueError. Counts what is changed or left out."""
    if not story:
        raise ValueError("no story")
    chinese = bool(CHINESE.search(story))
    for name in [name for name in constraints.get(FEATURE, []) if name not in FEATURES]:
        counts[f"left out: unknown feature {name}"] += 1
        constraints[FEATURE].remove(name)
    if chinese:  # rows of TinyStoriesChinese carry the English words and summary
        for word in [w for w in constraints.get(WORDS, []) if not CHINESE.search(w) and w not in story]:
            counts["left out: word of another language"] += 1
            constraints[WORDS].remove(word)
        if SUMMARY in constraints and not CHINESE.search(constraints[SUMMARY]):
            counts["left out: summary of another language"] += 1
            del constraints[SUMMARY]
    if settings.clean:
        story = clean(story, chinese, settings.keep, counts)
        if "labels" not in settings.keep:
            drop_false_labels(constraints, story, counts)
    constraints = {key: value for key, value in constraints.items() if value}
    candidates = None
    if settings.extract:
        constraints, candidates = extract(constraints, story, settings)
    if not constraints:
        raise ValueError("no constraints" + (f" ({'; '.join(counts)})" if counts else
                                             "" if settings.extract else " (--extract makes them of the story)"))
    return constraints, story, candidates


# ---- cleaning ----

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


def clean(story, chinese, keep, counts):
    """Mend or refuse a story. Raises ValueError when it cannot be mended; counts what was mended."""
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
    if "english" not in keep and chinese and ENGLISH.search(story):
        raise ValueError("clean: mixed with English")
    return story


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


# ---- constraints from a plain story ----

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


def extract(constraints, story, settings):
    """Add constraints of the asked kinds that the record lacks: a random choice of those that the story offers, so
    that single and combined ones both come. 词汇 is filled in by `choose_words`, when all stories have been seen."""
    rng = random.Random(f"{settings.seed}-{fold(story)}")
    offered, words = {}, None
    if "words" in settings.extract and WORDS not in constraints:
        words = candidate_words(story, settings.tokenizer)
        if len(words) >= 2:
            offered[WORDS] = []
    if "sentence" in settings.extract and SENTENCE not in constraints and (found := candidate_sentences(story)):
        offered[SENTENCE] = rng.choice(found)
    if "features" in settings.extract and FEATURE not in constraints and has_dialogue(story):
        offered[FEATURE] = ["对话"]
    chosen = [key for key in offered if rng.random() < 0.5]
    if not constraints and offered and not chosen:
        chosen = [rng.choice(list(offered))]
    items = [*constraints.items(), *((key, offered[key]) for key in chosen)]
    rng.shuffle(items)
    return dict(items), words if WORDS in chosen else None


def choose_words(story, candidates, df, stories, rng):
    """Two or three words out of the best by tf-idf, in random order."""
    def score(word):
        return candidates[word] * math.log(stories / (1 + df[word]))
    best = sorted(candidates, key=lambda word: (-score(word), word))[:5]
    return rng.sample(best, min(len(best), rng.choice((2, 3, 3))))


# ---- pass 1: rows of any format -> records ----

def read_rows(f, path):
    """Yield (row, record, bytes or RowError): of JSON by records.scan; of text the blocks that <|endoftext|> closes."""
    head = f.peek(PIECE).removeprefix(BOM)
    if head.startswith(UTF16) or any(line.lstrip().startswith((b"{", b"[")) for line in head.split(b"\n")):
        yield from scan_stream(f, path)
        return
    offset, row, rest = 0, 0, b""
    while data := f.read(PIECE):
        *blocks, rest = (rest + data).split(b"<|endoftext|>")
        if len(rest) > LONGEST:
            raise ValueError(f"{path}: neither JSON nor stories that <|endoftext|> divides "
                             f"({LONGEST >> 20} MB without it from byte {offset} on)")
        for block in blocks:
            row += 1
            yield row, (offset, block)
            offset += len(block) + len(b"<|endoftext|>")
    if rest.strip():
        yield row + 1, (offset, rest)


settings = SimpleNamespace()  # of this process; `start` fills it in, in every worker


def start(values, aliases, tokenizer):
    settings.__dict__.update(values)
    extend_aliases(aliases)
    if tokenizer:
        import tokenizer as tokenizers
        settings.tokenizer = tokenizers.load(tokenizer)


def parse_batch(batch):
    """(path, rows) -> what pass 2 needs of them, and what was rejected."""
    path, rows = batch
    made = SimpleNamespace(path=path, rows=len(rows), spool=[], hashes=[], kinds=[], rejected=[], error=None,
                           counts=Counter(), preambles=Counter(), df=Counter())
    for row, record in rows:
        raw, changed = record, Counter()
        try:
            if isinstance(record, RowError):
                raw = record.raw
                raise record
            if isinstance(record, tuple):
                offset, raw = record
                try:
                    record = raw.decode("utf-8-sig")
                except UnicodeDecodeError as e:
                    raise ValueError(not_utf8(f"{path}: row {row}", raw, offset + e.start)) from None
            constraints, preamble, story, story_id = read_row(path, row, record)
            constraints, story, candidates = make_record(constraints, story, settings, changed)
        except (ValueError, RecursionError) as e:
            reason = str(e).removeprefix(f"{path}: row {row}").lstrip(": ")
            made.error = made.error or f"{path}: row {row}: {reason}"
            raw = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else raw
            raw = raw if isinstance(raw, str) else json.dumps(raw, ensure_ascii=False)
            made.rejected.append({"file": str(path), "row": row, "reason": reason, "raw": raw[:2000]})
            continue
        made.counts.update(changed)
        if preamble:
            made.preambles[preamble[:80]] += 1
        if candidates is not None:
            made.df.update(candidates.keys())
        digest = story_hash(story)
        made.hashes.append(digest)
        made.kinds.append(sum(1 << i for i, key in enumerate(KEYS) if key in constraints))
        made.spool.append(json.dumps([constraints, story, story_id or f"{digest:016x}", candidates],
                                     ensure_ascii=False).encode() + b"\n")
    return made


# ---- near-duplicates: MinHash (Broder 1997) in bands ----

RNG = np.random.default_rng(0)
MULTIPLIERS = RNG.integers(1 << 31, size=(BANDS * BAND, 1), dtype=np.uint32) * np.uint32(2) + np.uint32(1)
MIXERS = RNG.integers(1 << 62, size=BAND, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
ROLLING = np.uint64(0x9E3779B97F4A7C15) ** np.arange(SHINGLE, 0, -1, dtype=np.uint64)


def shingles(folded):
    """A hash (32 bits) of every SHINGLE characters in a row; of the whole text if it is shorter."""
    codes = np.frombuffer(folded.ljust(SHINGLE).encode("utf-32-le"), np.uint32).astype(np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(codes, SHINGLE)
    return np.unique(((windows * ROLLING).sum(1) >> np.uint64(32)).astype(np.uint32))


def band_keys(folded):
    """(BANDS,) uint64; two stories are compared if they agree in one of them, of BAND minima each."""
    minima = (shingles(folded) * MULTIPLIERS).min(1)  # a random permutation of the hashes each
    return (minima.reshape(BANDS, BAND).astype(np.uint64) * MIXERS).sum(1)


def band_batch(lines):
    """Lines of the spool -> (lines, BANDS)."""
    return np.stack([band_keys(fold(json.loads(line)[1])) for line in lines])


def near_duplicates(bands, story_of):
    """(N, BANDS), story number -> its text: -> (N,) the number of the cluster that each story is in.

    What the bands propose is compared exactly: Jaccard of the sets of shingles at least NEAR.
    """
    parent = np.arange(len(bands))

    def root(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    @lru_cache(1 << 14)
    def shingles_of(i):
        return shingles(fold(story_of(i)))

    seen = set()
    for band in tqdm(bands.T, desc="near-duplicates", unit="band", dynamic_ncols=True, disable=None):
        order = np.argsort(band, kind="stable")
        same = band[order[1:]] == band[order[:-1]]
        for run in np.split(order, np.flatnonzero(~same) + 1):
            leaders = []  # of the clusters in this run: a thousand copies of one story take a thousand comparisons
            for i in run if len(run) > 1 else ():
                for leader in leaders:
                    if root(i) == root(leader):
                        break
                    pair = (min(i, leader), max(i, leader))
                    if pair in seen:
                        continue
                    seen.add(pair)
                    a, b = shingles_of(i), shingles_of(leader)
                    common = len(np.intersect1d(a, b, assume_unique=True))
                    if common >= NEAR * (len(a) + len(b) - common):
                        parent[root(i)] = root(leader)
                        break
                else:
                    leaders.append(i)
    return np.array([root(i) for i in range(len(parent))])


# ---- pass 2: records -> rows ----

def split(hashes, clusters, val_fraction):
    """-> (N,) bool, True for validation. A cluster stands where the one of its stories does whose hash is the lowest
    after mixing (the lowest itself would draw large clusters to validation)."""
    mixed = hashes * np.uint64(0x9E3779B97F4A7C15)
    order = np.lexsort((mixed, clusters))
    first = np.r_[True, clusters[order][1:] != clusters[order][:-1]]
    leader = order[first][np.cumsum(first) - 1]
    places = np.empty(len(hashes), np.uint64)
    places[order] = hashes[leader]
    if not val_fraction:
        return np.zeros(len(hashes), bool)
    return places / 2**64 < max(val_fraction, np.nextafter(places.min() / 2**64, 1))


def quotas(number, hashes, train, permute, max_per_story, balance):
    """How many rows each record gets: (N,). number (N,): how many constraints it has."""
    orders = np.array([math.factorial(n) for n in range(len(KEYS) + 1)])[number]
    rows = orders if permute == "all" else np.minimum(orders, permute)
    _, story, copies = np.unique(hashes, return_inverse=True, return_counts=True)
    order = np.argsort(story, kind="stable")
    rank = np.empty(len(story), int)  # of a record among those of its story
    rank[order] = np.arange(len(story)) - np.repeat(np.cumsum(copies) - copies, copies)
    copies = copies[story]
    if balance:  # every story the mean, so that the whole has about the same size
        each = max(1, round(rows[train].sum() / max(1, len(np.unique(story[train])))))
        rows = each // copies + (rank < each % copies)
    if max_per_story:
        rows = np.minimum(rows, max_per_story // copies + (rank < max_per_story % copies))
    return rows


def write_batch(batch):
    """Lines of the spool, their quotas, their sides -> (lines of train.jsonl, lines of val.jsonl), as bytes."""
    sides = [], []
    for line, quota, val in zip(*batch):
        constraints, story, story_id, candidates = json.loads(line)
        orders = [constraints]
        if candidates is not None or (settings.permute != 1 and not val):
            rng = random.Random(f"{settings.seed}-{story_id}-{render(constraints)}")
            if candidates is not None:
                constraints[WORDS] = choose_words(story, candidates, settings.df, settings.stories, rng)
            if settings.permute != 1 and not val:
                orders = list(permutations(constraints))
                rng.shuffle(orders)
        text = json.dumps(story, ensure_ascii=False)
        for i in range(1 if val else quota):
            order = orders[i % len(orders)]
            sides[val].append(f'{{"instruction": {json.dumps(render(order), ensure_ascii=False)}, "input": "", '
                              f'"output": {text}, "constraints": {json.dumps(order, ensure_ascii=False)}, '
                              f'"story_id": {json.dumps(story_id, ensure_ascii=False)}}}\n')
    return tuple("".join(lines).encode() for lines in sides)


# ---- the command ----

def batched(items):
    return iter(lambda: list(islice(items, BATCH)), [])


def augment(args):
    """The whole of it. -> the report, a dict. Raises ValueError and OSError."""
    if args.out.exists() and not args.overwrite:
        raise ValueError(f"--out {args.out} is there already: --overwrite replaces it")
    if args.out.exists() and not (args.out / "report.json").is_file():
        raise ValueError(f"--out {args.out} was not made by augment.py, and is not replaced")
    aliases = {}
    if args.aliases:
        try:
            aliases = json.loads(args.aliases.read_text(encoding="utf-8"))
            extend_aliases(aliases)
        except (ValueError, AttributeError) as e:
            raise ValueError(f"--aliases {args.aliases}: {e}") from None
    sizes = {path: path.stat().st_size for path in args.files}
    work = args.out.with_name(args.out.name + ".new")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        report = make(args, aliases, sizes, work)
        (work / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")
        old = args.out.with_name(args.out.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if args.out.exists():
            args.out.rename(old)
        work.rename(args.out)  # --out is never half made
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return report


def make(args, aliases, sizes, work):
    """Write the rows into the directory `work`. -> the report."""
    tokenizer = args.tokenizer or Path(__file__).parent / "base" if "words" in args.extract else None
    values = {"clean": args.clean, "keep": args.keep, "extract": args.extract, "seed": args.seed,
              "permute": args.permute}
    size = sum(sizes.values())
    totals = SimpleNamespace(rows=Counter(), good=Counter(), error={}, counts=Counter(), preambles=Counter(),
                             df=Counter(), rejected=Counter())
    hashes, kinds, lengths = array("Q"), array("B"), array("L")

    def batches():
        with tqdm(total=size, desc="reading", unit="B", unit_scale=True, dynamic_ncols=True, disable=None) as bar:
            for path in args.files:
                before = bar.n
                with open(path, "rb", buffering=1 << 16) as f:
                    rows = read_rows(f, path)
                    for batch in batched(rows):
                        yield path, batch
                        bar.update(before + f.tell() - bar.n)

    def run(function, batches):
        if size < SMALL:
            start(values, aliases, tokenizer)
            return map(function, batches)
        return in_order(function, batches, start, (values, aliases, tokenizer))

    with open(work / "spool", "wb") as spool, open(work / "rejected.jsonl", "wb") as rejected:
        for made in run(parse_batch, batches()):
            totals.rows[made.path] += made.rows
            totals.good[made.path] += len(made.spool)
            totals.error.setdefault(made.path, made.error)
            for name in ("counts", "preambles", "df"):
                getattr(totals, name).update(getattr(made, name))
            for row in made.rejected:
                totals.rejected[re.sub(r"\d+", "N", row["reason"])] += 1
                line = json.dumps(row, ensure_ascii=False) + "\n"
                rejected.write(line.encode("utf-8", "backslashreplace"))  # a lone surrogate is no character
            hashes.extend(made.hashes)
            kinds.extend(made.kinds)
            lengths.extend(map(len, made.spool))
            spool.writelines(made.spool)
    for path in args.files:
        if not totals.good[path]:
            raise ValueError(f"no usable row; {totals.error[path]}" if totals.error.get(path) else f"{path}: no rows")

    hashes, kinds, lengths = np.array(hashes), np.array(kinds), np.array(lengths)
    near = not args.exact and len(hashes) <= NEAR_LIMIT
    with open(work / "spool", "rb") as spool:
        bands = np.concatenate(list(run(band_batch, batched(spool)))) if near else None
        ends = np.cumsum(lengths)

        def story_of(i):
            spool.seek(ends[i] - lengths[i])
            return json.loads(spool.readline())[1]

        # stories of the same hash agree in all bands, so the clusters of near-duplicates hold the exact ones too
        clusters = near_duplicates(bands, story_of) if near else hashes
    val = split(hashes, clusters, args.val_fraction)
    if val.all():
        raise ValueError(f"--val-fraction {args.val_fraction} leaves no story to train on")
    rows = quotas(NUMBER[kinds], hashes, ~val, args.permute, args.max_per_story, args.balance)
    rows[val] = 1

    values |= {"df": totals.df, "stories": len(hashes)}
    with (open(work / "spool", "rb") as spool,
          open(work / "train.jsonl", "wb") as train_file, open(work / "val.jsonl", "wb") as val_file,
          tqdm(total=len(hashes), desc="writing", unit="record", dynamic_ncols=True, disable=None) as bar):
        spooled = ((lines, rows[i:i + BATCH].tolist(), val[i:i + BATCH].tolist())
                   for i, lines in zip(range(0, len(hashes), BATCH), batched(spool)))
        for train_lines, val_lines in run(write_batch, spooled):
            train_file.write(train_lines)
            val_file.write(val_lines)
            bar.update(min(BATCH, bar.total - bar.n))
    (work / "spool").unlink()
    return tell(args, sizes, totals, kinds, hashes, clusters, near, val, rows)


def tell(args, sizes, totals, kinds, hashes, clusters, near, val, rows):
    """-> the report."""
    train = ~val
    by_number = {n: train & (NUMBER[kinds] == n) for n in np.unique(NUMBER[kinds][train]).tolist()}
    _, story = np.unique(hashes[train], return_inverse=True)
    exposure = np.bincount(story, weights=rows[train])
    in_cluster = np.unique(clusters, return_inverse=True, return_counts=True)
    return {
        "inputs": [{"file": str(path), "bytes": size, "rows": totals.rows[path], "records": totals.good[path]}
                   for path, size in sizes.items()],
        "records": len(hashes),
        "rejected": dict(totals.rejected.most_common()),
        "changed": dict(totals.counts.most_common()),
        "leading sentences left out": dict(totals.preambles.most_common(5)),
        "split": {
            "val_fraction": args.val_fraction, "train_records": int(train.sum()), "val_records": int(val.sum()),
            "train_stories": len(exposure), "val_stories": len(np.unique(hashes[val])),
            "near_duplicates": f"on one side: {SHINGLE}-grams of characters, Jaccard at least {NEAR}" if near else
                               f"not looked for: {'--exact' if args.exact else f'more than {NEAR_LIMIT:,} records'}",
            "records_with_a_near_duplicate": int((in_cluster[2][in_cluster[1]] > 1).sum()) if near else None,
        },
        "rows": {"before": int(train.sum()), "after": int(rows[train].sum()),
                 "per_record": round(float(rows[train].mean()), 3), "per_record_of_the_study": STUDY_ROWS,
                 "records_without_a_row": int((rows[train] == 0).sum()), "validation": int(val.sum())},
        "exposure": {"rows_per_story": {"least": int(exposure.min()), "mean": round(float(exposure.mean()), 3),
                                        "most": int(exposure.max())},
                     "mean_by_number_of_constraints": {n: round(float(rows[which].mean()), 3)
                                                       for n, which in by_number.items()}},
        "rows_by_number_of_constraints": {n: int(rows[which].sum()) for n, which in by_number.items()},
        "rows_by_kind": {key: int(rows[train & (kinds >> i & 1 > 0)].sum()) for i, key in enumerate(KEYS)},
        "settings": {name: str(value) if isinstance(value, Path) else value
                     for name, value in vars(args).items() if name not in ("files", "overwrite")},
    }


EXTRACTS = ("words", "sentence", "features")


def names(known):
    def parse(text):
        chosen = tuple(filter(None, text.split(",")))
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {name!r} (known: {','.join(known)})")
        return chosen
    return parse


def orders(text):
    return text if text == "all" else positive(int)(text)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Real instruction data in, clean and leak-free training data out.")
    parser.error = fail
    flag = parser.add_argument
    flag("files", nargs="+", type=Path, metavar="IN", help="JSON, JSONL or TinyStories-Instruct text, in any mix")
    flag("--out", type=Path, required=True, help="directory for train.jsonl, val.jsonl, rejected.jsonl, report.json")
    flag("--overwrite", action="store_true", help="replace --out")
    flag("--seed", type=not_negative(int), default=1337, help="(default: %(default)s)")
    # reading
    flag("--aliases", type=Path, help='JSON of more spellings: {"词汇": ["生词"], "对话": ["谈话"], "故事": ["内容"]}')
    flag("--clean", action="store_true", help="mend or drop stories that are cut, repeat sentences, have residue "
                                              "behind them or English in them, and labels that do not hold")
    flag("--keep", type=names(CHECKS), default=(), metavar="CHECK,…",
         help=f"what --clean leaves alone: {','.join(CHECKS)}")
    flag("--extract", type=names(EXTRACTS), default=(), metavar="KIND,…",
         help=f"make constraints of the story where a record has none of the kind: {','.join(EXTRACTS)}")
    flag("--tokenizer", type=Path, help="whose pieces are the words (default: the base model's)")
    # splitting
    flag("--val-fraction", type=fraction, default=0.01, help="share of the stories (default: %(default)s)")
    flag("--exact", action="store_true", help="do not look for near-duplicate stories before the split")
    # augmenting
    flag("--permute", type=orders, default="all", metavar="all|K|1",
         help="rows of a record: all orders of its constraints (n!), K distinct ones, or the one it has (default: all)")
    flag("--max-per-story", type=positive(int), help="at most so many rows of one story")
    flag("--balance", action="store_true", help="the same number of rows of every story")
    return parser.parse_args(argv)


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
    print(f"{rows['after']:,} rows, {rows['per_record']} a record (the study: {STUDY_ROWS}); all in {args.out}")


if __name__ == "__main__":
    from augment import main
    main()
