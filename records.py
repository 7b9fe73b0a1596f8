"""Records: reading JSONL and JSON files row by row, and the side of the split on which a story falls.

An instruction record is {"instruction": …, "input": …, "output": …} (Alpaca), a story record {"text": …}. Files are
read in pieces, so that their size does not matter. Every error names the file and the row. Nothing here needs PyTorch.
"""
import codecs
import hashlib
import json
import re
from itertools import groupby

import numpy as np

from constraints import fold

BOM = codecs.BOM_UTF8
UTF16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE
HEAD = 1 << 16        # bytes that tell what kind of file it is
PIECE = 1 << 20       # bytes read at once
LONGEST = 16 << 20    # bytes of one row; a file that is no JSONL must not end up in memory as one
SURROGATE = re.compile("[\ud800-\udfff]")


# ---- rows ----

class RowError(ValueError):
    """A row that cannot be read. `raw` is what stands there, as far as it is known."""

    def __init__(self, message, raw=""):
        super().__init__(message)
        self.raw = raw


def scan(path):
    """Yield (row number, record or RowError) of a JSONL file, a JSON list, or a JSON object of {id: record}.

    Rows count from 1; in JSONL they are lines. Reading goes on behind a row that cannot be read.
    """
    with open(path, "rb") as f:
        yield from scan_stream(f, path)


def scan_stream(f, name):
    """The same for a binary stream, of which messages speak as `name`."""
    head = f.read(HEAD)
    if head.startswith(UTF16):
        raise ValueError(f"{name}: not UTF-8 (byte 0 of the file) but UTF-16; iconv -f utf-16 -t utf-8 converts it")
    start = head.removeprefix(BOM).lstrip()
    if start[:1] == b"[":
        return _elements(f, name, head, "[")
    return (_elements(f, name, head, "{") if _is_one_object(start) else _lines(f, name, head))


FIELDS = ("instruction", "input", "output", "text", "story", "story_zh", "constraints", "words", "features", "sentence",
          "summary")
FIRST_KEY = re.compile(rb'\{\s*"((?:[^"\\]|\\.)*)"\s*:\s*["{]')


def _is_one_object(start):
    """Is this {"17": "特点：…", …}, whose keys are names of records, rather than a record to begin with?"""
    first, _, second = start.partition(b"\n")
    try:
        record = json.loads(first)
        return (isinstance(record, dict) and not set(record) & set(FIELDS)
                and all(isinstance(value, (str, dict)) for value in record.values()))
    except (ValueError, RecursionError):
        key = FIRST_KEY.match(start)
    try:
        return bool(key) and key[1].decode() not in FIELDS and not json.loads(second.partition(b"\n")[0])
    except (ValueError, RecursionError):
        return True  # no JSONL with a broken first row either


def _lines(f, name, head):
    offset, row, rest, skipping = 0, 0, head, False
    while rest:
        *lines, rest = rest.split(b"\n")
        more = f.read(PIECE)
        if not more:
            lines.append(rest)
        for line in lines:
            row += 1
            if skipping:
                yield row, RowError(f"{name}: row {row} is longer than {LONGEST >> 20} MB")
            elif line.strip(b" \t\r" + BOM):
                yield row, _decoded(name, line, offset, row)
            offset += len(line) + 1
            skipping = False
        if not more:
            return
        if skipping or len(rest) > LONGEST:
            offset, rest, skipping = offset + len(rest), b"", True
        rest += more


def _decoded(name, line, offset, row):
    try:
        return json.loads(line.decode("utf-8-sig"))  # -sig: a byte order mark, if there is one, is no part of it
    except UnicodeDecodeError as e:
        return RowError(not_utf8(f"{name}: row {row}", line, offset + e.start), line.decode("utf-8", "replace"))
    except RecursionError:
        return RowError(f"{name}: row {row} is nested too deeply", line.decode("utf-8"))
    except ValueError as e:  # also for a number of thousands of digits
        at = f" at column {e.colno}" if isinstance(e, json.JSONDecodeError) else ""
        return RowError(f"{name}: row {row} is not JSON ({getattr(e, 'msg', e)}{at})", line.decode("utf-8"))


def not_utf8(what, data, offset):
    """The message for bytes that are no UTF-8: where, and what they may be instead."""
    for encoding in ("gb18030", "big5"):
        try:
            data.decode(encoding)
            return (f"{what} is not UTF-8 (byte {offset} of the file); it may be {encoding}, "
                    f"which iconv -f {encoding} -t utf-8 converts")
        except UnicodeDecodeError:
            pass
    return f"{what} is not UTF-8 (byte {offset} of the file)"


# where reading goes on behind an element that is broken
NEXT = {"[": re.compile(r"[,\n]\s*(?=\{\s*\"(?:" + "|".join(FIELDS) + r')")'),
        "{": re.compile(r'[,\n]\s*(?="(?:[^"\\\n]|\\.)*"\s*:\s*["{])')}
BETWEEN = re.compile(r"[\s,]*")
COLON = re.compile(r"\s*:\s*")


