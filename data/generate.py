"""The built-in corpus: small Chinese stories with truthful labels, composed from the language files beside this script.

    python data/generate.py --n 20000 --seed 1 --out out/data/stories.jsonl --instructions out/data/instructions.json

`lexicon.toml` holds words in classes, every file of `plots/` one plot; lexicon.toml and plots/lost.toml begin with an
explanation of their format.
A story is: a plot, one of its endings, one word for each slot, one phrasing for each beat. No word depends on another
one, so a model that gets them right has copied them from its prompt. That is what the corpus is for, and why names
and the central thing of a story recur (see `recurs`). More plots or words need no change here.
"""
import functools
import hashlib
import json
import random
import re
import sys
import tomllib
import zlib
from itertools import combinations, count
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tqdm import tqdm  # noqa: E402

from common import check_writable, command_line, fail, seed_number, write_jsonl  # noqa: E402
from constraints import FEATURES, KEYS, has_dialogue, render, sentences  # noqa: E402

VERSION = 2                     # of what is written: another number when the same seed gives other stories
LANGUAGE = ROOT / "data"        # the folder of lexicon.toml and plots/
POS = ("noun", "verb", "adj")
STORY_CHARS = 120, 400
SUMMARY_CHARS = 15, 60
SENTENCE_CHARS = 6, 30          # preferred length of the sentence that serves as 随机句子
TALK = 0.64                     # share of stories that may use phrasings with speech in them
HELD_OUT = 400                  # one in so many pairs of slot words never occurs in a training story
SLOT_WORDS = 0.75               # with --slot-words: share of stories whose words are slot words only
TRIES = 1000                    # phrasings drawn anew until length and recurrence are right
ALIKE = 20                      # of these, with the words of another story


# -----------------------------------------------------------------------------
# the language files; what is wrong in one is a ValueError that names file and entry

@functools.cache  # half a second, and many ask
def load(folder=LANGUAGE):
    """Read `folder`/lexicon.toml and `folder`/plots/*.toml -> (lexicon, plots). Raises ValueError."""
    path = Path(folder) / "lexicon.toml"
    lexicon = load_classes(read_toml(path), path)
    plots = {}
    for path in sorted(Path(folder, "plots").glob("*.toml")):
        plot = load_plot(path, lexicon)
        if plot["name"] in plots:
            raise ValueError(f"{path}: duplicate plot name {plot['name']!r}")
        plots[plot["name"]] = plot
    if not plots:
        raise ValueError(f"{Path(folder, 'plots')}: no plot files (*.toml)")
    return lexicon, list(plots.values())


def read_toml(path):
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def check(table, where, needs, may):
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


def load_classes(tables, path, lexicon=()):
    """The classes of a file, beside those of `lexicon` -> {class: {"entries": [{"word": 帽子, "m": 顶, ...}], "pos",
    "names", "in_text"}}, {class: {"of": [...]}} or {class: {"say": [...]}}."""
    lexicon = dict(lexicon)
    for name, table in tables.items():
        where = f"{path}: [{name}]"
        if name in lexicon:
            raise ValueError(f"{where}: duplicate class name")
        if isinstance(table, dict) and ("of" in table or "say" in table):
            field = "of" if "of" in table else "say"
            check(table, where, {field: list}, {})
            if not all(isinstance(item, str) for item in table[field]):
                raise ValueError(f"{where}: {field} must be a list of strings")
            if any("“" in item for item in table[field]):
                raise ValueError(f"{where}: a sentence with quotation marks (these stand in silent stories too)")
            lexicon[name] = table
            continue
        same = {"pos": str, "form": str, "names": str, "in_text": bool}     # and any columns that all entries share
        check(table, where, {"words": str}, dict.fromkeys(table, str) | same)
        if table.get("pos", "noun") not in POS:
            raise ValueError(f"{where}: pos must be one of {', '.join(POS)}")
        columns = table.get("form", "word").split()
        shared = {key: value for key, value in table.items() if key not in same and key != "words"}
        entries = {}
        for line in filter(str.strip, re.split("[,\n]", table["words"])):
            entry = shared | dict(zip(columns, line.split()))
            if len(line.split()) != len(columns) or not entry.get("word", "").isalpha():
                raise ValueError(f"{where}: {line.strip()!r} does not have the form {' '.join(columns)!r}")
            if entry["word"] in entries:
                raise ValueError(f"{where}: duplicate word {entry['word']!r}")
            entries[entry["word"]] = entry
        lexicon[name] = {key: table.get(key) for key in same} | {"entries": list(entries.values())}
    for name in tables:
        for sentence in lexicon[name].get("say", ()):
            if any("say" in lexicon.get(slot, ()) for slot in re.findall(r"\{([^{}]*)\}", sentence)):
                raise ValueError(f"{path}: [{name}]: a sentence class within another, in {sentence!r}")
        for other in lexicon[name].get("of", [lexicon[name].get("names")]):
            if other is not None and "entries" not in lexicon.get(other, {}):
                raise ValueError(f"{path}: [{name}]: unknown class {other!r}")
    return lexicon


