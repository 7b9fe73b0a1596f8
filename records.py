"""Records: reading files row by row, and the side of the split on which a story falls.

An instruction record is {"instruction": …, "input": …, "output": …} (Alpaca), a story record {"text": …}. They come as
JSONL or JSON, as .csv, .tsv or .txt; other people's fields are read as these. A field that is null is one that is not
there. Every error names the file and the row. Nothing here needs PyTorch.
"""
import codecs
import csv
import hashlib
import io
import json
import math
import re
import sys
from itertools import chain, groupby

from constraints import NEWLINE, fold, parse_record

BOM = codecs.BOM_UTF8
SURROGATE = re.compile("[\ud800-\udfff]")
FIELDS = {"instruction", "input", "output", "text", "story", "story_zh", "constraints", "words", "features", "sentence",
          "summary"}
OTHER_FORMATS = {"gzip-compressed": rb"\x1f\x8b", "a zip file (as .xlsx is)": rb"PK\x03\x04"}
JSON = re.compile(rb"[{[]\s*([\"{[]|$)")  # how a .txt begins that is JSON, and no story: [序]
TABLE = re.compile(rb'"?\w+"?(?:([,;\t])"?\w+"?)+\s*$')  # the first line of a table without .csv or .tsv to its name
# other people's fields: prompt and completion (Hugging Face, OpenAI), question and answer, content (of a title)
ALIASES = {"prompt": "instruction", "question": "instruction", "query": "instruction", "completion": "output",
           "response": "output", "answer": "output", "content": "text"}
TURNS = "messages", "conversations"  # OpenAI's, with role and content; ShareGPT's, with from and value; or mixed
SPEAKERS = {"user": "instruction", "human": "instruction", "assistant": "output", "gpt": "output"}
NOT_READ = "system", "history", "title"
csv.field_size_limit(2**31 - 1)
# null is absence, and so is the NaN that pandas writes for it
DECODER = json.JSONDecoder(parse_constant=lambda name: None,
                           object_hook=lambda fields: {key: v for key, v in fields.items() if v is not None})


# ---- rows ----

class RowError(ValueError):
    """A row that cannot be read. `raw` is its text, as far as it can be decoded."""

    def __init__(self, message, raw):
        super().__init__(message)
        self.raw = raw


def scan(f, name, encoding="utf-8"):
    """Yield (row number, record or RowError) of an open binary file, which error messages call `name`: JSONL, a JSON
    list, a JSON object of {id: record}; .csv or .tsv with a header; .txt. Records have our fields, whatever the file's.

    Rows count from 1; in JSONL they are lines, read one by one, and reading goes on behind one that is broken. All else
    is read as a whole, and raises a ValueError if it is broken. What holds content and is not read is named, once.
    """
    told = set()
    for row, record in _scan(f, name, encoding):
        try:
            record = usual(record)
        except ValueError as e:
            record = RowError(f"{name}: row {row} {e}", json.dumps(record, ensure_ascii=False))
        for field in NOT_READ:
            if isinstance(record, dict) and record.get(field) and field not in told:
                told.add(field)
                print(f"notice: {name}: {field!r} is not read (row {row})", file=sys.stderr)
        yield row, record


def usual(record):
    """A record in other people's fields -> the same in ours; a ValueError says what the row "has"."""
    if not isinstance(record, dict):
        return record
    for field in TURNS:
        if isinstance(turns := record.get(field), list):
            if not all(isinstance(turn, dict) for turn in turns):
                raise ValueError(f"has {field!r} that are no turns")
            who = [str(turn.get("role", turn.get("from"))) for turn in turns]
            said = {speaker: turn.get("content", turn.get("value")) for speaker, turn in zip(who, turns)}
            speakers = [speaker for speaker in who if speaker != "system"]
            if [SPEAKERS.get(speaker) for speaker in speakers] not in (["instruction"], ["instruction", "output"]):
                raise ValueError(f"has the turns {', '.join(speakers)}; one instruction and one story are needed")
            record = {key: value for key, value in record.items() if key != field} | {
                SPEAKERS.get(speaker, speaker): text for speaker, text in said.items()}
    for theirs, ours in ALIASES.items():
        if theirs in record and not record.keys() & {ours, *(["story_zh", "story"] if ours == "text" else [])}:
            record = {ours if key == theirs else key: value for key, value in record.items()}
    return record


def plain(record):
    """A string that has no line of a translation cache in it is a story."""
    if isinstance(record, str) and not any(parse_record(record)[::2]):
        return {"text": record}
    return record


def _scan(f, name, encoding):
    kind = str(name).lower().rpartition(".")[2]
    f = to_utf8(f, name, encoding)
    head, filled = [], []
    while len(filled) < 2 and (line := f.readline()):
        head.append(line)
        if stripped := line.removeprefix(BOM).strip():
            filled.append(stripped)
    first, second = (*filled, b"", b"")[:2]
    refuse_other_formats(name, first)
    table = TABLE.match(first)
    if kind in ("csv", "tsv") or table:
        delimiter = table[1].decode() if table else "\t" if kind == "tsv" else ","
        yield from _table(name, b"".join(head) + f.read(), delimiter)
        return
    if kind == "txt" and first and not JSON.match(first):
        yield from _text(name, b"".join(head) + f.read())
        return
    if first.startswith(b"[") or (first.startswith(b"{") and (
            not second or not (first.endswith(b"}") or second.startswith(b"{")))):  # an object over several lines
        yield from enumerate(_whole(name, b"".join(head) + f.read()), 1)
        return
    for row, line in enumerate(chain(head, f), 1):
        if line.removeprefix(BOM).strip():
            try:
                yield row, plain(_decode(line))
            except ValueError as e:
                yield row, RowError(f"{name}: row {row} {e}", line.decode("utf-8", "replace"))


