"""Read the language files of the built-in world. A mistake in one raises a ValueError that names file and entry.

lexicon.toml   closed classes of words: any word of a class fits wherever the class stands in a plot
words.toml     open classes: thousands of words by kind, for open plots, scenes and sentences
plots/, open/  one plot a file; those of open/ are short and have slots of open classes
scenes.toml    a sentence or two that bring in a word, before the plot
later.toml     what the hero makes of a summary that has been told, with a sentence for each asked word
sentences.toml plain sentences that stand alone

lexicon.toml and plots/lost.toml begin with an explanation of the format.
"""
import functools
import json
import re
import sys
import tomllib
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from constraints import FEATURES  # noqa: E402

LANGUAGE = ROOT / "data"        # the folder of the files above
POS = ("noun", "verb", "adj")
ANY = "任何"                    # scenes for any word, whatever its class
HERO = "主角"                   # the class of open plots' heroes; scenes for the hero, where it is what is asked for
HELD_OUT = 14                   # one in so many words of the open classes is held out: see `load_classes`
LEAST = 6                       # scenes of a class without speech: a story has no scene twice
MOST = 5                        # words asked for
PARTICLES = "呀呢吧啊嘛呗哦啦"   # two scenes that differ only in these are one
CHARACTER = ("full", "ta")      # {hero.full} 小兔豆豆, {hero.ta} 它; {hero.kind} where the class has names


def load(folder=LANGUAGE):
    """-> {"lexicon": {class: …}, "plots": […], "scenes": {class: [phrasing, …]}, "later": {setting: {heading:
    [sentence, …]}}, "sentences": [phrasing, …]}: what load_classes, load_plot, load_phrasings, load_settings give.
    Raises ValueError."""
    return _load(Path(folder))


@functools.cache  # takes a second, and many callers need it
def _load(folder):
    lexicon = {}
    for name in ("lexicon.toml", "words.toml"):
        lexicon = load_classes(read_toml(folder / name), folder / name, lexicon)
    plots = {}
    for place in ("plots", "open"):
        paths = sorted((folder / place).glob("*.toml"))
        if not paths:
            raise ValueError(f"{folder / place}: no plot files (*.toml)")
        for path in paths:
            plot = load_plot(path, lexicon)
            if plot["name"] in plots:
                raise ValueError(f"{path}: duplicate plot name {plot['name']!r}")
            plots[plot["name"]] = plot
    elsewhere = {word for plot in plots.values() for name in plot["lexicon"].keys() - lexicon.keys()
                 for word in plot["lexicon"][name].get("by_word", ())}
    if (folder / "authored.jsonl").exists():
        with open(folder / "authored.jsonl", encoding="utf-8") as file:
            elsewhere |= {word for line in file for word in json.loads(line)["words"]}
    for table in lexicon.values():  # what a plot has in a class of its own, or an authored label, is not held out
        again = [entry for entry in table.get("held_out", ()) if entry["word"] in elsewhere]
        for entry in again:
            table["held_out"].remove(entry)
            table["entries"].append(entry)
    scenes, sentences = (load_phrasings(folder / name, lexicon) for name in ("scenes.toml", "sentences.toml"))
    for name, phrasings in ({ANY: [], HERO: []} | scenes).items():
        where = f"{folder / 'scenes.toml'}: [{name}]"
        for i, phrasing in enumerate(phrasings, 1):
            if phrasing["slot"] not in phrasing["parts"]:
                raise ValueError(f"{where} {i}: no {{{phrasing['slot']}}} in {phrasing['text']!r}")
        if sum(not phrasing["speech"] for phrasing in phrasings) < LEAST:
            raise ValueError(f"{where}: fewer than {LEAST} scenes without speech")
    for name, phrasings in sentences.items():
        for i, phrasing in enumerate(phrasings, 1):
            if phrasing["speech"] or "hero" in phrasing["slots"]:
                where = f"{folder / 'sentences.toml'}: [{name}] {i}"
                raise ValueError(f"{where}: {phrasing['text']!r} does not stand alone: it has speech or the hero in it")
    return {"lexicon": lexicon, "plots": list(plots.values()), "scenes": scenes,
            "later": load_settings(folder / "later.toml", lexicon),
            "sentences": [phrasing for group in sentences.values() for phrasing in group]}