class Slot(str):
    """A place in a phrasing that a word fills: hero, thing.m, they."""


def load_plot(path, lexicon):
    """One plot file. Its beats become pairs of lists of phrasings: (those without speech, all), see `compiled`."""
    plot = read_toml(path)
    check(plot, path, {"name": str, "central": str, "slots": dict, "beat": list, "ending": list},
          {"features": list, "class": dict})
    everywhere, lexicon = lexicon, load_classes(plot.get("class", {}), path, lexicon)
    slots = {slot: classes_of(lexicon, kind, f"{path}: slot {slot!r}") for slot, kind in plot["slots"].items()}
    if plot["central"] not in slots:
        raise ValueError(f"{path}: central {plot['central']!r} is not one of the slots")
    columns, said = {}, [path.read_text(encoding="utf-8")]

    def has(slot):
        """Is there a word for this slot? A class that the plot does not declare becomes a slot of that name."""
        name, _, column = slot.partition(".")
        if name not in slots and name in lexicon:
            slots[name] = classes_of(lexicon, name, path)
        if name in slots and name not in columns:
            columns[name] = set.intersection(*(set(entry) | ({"kind", "full"} if table["names"] else set())
                                               for table in slots[name] for entry in table["entries"]))
        return slot == "they" or (name in columns and (not column or column in columns[name]))

    def compiled(text, where):
        """"一{thing.m}{thing}{呢|呀}" -> ["一", Slot("thing.m"), "", Slot("thing"), "", ["呢", "呀"], ""].

        A list is a choice: of strings, or of the compiled sentences of a class that has `say`. A slot that the plot
        does not declare is a class of the lexicon; it is added to `slots`.
        """
        parts = re.split(r"\{([^{}]*)\}", text)
        if "{" in "".join(parts[::2]) or "}" in "".join(parts[::2]):
            raise ValueError(f"{where}: a brace without its partner")
        for i in range(1, len(parts), 2):
            if "|" in parts[i]:
                parts[i] = parts[i].split("|")
            elif "say" in lexicon.get(parts[i], ()):
                name = parts[i]
                said.extend(lexicon[name]["say"])
                parts[i] = [compiled(sentence, f"{where}: {{{name}}}, sentence {j}")
                            for j, sentence in enumerate(lexicon[name]["say"], 1)]
            elif has(parts[i]):
                parts[i] = Slot(parts[i])
            else:
                raise ValueError(f"{where}: unknown slot {{{parts[i]}}}")
        return parts

    def phrasings(texts, where):
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{where}: must be a list of phrasings")
        return [compiled(text, f"{where}, phrasing {i}") for i, text in enumerate(texts, 1)]

    def beat(texts, where):
        parts = phrasings(texts, where)
        silent = [part for part, text in zip(parts, texts) if "“" not in text]
        if not silent:
            raise ValueError(f"{where}: needs a phrasing without quotation marks")
        return silent, parts

    def features(table, where):
        for feature in table.get("features", []):
            if feature not in FEATURES or feature == "对话":      # 对话 is seen in the text, not declared
                raise ValueError(f"{where}: unknown feature {feature!r}")
        return set(table.get("features", []))

    endings = {}
    for i, table in enumerate(plot["ending"], 1):
        where = f"{path}: ending {i}"
        check(table, where, {"name": str, "say": list, "summary": list}, {"features": list})
        if table["name"] in endings:
            raise ValueError(f"{where}: duplicate ending name {table['name']!r}")
        endings[table["name"]] = {
            "name": table["name"],
            "features": features(plot, path) | features(table, where),
            "beats": [(False, beat(say, f"{where}, say {j}")) for j, say in enumerate(table["say"], 1)],
            "summary": phrasings(table["summary"], f"{where}, summary")}
    common = []
    for i, table in enumerate(plot["beat"], 1):
        where = f"{path}: beat {i}"
        check(table, where, {"say": list}, {"only": list, "optional": bool})
        for key in table.get("only", []):
            if key not in endings:
                raise ValueError(f"{where}: unknown ending {key!r} in only")
        common.append((table.get("only", endings), (table.get("optional", False), beat(table["say"], where))))
    for key, ending in endings.items():      # what is told of a story with this ending, from first to last
        ending["beats"] = [told for only, told in common if key in only] + ending["beats"]
    text = "\n".join(said)
    running = {entry["word"]: group["pos"] for group in lexicon.values() if group.get("in_text")
               for entry in group["entries"] if entry["word"] in text}
    slot_words, shared_words = ([entry["word"] for group in classes.values() if group.get("pos")
                                 and not group.get("in_text") for entry in group["entries"]]
                                for classes in (lexicon, everywhere))
    return {"path": path, "name": plot["name"], "central": plot["central"], "slots": slots, "lexicon": lexicon,
            "endings": list(endings.values()), "running": running, "slot_words": slot_words,
            "shared_words": shared_words}