def to_utf8(f, name, encoding):
    """An open binary file in some encoding -> the same in UTF-8. Raises ValueError."""
    if encoding == "utf-8":
        return f
    try:
        return io.BytesIO(f.read().decode(encoding).encode())
    except UnicodeError:
        raise ValueError(f"{name} is not {encoding.upper()}") from None


def refuse_other_formats(name, first_line):
    """Raise a ValueError for what is often given in place of text."""
    for kind, pattern in OTHER_FORMATS.items():
        if re.match(pattern, first_line):
            raise ValueError(f"{name} is {kind}; JSONL, a JSON list, .csv, .tsv or .txt is wanted")


def _decode(data):
    """bytes -> the JSON value. Raises a ValueError that says what it "is not"."""
    try:
        return DECODER.decode(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    except (ValueError, RecursionError) as e:
        problem = str(e).replace("Extra data", "something follows the end of the list or object")
        raise ValueError(f"is not JSON ({problem})") from None


def _table(name, data, delimiter):
    """A table with a header -> (row, record or RowError); rows count from the one below the header."""
    try:
        lines = io.StringIO(data.decode("utf-8-sig"), newline="")
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not UTF-8") from None
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    row = 0
    try:
        for row, cells in enumerate(reader, 1):
            if None in cells or None in cells.values():
                n = len([cell for cell in cells.values() if cell is not None])
                yield row, RowError(f"{name}: row {row} has not as many cells as the header",
                                    delimiter.join(map(str, list(cells.values())[:n])))
            else:
                yield row, {field: cell for field, cell in cells.items() if cell.strip()}
    except csv.Error as e:
        raise ValueError(f"{name}: row {row + 1} is not CSV ({e})") from None


def _text(name, data):
    """Plain text -> (row, {"text": story}): stories that blank lines separate, or, without any, one a line."""
    try:
        lines = NEWLINE.split(data.decode("utf-8-sig").strip())
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not UTF-8") from None
    stories, by_blank = blocks(lines), not all(line.strip() for line in lines)
    if not by_blank:
        stories = [line for line in lines if line.strip()]
    print(f"{name}: {len(stories)} stories, {'separated by blank lines' if by_blank else 'one a line'}")
    yield from enumerate(({"text": story} for story in stories), 1)


def blocks(lines):
    """Lines -> texts, which blank lines separate."""
    return ["\n".join(group) for blank, group in groupby(lines, lambda line: not line.strip()) if not blank]


def _whole(name, data):
    """One JSON list or object -> a list of records."""
    try:
        value = _decode(data)
    except ValueError as e:
        raise ValueError(f"{name} {e}") from None
    if isinstance(value, list):
        return list(map(plain, value))
    values = list(value.values())
    if not value.keys() & {*FIELDS, *TURNS, *ALIASES}:
        if any(isinstance(v, list) and all(isinstance(row, dict) for row in v) for v in values):
            raise ValueError(f"{name} is an object around a list; a list of records is wanted, or JSONL")
        if all(isinstance(v, dict) for v in values) or (  # or is it a translation cache {"17": "特点：…\n故事：…", …}?
                all(isinstance(v, str) for v in values) and any(parse_record(v)[2] for v in values)):
            return values
    return [value]


def read_records(path, encoding="utf-8"):
    """Yield (row number, record). Raises RowError, a ValueError, at the first row that cannot be read."""
    with open(path, "rb") as f:
        for row, record in scan(f, path, encoding):
            if isinstance(record, RowError):
                raise record
            yield row, record


def text_field(path, row, record, names, required=True):
    """The first of the fields `names` that the record has, stripped; a string is a text. Raises ValueError naming file
    and row."""
    if isinstance(record, str):
        record = {"text": record}
    if not isinstance(record, dict):
        raise ValueError(f"{path}: row {row} is {type(record).__name__}, not an object")
    name = next((name for name in names if record.get(name) is not None), None)
    if name is None:
        if required:
            raise ValueError(f"{path}: row {row} has no {names[0]!r}")
        return ""
    value = record[name]
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


def read_instructions(path, encoding="utf-8"):
    """-> list of (instruction, output), as instruction_of joins it."""
    pairs = [(instruction_of(path, row, record), text_field(path, row, record, ["output"]))
             for row, record in read_records(path, encoding)]
    if not pairs:
        raise ValueError(f"{path}: no rows")
    return pairs


def read_stories(path, encoding="utf-8"):
    """-> list of texts, from the field `text` (or `story_zh`, or a pair's `output`)."""
    names = ["text", "story_zh", "output"]
    texts = [text_field(path, row, record, names) for row, record in read_records(path, encoding)]
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
    threshold = max(val_fraction, math.nextafter(min(places), 1)) if val_fraction > 0 else 0
    train = [item for item, p in zip(items, places) if p >= threshold]
    val = [item for item, p in zip(items, places) if p < threshold]
    if not train:
        raise ValueError(f"--val-fraction {val_fraction} leaves no story to train on")
    return train, val


def read_blocks(path):
    """A text file with blocks separated by blank lines -> list of blocks. (Prompts for sample.py.)"""
    try:
        with open(path, encoding="utf-8-sig") as f:
            return blocks(f.read().split("\n"))
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8") from None
