"""The instructions that a model is judged by (evaluate.py): rows {"constraints", "story" or None, "rivals"}.

Handwritten ones, whose sentences and summaries no built-in text has; those of generated stories that are held out; or a
user's own file, read strictly, since a constraint that is misread is one that is never met.
"""
import random
import re
from pathlib import Path

from constraints import (
    FEATURE,
    FEATURES,
    KEYS,
    LIST_KEYS,
    NEWLINE,
    SENTENCE,
    SUMMARY,
    WORDS,
    check,
    fold,
    head,
    key_of,
    outcomes,
    overlap,
    parse,
    render,
)
from data import builtin, generate, language
from records import instruction_of, read_records, text_field

HANDWRITTEN = Path(__file__).parent / "eval_instructions.jsonl"
RIVALS = 19  # other summaries that a story is compared with
RARE = "rare"  # the source of the rows below
# the tokenizer of the base spells them in bytes
RARE_WORDS = "饕餮", "貔貅", "鸬鹚", "龃龉", "氤氲", "旖旎", "魍魉", "囹圄", "耄耋", "獬豸"
TELLING = 0.15  # `overlap` of a summary with its own story: then the rule is right of 98 in 100


def read_rows(path, encoding="utf-8"):
    """Instruction records -> [{"constraints", "story" or None}]. Raises ValueError naming file and row."""
    rows = []
    for number, record in read_records(path, encoding):
        where = f"{path}: row {number}"
        record = {"text": record} if isinstance(record, str) else record
        story = text_field(path, number, record, ["output"], required=False)
        given = record.get("constraints")
        if given is not None and not isinstance(given, dict):
            raise ValueError(f"{where}: 'constraints' is {type(given).__name__}, not an object")
        if given:
            unknown = [key for key in given if key not in KEYS]
        else:
            text = instruction_of(path, number, record)
            unknown = list(filter(None, map(unknown_key, NEWLINE.split(text))))
        if unknown:
            raise ValueError(f"{where}: unknown constraint {unknown[0]!r} (known: {'，'.join(KEYS)})")
        for key, value in (given or {}).items():
            kind, name = (list, "list of strings") if key in LIST_KEYS else (str, "string")
            if not isinstance(value, kind) or not all(isinstance(item, str) for item in value):
                raise ValueError(f"{where}: {key} is not a {name}")
        if given:
            text = text_field(path, number, {"constraints": render(given)}, ["constraints"], required=False)
        constraints = parse(text)[0]  # what the prompt says is what is checked
        if not constraints:
            raise ValueError(f"{where}: no constraints")
        for name in constraints.get(FEATURE, []):
            if name not in FEATURES:
                raise ValueError(f"{where}: unknown feature {name!r} (known: {'，'.join(FEATURES)})")
        for key in (SUMMARY, SENTENCE):
            if key in constraints and not fold(constraints[key]):
                raise ValueError(f"{where}: {key} {constraints[key]!r} has nothing that can be checked")
        rows.append({"constraints": constraints, "story": story or None})
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def unknown_key(line):
    """颜色 of the line 颜色：红, which means to be a constraint; None of 他说：“好！”, which does not."""
    found = head(line)
    value = line[found.end():].lstrip() if found else ""
    meant = value and value[0] not in "“「『\"" and re.fullmatch(r"\w{1,12}", found["name"])
    return found["name"] if meant and key_of(found) not in KEYS else None


def held_out_rows(n=builtin.INSTRUCTIONS):
    """Instructions of n generated stories that are held out, with the story; without those whose summary shares so
    little with it that the rule for 摘要 could not tell."""
    return [{"constraints": r["constraints"], "story": r["output"]} for r in builtin.held_out_instructions(n)
            if overlap(r["constraints"].get(SUMMARY, r["output"]), r["output"]) >= TELLING]


def builtin_rows():
    """The handwritten instructions, and those of generated stories, which have the story too."""
    rows = ([row | {"source": "handwritten"} for row in read_rows(HANDWRITTEN)]
            + [row | {"source": "generated"} for row in held_out_rows()]
            + [{"constraints": {WORDS: [word]}, "story": None, "source": RARE} for word in RARE_WORDS])
    trained = generate.trained_words()
    return [row | {"trained_words": trained & set(row["constraints"].get(WORDS, []))} for row in rows]


def checkable(rows, detect=None):
    """Those rows that ask for more than features which neither a rule nor `detect` can tell."""
    return [row for row in rows
            if set(row["constraints"]) - {FEATURE} or outcomes(check("", row["constraints"], detect=detect))]


def refuse_handwritten(rows, path):
    """Raise ValueError if some of the rows, read from `path` to train on, have a sentence or a summary of a handwritten
    instruction. (A feature or a word can be anyone's.)"""
    def texts(rows):
        found = (row["constraints"].get(key) for row in rows for key in (SENTENCE, SUMMARY))
        return set(map(fold, filter(None, found)))
    if again := texts(rows) & texts(read_rows(HANDWRITTEN)):
        raise ValueError(f"{path}: {min(again)!r} is of {HANDWRITTEN.name}, by which models are judged")


def add_rivals(rows, seed):
    """Give every row with a summary the 19 others it is told apart from: the same kind of protagonist first."""
    lexicon = language.load()["lexicon"]
    cast = {"animal": ("animal", "pet_name", "动物", "bird"), "boy": ("boy", "boy_name"), "girl": ("girl", "girl_name"),
            "person": ("人物", "elder")}
    kinds = {word: kind for kind, names in cast.items() for name in names for word in lexicon[name]["by_word"]}
    names = re.compile("|".join(map(re.escape, sorted(kinds, key=len, reverse=True))))
    summaries = sorted({row["constraints"][SUMMARY] for row in rows if SUMMARY in row["constraints"]})
    protagonist = {s: kinds[first[0]] if (first := names.search(s)) else "" for s in ["", *summaries]}
    for i, row in enumerate(rows):
        own = row["constraints"].get(SUMMARY, "")
        others = [s for s in summaries if s != own]
        random.Random(f"{seed}-{i}").shuffle(others)
        row["rivals"] = sorted(others, key=lambda s: protagonist[s] != protagonist[own])[:RIVALS]