def classes_of(lexicon, kind, where):
    if not isinstance(kind, str) or "say" in lexicon.get(kind, {"say": 0}):
        raise ValueError(f"{where}: unknown class {kind!r}")
    return [lexicon[name] for name in lexicon[kind].get("of", [kind])]


# -----------------------------------------------------------------------------
# one story

def chosen(parts, rng):
    """A compiled phrasing with all its choices made: a list of strings and Slots."""
    made = []
    for part in parts:
        if isinstance(part, list):
            part = rng.choice(part)
        made += chosen(part, rng) if isinstance(part, list) else [part]
    return made


def draw(plot, slots, rng, like=()):
    """One entry for each of these slots -> ({"hero": 豆豆, "hero.kind": 小兔, "hero.m": 只, ...}, {小兔: noun, ...},
    [(class, entry, name or None)]: what was drawn).

    No two words of a story are alike or one inside the other: labels and counts would lie. like: what was drawn for
    another story; a slot takes its word from there wherever the class is the same.
    """
    values, words, used, pronouns, drawn = {}, {}, [], [], []
    for slot, tables in plot["slots"].items():
        if slot not in slots:
            continue
        known = [other for other in like if other not in drawn and any(other[0] is table for table in tables)]
        for i in range(TRIES):
            if i < len(known):
                table, entry, name = known[i]
            else:
                table = rng.choice(tables)
                entry = rng.choice(table["entries"])
                name = rng.choice(plot["lexicon"][table["names"]]["entries"])["word"] if table["names"] else None
            new = [entry["word"]] + [name] * bool(name)
            if not any(a in b or b in a for a in new for b in used):
                break
        else:
            raise ValueError(f"{plot['path']}: slot {slot!r}: its class has no word that the story does not have yet")
        used += new
        drawn.append((table, entry, name))
        if table["names"]:
            pronouns.append(entry.get("ta", "他"))
        if table["pos"]:
            words[entry["word"]] = table["pos"]
        values |= {f"{slot}.{column}": cell for column, cell in entry.items()}
        values[slot] = new[-1]
        values[slot + ".kind"] = entry["word"]
        values[slot + ".full"] = "".join(new)
    two = set(pronouns[:2])             # the first two characters: 她们, 它们, and 他们 for any mixture
    values["they"] = (two.pop() if len(two) == 1 else "他") + "们"
    return values, words, drawn


def fill(parts, values):
    return "".join(values[part] if isinstance(part, Slot) else part for part in parts)


def recurs(text, plot, values):
    """Names and the central word occur three times, or the model has nothing to learn copying from."""
    named = [slot for slot in plot["slots"] if slot in values and values[slot] != values[slot + ".kind"]]
    return (text.count(values[plot["central"]]) >= 3
            and all(text.count(values[slot]) >= 3 for slot in named if values[slot] in text))


def segments(texts, plots):
    """Texts cut at the lexicon's words and at punctuation, for the tokenizer: no piece then crosses the edge of a word,
    and a word has the same pieces in a prompt and in a story."""
    words = {entry["word"] for plot in plots for table in plot["lexicon"].values() if "entries" in table
             for entry in table["entries"]}
    edge = re.compile("(" + "|".join(map(re.escape, sorted(words, key=len, reverse=True))) + "|[，。！？：、《》“”])")
    return [part for text in texts for part in edge.split(text) if part]