def read_toml(path):
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def check_fields(table, where, needs, may):
    """`needs` and `may`: {field: type}. No other field passes: a misspelt `features` would make labels false."""
    if not isinstance(table, dict):
        raise ValueError(f"{where}: is not a table")
    for key in needs:
        if not table.get(key):
            raise ValueError(f"{where}: field {key!r} is missing or empty")
    kinds = needs | may
    for key, value in table.items():
        if key not in kinds:
            raise ValueError(f"{where}: unknown field {key!r}")
        if not isinstance(value, kinds[key]):
            raise ValueError(f"{where}: field {key!r} is not a {kinds[key].__name__}")


# -----------------------------------------------------------------------------
# words

def load_classes(tables, path, lexicon):
    """The classes of a file, beside those of `lexicon` -> {class: {"entries": [{"class": thing, "word": 帽子, "m": 顶,
    …}], "held_out": entries, too, "by_word": {帽子: its entry}, "pos", "names", …}}, {class: {"of": […]}} or {class:
    {"say": […]}}.

    Words of open classes that are held out, a hash decides which, are never drawn for a training story. A word of one
    character is not held out, nor one of a closed class or (see `_load`) of an authored label: these stand in stories
    anyway.
    """
    lexicon = dict(lexicon)
    for name, table in tables.items():
        where = f"{path}: [{name}]"
        if name in lexicon:
            raise ValueError(f"{where}: duplicate class name")
        if isinstance(table, dict) and ("of" in table or "say" in table):
            field = "of" if "of" in table else "say"
            check_fields(table, where, {field: list}, {})
            if not all(isinstance(item, str) for item in table[field]):
                raise ValueError(f"{where}: {field} must be a list of strings")
            if any("“" in item for item in table[field]):
                raise ValueError(f"{where}: a sentence with quotation marks (these stand in silent stories too)")
            lexicon[name] = table
            continue
        fields = {"pos": str, "form": str, "names": str, "in_text": bool, "open": bool, "name_alone": bool}
        check_fields(table, where, {"words": str}, dict.fromkeys(table, str) | fields)
        if table.get("pos", "noun") not in POS:
            raise ValueError(f"{where}: pos must be one of {', '.join(POS)}")
        columns = table.get("form", "word").split()
        shared = {key: value for key, value in table.items() if key not in fields and key != "words"}
        entries = {}
        for line in filter(str.strip, re.split("[,\n]", table["words"])):
            cells = ["" if cell == "-" else cell for cell in line.split()]
            entry = {"class": name} | shared | dict(zip(columns, cells))
            if len(cells) != len(columns) or not entry.get("word", "").isalpha():
                raise ValueError(f"{where}: {line.strip()!r} does not have the form {' '.join(columns)!r}")
            if entry["word"] in entries:
                raise ValueError(f"{where}: duplicate word {entry['word']!r}")
            entries[entry["word"]] = entry
        if table.get("names") and not all("ta" in entry for entry in entries.values()):
            raise ValueError(f"{where}: characters with names need a pronoun, the column or field ta")
        for other in (other for other in lexicon if table.get("open") and lexicon[other].get("open")):
            if again := sorted(entries.keys() & lexicon[other]["by_word"]):
                raise ValueError(f"{where}: {again[0]!r} is in [{other}], too")
        closed = {word for other in lexicon.values() if not other.get("open") for word in other.get("by_word", ())}
        held_out = {word for word in entries if table.get("open") and len(word) > 1 and word not in closed
                    and zlib.crc32(word.encode()) % HELD_OUT == 0}
        lexicon[name] = {key: table.get(key) for key in fields} | {
            "entries": [entry for word, entry in entries.items() if word not in held_out],
            "held_out": [entry for word, entry in entries.items() if word in held_out], "by_word": entries}
        if not lexicon[name]["entries"]:
            raise ValueError(f"{where}: no word that is not held out")
    for name in tables:
        for sentence in lexicon[name].get("say", ()):
            if any("say" in lexicon.get(slot, ()) for slot in re.findall(r"\{([^{}]*)\}", sentence)):
                raise ValueError(f"{path}: [{name}]: a sentence class within another, in {sentence!r}")
        for other in lexicon[name].get("of", [lexicon[name].get("names")]):
            if other is not None and "entries" not in lexicon.get(other, {}):
                raise ValueError(f"{path}: [{name}]: unknown class {other!r}")
    return lexicon


def tables_of(lexicon, kind, where):
    """The tables of the class `kind`: its own, or those it is composed of."""
    if not isinstance(kind, str) or "say" in lexicon.get(kind, {"say": 0}):
        raise ValueError(f"{where}: unknown class {kind!r}")
    return [lexicon[name] for name in lexicon[kind].get("of", [kind])]


# -----------------------------------------------------------------------------
# phrasings

class Slot(str):
    """A place in a phrasing that a word fills: hero, thing.m, they."""