def _elements(f, name, head, opening):
    """The elements of a list, or the values of an object. Only the element at hand is in memory as text."""
    # bytes that are no UTF-8 become lone surrogates, which no UTF-8 file has, so that the rows around them can be read
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    decode_json = json.JSONDecoder().raw_decode
    closing = {"[": "]", "{": "}"}[opening]
    text, at, done = decode(head.removeprefix(BOM)), 0, False
    before = len(head) - len(head.removeprefix(BOM))  # bytes in front of `text`

    def read():
        nonlocal text, at, done, before
        before += len(text[:at].encode("utf-8", "surrogateescape"))
        size = max(PIECE, len(text) - at)  # twice as much each time, for an element that does not end
        data = f.read(size)
        text, at, done = text[at:] + decode(data, final=not data), 0, not data

    row, at = 0, text.index(opening) + 1
    while True:
        at = BETWEEN.match(text, at).end()
        if at == len(text):
            if done:
                yield row + 1, RowError(f"{name}: row {row + 1} is not JSON ({opening} is never closed)")
                return
            read()
            continue
        if text[at] == closing:
            if opening == "{" and (again := re.compile(r"\s*\{").match(text, at + 1)):
                at = again.end()  # one object behind the other
                continue
            return
        try:
            begin = at
            if opening == "{":
                _, begin = decode_json(text, at)
                begin = COLON.match(text, begin).end()  # AttributeError without one
            value, end = decode_json(text, begin)
            if end == len(text) and not done:
                raise ValueError("perhaps there is more of it")
        except (ValueError, AttributeError, RecursionError) as e:
            if not done and len(text) - at < LONGEST:
                read()
                continue
            row += 1
            going_on = NEXT[opening].search(text, at + 1)
            end = going_on.end() if going_on else len(text)
            yield row, RowError(f"{name}: row {row} is not JSON ({getattr(e, 'msg', e)})", text[at:end])
            at = end
            continue
        row += 1
        raw = text[at:end]
        if spoilt := SURROGATE.search(raw):
            data = raw.encode("utf-8", "surrogateescape")
            offset = before + len(text[:at + spoilt.start()].encode("utf-8", "surrogateescape"))
            value = RowError(not_utf8(f"{name}: row {row}", data, offset), data.decode("utf-8", "replace"))
        yield row, value
        at = end


def read_records(path):
    """Yield (row number, record). Raises RowError, a ValueError, at the first row that cannot be read."""
    for row, record in scan(path):
        if isinstance(record, RowError):
            raise record
        yield row, record


def text_field(path, row, record, names, required=True):
    """The first of the fields `names` that the record has, stripped. Raises ValueError naming file and row."""
    if not isinstance(record, dict):
        raise ValueError(f"{path}: row {row} is {type(record).__name__}, not an object")
    name = next((n for n in names if n in record), None)
    if name is None and required:
        raise ValueError(f"{path}: row {row} has no {names[0]!r}")
    value = record[name] if name else ""
    if not isinstance(value, str):
        raise ValueError(f"{path}: row {row}: {name!r} is {type(value).__name__}, not a string")
    if required and not value.strip():
        raise ValueError(f"{path}: row {row}: {name!r} is empty")
    if SURROGATE.search(value):
        raise ValueError(f"{path}: row {row}: {name!r} holds half of a surrogate pair, which is no character")
    return value.strip()


def instruction_of(path, row, record, required=True):
    """`instruction`, a newline and `input`; one of them may be missing, and both if not `required`."""
    parts = [text_field(path, row, record, [name], required=False) for name in ("instruction", "input")]
    if required and not any(parts):
        text_field(path, row, record, ["instruction", "input"])  # raises
    return "\n".join(filter(None, parts))


def read_instructions(path):
    """-> list of (instruction, output); the instruction is `instruction`, a newline and `input`, if there is one."""
    pairs = []
    for row, record in read_records(path):
        output = text_field(path, row, record, ["output"])
        parts = [text_field(path, row, record, [name], required=False) for name in ("instruction", "input")]
        pairs.append(("\n".join(filter(None, parts)), output))
    if not pairs:
        raise ValueError(f"{path}: no rows")
    return pairs


def read_stories(path):
    """-> list of texts, from the field `text` (or `story_zh`)."""
    texts = [text_field(path, row, record, ["text", "story_zh"]) for row, record in read_records(path)]
    if not texts:
        raise ValueError(f"{path}: no rows")
    return texts


# ---- the split ----

def story_hash(story):
    """64 bits that are the same for a story whatever its spaces and punctuation."""
    return int.from_bytes(hashlib.sha256(fold(story).encode()).digest()[:8], "big")


def place(story):
    """Where a story stands in [0, 1), uniform, by its hash. The lowest places are validation."""
    return story_hash(story) / 2**64


def split_by_story(items, val_fraction, story=lambda item: item):
    """-> (train, val). All items of one story fall on the same side, whatever their order or number.
    At least one story is validation if val_fraction > 0."""
    places = [place(story(item)) for item in items]
    threshold = max(val_fraction, np.nextafter(min(places), 1)) if val_fraction > 0 else 0
    train = [item for item, p in zip(items, places) if p >= threshold]
    val = [item for item, p in zip(items, places) if p < threshold]
    if not train:
        raise ValueError(f"--val-fraction {val_fraction} leaves no story to train on")
    return train, val


def read_blocks(path):
    """A text file with blocks separated by blank lines -> list of blocks. (Prompts for sample.py.)"""
    try:
        with open(path, encoding="utf-8-sig") as f:
            lines = f.read().split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8") from None
    return ["\n".join(group) for blank, group in groupby(lines, lambda line: not line.strip()) if not blank]