def held_out_pair(words, text):
    """The first pair of these slot words that is held out and occurs in the text, or None. A pair's hash decides."""
    there = sorted(word for word in words if word in text)
    return next((pair for pair in combinations(there, 2) if zlib.crc32("，".join(pair).encode()) % HELD_OUT == 0), None)


def some_words(found, text, rng):
    """Two or three of the {word: pos} in text, of different parts of speech if possible; more often what recurs."""
    words = [word for word in found for _ in range(min(text.count(word), 3))]
    rng.shuffle(words)
    words = list(dict.fromkeys(words))
    rank = {word: [found[other] for other in words[:i]].count(found[word]) for i, word in enumerate(words)}
    return sorted(words, key=rank.get)[:rng.choice((2, 3))]     # the first noun, verb, adjective; then the second ...


def compose(plots, rng, held_out=False, like=None):
    """A story record without its id, and what it was made from: {"plot", "ending", "values", "words", "drawn", "told",
    "sentences"}; its "words": {word: part of speech} of the slots, its "sentences": those that can be 随机句子.
    ValueError if a plot cannot be told.

    held_out: a story with a pair of slot words that no training story has, and that pair as its `words`. like: what
    another story was made from; this one is of another plot, about the same things where it can be.
    """
    plot = rng.choice([p for p in plots if not like or p is not like["plot"]])
    ending = rng.choice(plot["endings"])
    talk = rng.random() < TALK
    for i in range(TRIES):
        told = [part for optional, beat in ending["beats"] if not (optional and rng.random() < 0.5)
                for part in chosen(rng.choice(beat[talk]), rng)]
        summed_up = chosen(rng.choice(ending["summary"]), rng)
        slots = {part.partition(".")[0] for part in told + summed_up if isinstance(part, Slot)}
        values, words, drawn = draw(plot, slots | {plot["central"]}, rng, like["drawn"] if like and i < ALIKE else ())
        text, summary = fill(told, values), fill(summed_up, values)
        once = [s for s in sentences(text) if text.count(s) == 1 and s.count("“") == s.count("”")]
        if (STORY_CHARS[0] <= len(text) <= STORY_CHARS[1] and SUMMARY_CHARS[0] <= len(summary) <= SUMMARY_CHARS[1]
                and summary not in text and once and recurs(text, plot, values)):
            # of words that every plot knows, so that every plot keeps them apart
            pair = held_out_pair(set(plot["shared_words"]) & set(words) if held_out else plot["slot_words"], text)
            if bool(pair) == held_out:
                break
    else:
        raise ValueError(f"{plot['path']}: ending {ending['name']!r}: {TRIES} tries gave no story of {STORY_CHARS[0]} "
                         f"to {STORY_CHARS[1]} characters with each name and {plot['central']!r} three times in it")
    fitting = [s for s in once if SENTENCE_CHARS[0] <= len(s) <= SENTENCE_CHARS[1]] or once
    true = ending["features"] | ({"对话"} if has_dialogue(text) else set())
    record = {"text": text, "words": list(pair or some_words(words | plot["running"], text, rng)),
              "features": [feature for feature in FEATURES if feature in true],
              "sentence": rng.choice(fitting), "summary": summary}
    return record, {"plot": plot, "ending": ending["name"], "values": values, "words": words, "drawn": drawn,
                    "told": told, "sentences": fitting}


# -----------------------------------------------------------------------------
# many stories, and instructions for them

def stories(n, seed, folder=LANGUAGE, held_out=False, slot_words=False, more_sentences=False):
    """n story records, made one by one: text, words, features, sentence, summary, story_id. Raises ValueError.

    Story i depends on (seed, i) only, so fewer stories are the beginning of more; texts seen before are passed over.
    slot_words: the same stories, but the words of most are two to all of those that fill their slots. Nothing else in
    a story tells these words, so they teach copying; a word that belongs to a phrasing can be guessed.
    more_sentences: the same stories, but as `sentence` one to half of the sentences that can be it, in any order.
    """
    if n < 1:
        raise ValueError(f"--n {n}: must be at least 1")
    # bad files are reported by the call, not by the first story
    return _stories(n, seed, load(folder)[1], held_out, slot_words, more_sentences)