class Slots:
    """The slots that a file declares, plus one for every class that its phrasings name directly."""

    def __init__(self, declared, lexicon, where):
        self.lexicon, self.where = lexicon, where
        self.tables = {slot: tables_of(lexicon, kind, f"{where}: slot {slot!r}") for slot, kind in declared.items()}
        self.columns = {}

    def has(self, slot):
        name, _, column = slot.partition(".")
        if name not in self.tables and name in self.lexicon and "say" not in self.lexicon[name]:
            self.tables[name] = tables_of(self.lexicon, name, self.where)
        if name in self.tables and name not in self.columns:
            of_characters = {"kind", *CHARACTER}
            firsts = [(table, table["entries"][0]) for table in self.tables[name]]  # the others have the same columns
            self.columns[name] = set.intersection(*(
                set(entry) - {"class"} | (of_characters if table["names"] or "ta" in entry else set())
                for table, entry in firsts))
        return slot == "they" or (name in self.columns and (not column or column in self.columns[name]))

    def compile(self, text, where):
        """"一{thing.m}{thing}{呢|呀}" -> ["一", Slot("thing.m"), "", Slot("thing"), "", ["呢", "呀"], ""].

        A list is a choice: of strings, or of the compiled sentences of a class that has `say`.
        """
        parts = re.split(r"\{([^{}]*)\}", text)
        if "{" in "".join(parts[::2]) or "}" in "".join(parts[::2]):
            raise ValueError(f"{where}: a brace without its partner")
        for i in range(1, len(parts), 2):
            if "|" in parts[i]:
                parts[i] = parts[i].split("|")
            elif "say" in self.lexicon.get(parts[i], ()):
                name = parts[i]
                parts[i] = [self.compile(sentence, f"{where}: {{{name}}}, sentence {j}")
                            for j, sentence in enumerate(self.lexicon[name]["say"], 1)]
            elif self.has(parts[i]):
                parts[i] = Slot(parts[i])
            else:
                raise ValueError(f"{where}: unknown slot {{{parts[i]}}}")
        return parts

    def phrasings(self, texts, where):
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"{where}: must be a list of phrasings")
        if again := next((text for i, text in enumerate(texts) if text in texts[:i]), None):
            raise ValueError(f"{where}: {again!r} is there twice")
        return [self.compile(text, f"{where}, phrasing {i}") for i, text in enumerate(texts, 1)]

    def beat(self, texts, where):
        """A pair of lists of phrasings: (those without speech, all)."""
        compiled = self.phrasings(texts, where)
        silent = [parts for parts, text in zip(compiled, texts) if "“" not in text]
        if not silent:
            raise ValueError(f"{where}: needs a phrasing without quotation marks")
        return silent, compiled


def load_phrasings(path, lexicon):
    """scenes.toml or sentences.toml: {heading: [{"parts", "slots": {slot: tables}, "speech", "text", "slot", "first"},
    …]}. A slot is a class, or hero: the story's. "slot": the one that the heading is about; "first": the text begins
    with it."""
    groups, shapes = {}, {}
    for heading, table in read_toml(path).items():
        check_fields(table, f"{path}: [{heading}]", {"say": list}, {})
        groups[heading] = []
        about = Slot("hero" if heading == HERO else heading)
        for i, text in enumerate(table["say"], 1):
            where = f"{path}: [{heading}] {i}"
            slots = Slots({"hero": HERO} | ({ANY: "其他"} if heading == ANY else {}), lexicon, where)
            parts, = slots.phrasings([text], where)
            for slot in re.findall(r"\{([^{}|]*)\}", text):
                if slot == "they" or "say" in lexicon.get(slot, ()):
                    raise ValueError(f"{where}: {{{slot}}} is for plots only")
            shape = re.sub(f"[{PARTICLES}]", "", re.sub(r"\{[^{}]*\}", "{}", text))
            if shape in shapes:
                raise ValueError(f"{where}: differs from {shapes[shape]} only in its slots or particles")
            shapes[shape] = where
            used = dict.fromkeys(part.partition(".")[0] for part in parts if isinstance(part, Slot))  # in their order
            groups[heading].append({"parts": parts, "slots": {slot: slots.tables[slot] for slot in used},
                                    "speech": "“" in text, "text": text, "slot": about,
                                    "first": text.lstrip("“‘").startswith(f"{{{about}}}")})
    return groups


def load_settings(path, lexicon):
    """later.toml: {setting: {"主角": [class of heroes, …], "开头": [sentence, …], "结尾", "名物", "动作", "其他"}}. One
    setting has no 主角: that of all other heroes."""
    settings, seen, heroes = read_toml(path), set(), set()
    headings = "开头", "结尾", "名物", "动作", "其他"
    for name, table in settings.items():
        check_fields(table, f"{path}: [{name}]", dict.fromkeys(headings, list), {"主角": list})
        for kind in table.get("主角", ()):
            if not isinstance(kind, str) or "entries" not in lexicon.get(kind, {}) or kind in heroes:
                raise ValueError(f"{path}: [{name}] 主角: {kind!r} is no class of words, or there twice")
            heroes.add(kind)
        for heading in headings:
            texts = table[heading]
            slot = "{hero}" if heading in ("开头", "结尾") else "{词}"
            for i, text in enumerate(texts, 1):
                where = f"{path}: [{name}] {heading} {i}"
                if not isinstance(text, str):
                    raise ValueError(f"{where}: {text!r} is not a sentence")
                if text in seen:
                    raise ValueError(f"{where}: {text!r} is there twice")
                if re.search("[{}]", text.replace(slot, "")):
                    raise ValueError(f"{where}: only {slot} can stand in {text!r}")
                if slot == "{词}" and not text.lstrip("“").startswith(slot):
                    raise ValueError(f"{where}: {text!r} does not begin with {slot}")
                seen.add(text)
            if slot == "{词}" and len(texts) != 2 * MOST:
                raise ValueError(f"{path}: [{name}] {heading}: needs {2 * MOST} sentences, two for each word")
        if len({"“" in text for text in table["开头"]}) < 2:
            raise ValueError(f"{path}: [{name}] 开头: needs sentences with speech and without")
    if sum(not table.get("主角") for table in settings.values()) != 1:
        raise ValueError(f"{path}: one setting, and no more, must be without 主角, for all other heroes")
    return settings


# -----------------------------------------------------------------------------
# plots

def load_plot(path, lexicon):
    """One plot file -> {"path", "name", "central", "open", "slots": {slot: tables}, "lexicon", "endings", "in_text":
    {word that stands in the phrasings: part of speech}}. An ending's "beats", from the first to the last of the story,
    are pairs (optional?, `Slots.beat`)."""
    plot = read_toml(path)
    check_fields(plot, path, {"name": str, "central": str, "slots": dict, "beat": list, "ending": list},
                 {"features": list, "class": dict})
    lexicon = load_classes(plot.get("class", {}), path, lexicon)
    slots = Slots(plot["slots"], lexicon, path)
    if not slots.has(plot["central"]):
        raise ValueError(f"{path}: central {plot['central']!r} is not one of the slots")
    if "hero" not in slots.tables:
        raise ValueError(f"{path}: no slot 'hero', which scenes name")

    def features(table, where):
        for feature in table.get("features", []):
            if feature not in FEATURES or feature == "对话":      # 对话 is seen in the text, not declared
                raise ValueError(f"{where}: unknown feature {feature!r}")
        return set(table.get("features", []))

    endings = {}
    for i, table in enumerate(plot["ending"], 1):
        where = f"{path}: ending {i}"
        check_fields(table, where, {"name": str, "say": list, "summary": list}, {"features": list})
        if table["name"] in endings:
            raise ValueError(f"{where}: duplicate ending name {table['name']!r}")
        endings[table["name"]] = {
            "name": table["name"],
            "features": features(plot, path) | features(table, where),
            "beats": [(False, slots.beat(say, f"{where}, say {j}")) for j, say in enumerate(table["say"], 1)],
            "summary": slots.phrasings(table["summary"], f"{where}, summary")}
    common = []
    for i, table in enumerate(plot["beat"], 1):
        where = f"{path}: beat {i}"
        check_fields(table, where, {"say": list}, {"only": list, "optional": bool})
        for key in table.get("only", []):
            if key not in endings:
                raise ValueError(f"{where}: unknown ending {key!r} in only")
        common.append((table.get("only", endings), (table.get("optional", False), slots.beat(table["say"], where))))
    for key, ending in endings.items():      # what is told of a story with this ending, from first to last
        ending["beats"] = [beat for only, beat in common if key in only] + ending["beats"]
    text = path.read_text(encoding="utf-8") + "".join(
        sentence for table in lexicon.values() for sentence in table.get("say", ()))
    in_text = {entry["word"]: table["pos"] for table in lexicon.values() if table.get("in_text")
               for entry in table["entries"] if entry["word"] in text}
    return {"path": path, "name": plot["name"], "central": plot["central"], "open": path.parent.name == "open",
            "slots": slots.tables, "lexicon": lexicon, "endings": list(endings.values()), "in_text": in_text}