def _stories(n, seed, plots, held_out, slot_words, more_sentences):
    seen = set()
    for i in count():
        rng = random.Random(f"{seed}-{i}")
        try:
            record, made = compose(plots, rng, held_out)
        except ValueError:
            if held_out and i < 100 + 10 * len(seen):   # an ending with few words that all plots know has no such pair
                continue
            raise
        key = hashlib.blake2b(record["text"].encode(), digest_size=12).digest()
        if key in seen:
            if i > 100 + 10 * len(seen):
                raise ValueError(f"--n {n}: the plots have only about {len(seen)} different stories")
            continue
        seen.add(key)
        if slot_words and rng.random() < SLOT_WORDS:
            filling = [word for word in made["words"] if word in record["text"]]
            if len(filling) > 1:
                record["words"] = rng.sample(filling, rng.randint(2, len(filling)))
        if more_sentences:
            some = rng.sample(made["sentences"], rng.randint(1, max(1, len(made["sentences"]) // 2)))
            if sentences("".join(some)) == some:    # “好。” before “走！”他说。 would read as one
                record["sentence"] = "".join(some)
        yield record | {"story_id": f"builtin-{seed}-{i}"}
        if len(seen) == n:
            return


def authored(split=None):
    """The story records written one by one (authored.jsonl); those of the split "train" or "heldout", or all."""
    with open(LANGUAGE / "authored.jsonl", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return [record for record in records if split in (None, record["split"])]


def instructions(records, seed):
    """Yield one instruction record a story record, the 15 combinations of constraint kinds equally often."""
    rng = random.Random(f"instructions-{seed}")
    given = {kinds: 0 for k in range(1, len(KEYS) + 1) for kinds in combinations(KEYS, k)}
    for record in records:
        available = {
            "词汇": rng.sample(record["words"], len(record["words"])),
            "特点": rng.sample(record["features"], min(len(record["features"]), rng.choice((1, 1, 1, 2, 2, 2, 3, 6)))),
            "摘要": record["summary"], "随机句子": record["sentence"]}
        possible = [kinds for kinds in given if all(available[key] for key in kinds)]
        least = min(given[kinds] for kinds in possible)     # a story without features cannot have 特点; others catch up
        kinds = rng.choice([kinds for kinds in possible if given[kinds] == least])
        given[kinds] += 1
        constraints = {key: available[key] for key in rng.sample(kinds, len(kinds))}
        yield {"instruction": render(constraints), "input": "", "output": record["text"], "constraints": constraints,
               "story_id": record["story_id"]}


# -----------------------------------------------------------------------------
# command line

def parse_args(argv=None):
    parser = command_line("Compose small Chinese stories with truthful labels.")
    parser.add_argument("--n", type=int, default=20000, help="number of stories")
    parser.add_argument("--seed", type=seed_number, default=1, help="same seed, same stories")
    parser.add_argument("--split", choices=("train", "heldout"), default="train",
                        help="heldout: each story's 词汇 is a pair of words that no train story has together")
    parser.add_argument("--slot-words", action="store_true",
                        help="the same stories with more words in 词汇, those that only copying can tell")
    parser.add_argument("--more-sentences", action="store_true",
                        help="the same stories with one to half of their sentences in 随机句子, in any order")
    parser.add_argument("--out", default="out/data/stories.jsonl", help="story records, JSONL; overwritten")
    parser.add_argument("--instructions", metavar="FILE", help="also write one instruction a story, JSONL; overwritten")
    parser.add_argument("--language", default=LANGUAGE, metavar="DIR", help="folder of lexicon.toml and plots/")
    args = parser.parse_args(argv)
    if args.split == "heldout" and (args.slot_words or args.more_sentences):
        fail("--slot-words and --more-sentences are for training; --split heldout is for judging")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        for path in filter(None, (args.out, args.instructions)):
            check_writable(Path(path).parent)
        told = stories(args.n, args.seed, args.language, args.split == "heldout", args.slot_words,
                       args.more_sentences)
        records = list(tqdm(told, total=args.n, unit="story", disable=args.n < 20000))
        write_jsonl(args.out, records)
        if args.instructions:
            write_jsonl(args.instructions, instructions(records, args.seed))
    except (ValueError, OSError) as e:
        fail(e)
    print(f"{len(records)} stories -> {args.out}")
    if args.instructions:
        print(f"their instructions -> {args.instructions}")


if __name__ == "__main__":
    from data.generate import main
    main()
