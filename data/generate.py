"""The built-in corpus: small Chinese stories with truthful labels, each written for an instruction.

    python data/generate.py --n 20000 --seed 1 --out out/data/stories.jsonl --instructions out/data/instructions.json

A story is drawn after its instruction: words of any kind and a sentence. The sentence comes first, then a scene for
each word, a sentence or two that mostly begin with it, in the order asked. To follow the instruction is then the
likeliest way to begin, which a low temperature picks. No word follows from another one, so a model that gets them right
has copied them from its prompt. Then a plot is told, with slots for as many of the words as possible, an ending, a
phrasing for each beat. A summary that is asked for is told in its own words instead; only where words or dialogue are
asked for, what the hero makes of it comes behind, with a sentence for each word. The language files (language.py) hold
the words and sentences that all of this is made of.
"""
import functools
import hashlib
import json
import math
import random
import re
import sys
import zlib
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import check_writable, command_line, fail, seed_number, to_path, write_jsonl  # noqa: E402

from tqdm import tqdm  # noqa: E402

from constraints import (  # noqa: E402
    FEATURE,
    FEATURES,
    KEYS,
    SENTENCE,
    SUMMARY,
    WORDS,
    clauses,
    fold,
    has_dialogue,
    render,
    sentences,
)
from data import language  # noqa: E402
from data.language import ANY, HERO, LANGUAGE, Slot, load  # noqa: E402

VERSION = 9                     # of the output: raise it when a seed gives different stories
STORY_CHARS = {"retold": (8, 380), "short": (40, 380), "long": (120, 430)}   # by `length` of the plot
LEAST_RECURRENCE = {"short": 2, "long": 3}
SUMMARY_CHARS = 8, 60
SENTENCE_CHARS = 5, 30          # of the sentence that serves as 随机句子
DIALOGUE = 0.5                  # share of stories with features that are told for 对话, and begin with it
TALK = 0.64                     # share of stories without features that may use phrasings with speech in them
OPEN_PLOTS = 0.95               # share of stories that have an open plot
LEAK = 8                        # no training text shares so many characters in a row with what models are judged by
ASKED_WORDS = 1, 1, 2, 2, 2, 2, 3, 3, 3, 4, 5
AUTHORED_SENTENCE = 0.15        # share of asked sentences that are of authored stories
SPLICED = 0.8                   # share that is pieces of several sentences, which nothing but copying can tell
MARKS = "。。。！！？"           # at their end
MADE_UP = 0.08                  # share of asked words that are in no list
PLOTS_SEEN = 20                 # plots drawn; one with room for most of what is asked is taken
WORD_FIRST = 0.95               # share of scenes that begin with their word: to tell it is then no more than to copy it
AFFINITY, FAVOURITES = 0.8, 3   # see `prefer` and `choose_scene`
LISTED_NAMES = 0.7              # share of names that are of the lexicon, where nothing is asked
MAIN_CHARACTERS = "hero", "pal", "friend"
TOPICS = "东西", "大件", "车船", "吃的", "喝的", "植物", "动物", "人物", "地方"
KINDS = {  # of words, in later.toml; the rest are 其他
    "名物": (*TOPICS, "天上", "材料", "身体"), "动作": ("动作", "做", "活动", "变化", "成语做")}
PERSONS = "动物", "人物"         # those of them who act, and can have a name
SPLICED_SUMMARY = 0.4           # share of asked summaries whose clauses are spliced of several
SHORT_SUMMARY = 0.4             # share of the asked summaries that end early: people write short ones, too
NAMED_HERO = 0.6                # share of these heroes that are drawn as those of plots are: many have a name
OTHER_WORDS = 0.6               # share of a summary's nouns that are exchanged for others of their class
LATER = "后来，"                # between a summary and what the hero makes of it
FROM_SUMMARY = 0.4              # share of asked words that are taken from the summary, where one is asked for
TRIES = 1000                    # before giving up on a story
CLASSES = {  # what is asked for, by class: relative frequencies
    "东西": 16, "吃的": 9, "动物": 10, "植物": 6, "地方": 11, "人物": 6, "大件": 5, "车船": 3, "喝的": 3, "天上": 5,
    "材料": 3, "身体": 3, "声音": 3, "活动": 5, "想法": 6, "时间": 4, "动作": 8, "做": 5, "心里": 4, "变化": 4,
    "样子": 10, "心情": 5, "性格": 5, "环境": 4, "怎样": 4, "响声": 2, "成语做": 1, "成语景": 1, "成语": 1, "其他": 3}
# a general list of characters, GB2312 level 1: 3,755 common ones, by rows 16 to 55 of its table
CHARACTERS = bytes(byte for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF) for byte in (row, cell)).decode(
    "gb2312", errors="ignore")
# of made-up names
FIRST = "小阿大"
SECOND = ("安白冰彩晨春丹冬朵帆方芳飞枫风歌光桂果海禾荷红虎花欢吉佳江金晶静菊军可兰乐雷梨力丽莲亮林铃玲柳龙露路"
          "鹿麦满曼猫梅美米苗明鸣木南妮宁盼朋平苹齐奇琪琴青晴秋泉然蓉瑞森山珊杉石诗书霜水思松桃甜田童彤旺薇文舞雯"
          "溪喜夏香祥晓笑心新星杏秀雪洋阳遥叶艺银英莹颖雨玉园圆远月悦云芸泽珍真芝志竹子紫")


# -----------------------------------------------------------------------------
# what is asked

@functools.cache
def held_out_words():
    """The words of the open classes that no training story has in a slot or a label, and that models are judged by."""
    return frozenset(entry["word"] for table in load()["lexicon"].values() for entry in table.get("held_out", ()))


@functools.cache
def trained_words():
    """All words that labels of training stories may have."""
    words = {entry["word"] for plot in load()["plots"] for table in plot["lexicon"].values() if table.get("pos")
             for entry in table["entries"]}
    return frozenset(words | {word for record in authored() for word in record["words"]})


@functools.cache
def judged_runs():
    """Every run of LEAK characters in a sentence or summary of the handwritten instructions."""
    with open(LANGUAGE / "eval_instructions.jsonl", encoding="utf-8") as file:
        texts = [text for line in file for text in json.loads(line)["constraints"].values() if isinstance(text, str)]
    return frozenset(text[i:i + LEAK] for text in texts for i in range(len(text) - LEAK + 1))


def leaks(text):
    return not judged_runs().isdisjoint(text[i:i + LEAK] for i in range(len(text) - LEAK + 1))


def draw_entry(table, rng, held_out=False):
    """An entry of a class. Open classes list common words first, and these are drawn more often. held_out: draw a
    held-out word, else a training word."""
    entries = table["held_out" if held_out else "entries"]
    return entries[int(len(entries) * rng.random() ** 1.5)] if table["open"] else rng.choice(entries)


def asked_words(world, rng, n, held_out=False):
    """n entries of words to ask for, none of which contains another."""
    words = []
    classes = {name: share for name, share in CLASSES.items() if not held_out or world["lexicon"][name]["held_out"]}
    while len(words) < n:
        if not held_out and rng.random() < MADE_UP:
            entry = {"word": "".join(rng.choices(CHARACTERS, k=rng.choice((2, 2, 3)))), "class": ""}
        else:
            name, = rng.choices(list(classes), classes.values())
            entry = draw_entry(world["lexicon"][name], rng, held_out)
        if not clashes(entry["word"], [other["word"] for other in words]):
            words.append(entry)
    return words


def clashes(word, others):
    """Is the word equal to, inside, or around one of the others? Labels and counts could then be wrong. A word of one
    character may be part of a longer one."""
    return any(word == other or min(len(word), len(other)) > 1 and (word in other or other in word) for other in others)


@functools.cache
def nouns():
    """{word: entry} of what a plot may be about."""
    return {entry["word"]: entry for name in TOPICS for entry in load()["lexicon"][name]["entries"]
            if len(entry["word"]) > 1}


@functools.cache
def words_to_ask_for():
    """{word: entry} of all that can be asked for."""
    return {entry["word"]: entry for name in reversed(CLASSES) for entry in load()["lexicon"][name]["entries"]
            if len(entry["word"]) > 1}


def words_in(text, known=None):
    """The entries of the words in a text, the longest first where one is within another. known: {word: entry}, or the
    nouns that a plot may be about."""
    known = known or nouns()
    entries, end = [], 0
    for start in range(len(text)):
        for stop in range(min(len(text), start + 5), start + 1, -1):
            if start >= end and text[start:stop] in known:
                entries.append(known[text[start:stop]])
                end = stop
    return entries


@functools.cache
def authored_sentences():
    """Sentences of authored training stories that can stand in any story."""
    return [s for record in authored("train") for s in sentences(record["text"])
            if 8 <= len(s) <= 28 and not re.search("[“”他她它你我]", s) and not leaks(s)]


def free_sentence(world, rng, held_out=False):
    """A sentence that belongs to no plot; if not held_out, often one that no grammar makes: a model that can tell from
    its beginning how a sentence ends learns that, and does not copy."""
    if not held_out and rng.random() < SPLICED:
        return spliced(world, rng)
    if not held_out and rng.random() < AUTHORED_SENTENCE:
        return rng.choice(authored_sentences())
    return plain_sentence(world, rng)


def plain_sentence(world, rng):
    """A sentence of the grammar."""
    while True:
        phrasing = rng.choice(world["sentences"])
        text = fill(choose(phrasing["parts"], rng), draw(world, phrasing["slots"], rng)[0])
        if SENTENCE_CHARS[0] <= len(text) <= SENTENCE_CHARS[1] and not leaks(text):
            return text


def spliced(world, rng):
    """A sentence of pieces of one to four, with another mark at its end."""
    while True:
        n = rng.choice((1, 1, 1, 2, 2, 2, 3, 3, 4))
        pieces = []
        for i in range(n):
            whole = rng.choice(authored_sentences()) if rng.random() < 0.5 else plain_sentence(world, rng)
            whole = re.sub("[。！？…]", "", whole)
            length = len(whole) if n == 1 else rng.randint(2, 18 // n + 2)
            start = rng.randint(0, max(0, len(whole) - length)) if i else 0
            pieces.append(whole[start:start + length].strip("，、："))
        text = "".join(pieces) + rng.choice(MARKS)
        if SENTENCE_CHARS[0] <= len(text) <= SENTENCE_CHARS[1] and not leaks(text):
            return text


# -----------------------------------------------------------------------------
# words into phrasings

def prefer(rng, options, key, what):
    """One of the options, usually one of the few tied to `key`: of a hero the first character asked for, of another
    character the hero's name. Without this, all stories would begin alike at a low temperature: nothing else favours
    one hero over another."""
    if key and rng.random() < AFFINITY:
        return options[zlib.crc32(f"{key} {what} {rng.randrange(FAVOURITES)}".encode()) % len(options)]
    return rng.choice(options)


def choose(parts, rng):
    """A compiled phrasing with all its choices made: a list of strings and Slots."""
    chosen = []
    for part in parts:
        if isinstance(part, list):
            part = rng.choice(part)
        chosen += choose(part, rng) if isinstance(part, list) else [part]
    return chosen


def fill(parts, values):
    return "".join(values[part] if isinstance(part, Slot) else part for part in parts)


def slots_in(parts):
    return {part.partition(".")[0] for part in parts if isinstance(part, Slot)}


@functools.cache
def all_words():
    return frozenset(word for table in load()["lexicon"].values() for word in table.get("by_word", ()))


def draw_name(names, rng, key, what):
    """A name of the list `names`, or a made-up one: 小葵, 乐乐, 阿宁. No word passes for a name."""
    if key or rng.random() < LISTED_NAMES:
        return prefer(rng, names, key, what)["word"]
    while True:
        first, second = rng.choice(FIRST), rng.choice(SECOND)
        name = rng.choice((first + second, second * 2))
        if name not in all_words():
            return name


class Crowded(ValueError):
    """The words that a story has already leave no other one for a slot."""


def suits(table, entry):
    """Can this asked word fill a slot of the table? Never where the characters have names."""
    return not table["names"] and entry["word"] in table["by_word"]


def draw(world, slots, rng, words=(), key="", taken=(), like=()):
    """An entry for each slot -> ({"hero": 豆豆, "hero.kind": 小兔, "hero.m": 只, …}, {小兔: noun, …}, [(table, entry,
    name or None)]: what was drawn). No two words of a story clash.

    words: entries, each of which takes the first slot that it suits. key: of `prefer`. taken: words that the story has
    already. like: what was drawn for another story; a slot takes its word from there wherever the class is the same.
    The table of a character is not that of one before it, if there is another: a small model mixes them up.
    """
    values, parts_of_speech, used, pronouns, drawn, met = {}, {}, list(taken), {}, [], []
    waiting = list(words)
    for slot, tables in slots.items():
        character = any(table["names"] for table in tables)
        asked = next(((table, table["by_word"][entry["word"]], None) for entry in waiting for table in tables
                      if suits(table, entry)), None)
        known = [asked] if asked else [other for other in like if other not in drawn
                                       and any(other[0] is table for table in tables)]
        for i in range(TRIES):
            if i < len(known):
                table, entry, name = known[i]
            else:
                leaning = values.get("hero", key) if character and i < 10 else ""
                new_ones = [table for table in tables if not any(table is other for other in met)] or tables
                table = prefer(rng, new_ones, leaning, slot + " table")
                entry = prefer(rng, table["entries"], leaning, slot) if leaning else draw_entry(table, rng)
                name = table["names"] and draw_name(world["lexicon"][table["names"]]["entries"], rng, leaning,
                                                    slot + " name")
            new = [entry["word"]] + [name] * bool(name)
            others = [other["word"] for other in waiting if other["word"] != entry["word"]]
            if not any(clashes(word, used + others) for word in new):
                break
        else:
            raise Crowded(f"slot {slot!r}: its class has no word that the story does not have yet")
        waiting = [other for other in waiting if other["word"] != entry["word"]]
        used += new
        drawn.append((table, entry, name))
        met += [table] * character
        if character or "ta" in entry:
            pronouns[slot] = entry.get("ta", "他")
        values |= {f"{slot}.{column}": cell for column, cell in entry.items()}
        values[slot] = name or entry["word"]
        values[slot + ".kind"] = entry["word"]
        # 小男孩小明, or just 小明; the same name always in the same way
        alone = name and table["name_alone"] and zlib.crc32(name.encode()) % 2
        values[slot + ".full"] = name if alone else entry["word"] + (name or "")
        if table["pos"] and not alone:
            parts_of_speech[entry["word"]] = table["pos"]
    # of the first two characters: 她们, 它们, and 他们 for any mixture
    two = {pronouns[slot] for slot in sorted(pronouns, key=lambda slot: slot not in MAIN_CHARACTERS)[:2]}
    values["they"] = (two.pop() if len(two) == 1 else "他") + "们"
    return values, parts_of_speech, drawn


# -----------------------------------------------------------------------------
# one story

def choose_plot(world, rng, words, key, like=None):
    """A plot with slots for many of the words: the best of a few."""
    of_open = rng.random() < OPEN_PLOTS
    plots = [p for p in world["plots"] if p["open"] == of_open and not (like and p is like["plot"])]
    if not words:
        return prefer(rng, plots, key, "plot")

    def room(plot):
        tables = [table for tables in plot["slots"].values() for table in tables]
        return sum(any(suits(table, word) for table in tables) for word in words)
    return max(rng.sample(plots, PLOTS_SEEN), key=room)


def about(slot, entry):
    """The values of a slot that the entry fills."""
    return {slot: entry["word"]} | {f"{slot}.{column}": cell for column, cell in entry.items()}


def choose_scene(world, rng, word, values, talk, taken, before):
    """The text of a scene that brings in the word. values: of the story; taken: words that the scene's other slots must
    keep clear of; before: the scenes that the story has, to which this one is added."""
    name = HERO if values["hero"] == word["word"] else word["class"] if word["class"] in world["scenes"] else ANY
    scenes = [scene for scene in world["scenes"][name] if (talk or not scene["speech"]) and scene not in before]
    word_first = [scene for scene in scenes if scene["first"]]
    scenes = word_first if word_first and rng.random() < WORD_FIRST else scenes
    if rng.random() < AFFINITY:  # a word has scenes of its own: else the likeliest of its class would stand everywhere
        scenes = sorted(scenes, key=lambda scene: zlib.crc32(f"{word['word']} {scene['text']}".encode()))[:FAVOURITES]
    scene = rng.choice(scenes)
    before.append(scene)
    slot = scene["slot"]
    slots = {other: tables for other, tables in scene["slots"].items() if other not in ("hero", slot)}
    own, _, _ = draw(world, slots, rng, taken=taken)
    own |= about(slot, word)
    own |= {other: value for other, value in values.items() if other.partition(".")[0] == "hero"}
    return fill(choose(scene["parts"], rng), own)


def scenes(world, rng, words, values, talk, taken):
    """The text of a scene for each word, in their order."""
    used = []
    return [choose_scene(world, rng, word, values, talk, taken, used) for word in words]


def length(plot):
    return "retold" if not plot else "short" if plot["open"] else "long"


def recurs(text, plot, values):
    """Do the names and the central word recur? Otherwise there is nothing to learn copying from."""
    least = LEAST_RECURRENCE[length(plot)]
    named = [slot for slot in plot["slots"] if slot in values and values[slot] != values[slot + ".kind"]]
    return (text.count(values[plot["central"]]) >= least
            and all(text.count(values[slot]) >= least for slot in named if values[slot] in text))


def some_words(there, text, rng):
    """Two or three of the {word: pos} in text, of different parts of speech if possible; more often what recurs."""
    words = [word for word in there for _ in range(min(text.count(word), 3))]
    rng.shuffle(words)
    words = list(dict.fromkeys(words))
    rank = {word: [there[other] for other in words[:i]].count(there[word]) for i, word in enumerate(words)}
    some, number = [], rng.choice((2, 3))
    for word in sorted(words, key=rank.get):     # the first noun, verb, adjective; then the second …
        if len(some) < number and not clashes(word, some):
            some.append(word)
    return some


def tell(world, rng, words, sentence, key, talk, dialogue, like=None):
    """One try at a story with these words and this sentence -> its text, its summary and what it was made from, whether
    or not it turned out well.

    The sentence comes first, then a scene for each word, in the order asked. Then the plot is told, with what is asked,
    and what the sentence is about, in its slots.
    """
    named = words + words_in(sentence)
    plot = choose_plot(world, rng, named, key, like)
    ending = rng.choice(plot["endings"])
    phrasings = [beat[talk] for optional, beat in ending["beats"] if not (optional and rng.random() < 0.5)]
    if dialogue:  # where that is asked for, the plot begins with it
        phrasings[0] = list(filter(speaks, phrasings[0])) or phrasings[0]
    beats = [choose(rng.choice(some), rng) for some in phrasings]
    summary = choose(rng.choice(ending["summary"]), rng)
    used = {"hero"}.union(*map(slots_in, beats), slots_in(summary), {plot["central"]})
    slots = {slot: tables for slot, tables in plot["slots"].items() if slot in used}
    woven = [word for word in named if any(suits(table, word) for tables in slots.values() for table in tables)]
    elsewhere = [word["word"] for word in words if word not in woven]
    values, parts_of_speech, drawn = draw(world, slots, rng, woven, key, elsewhere, like["drawn"] if like else ())
    taken = [word for _, entry, name in drawn for word in (entry["word"], name) if word] + [w["word"] for w in words]
    parts = [*scenes(world, rng, words, values, talk, taken), *(fill(beat, values) for beat in beats)]
    text = introduce(parts, values["hero"], values["hero.full"])
    return sentence + "".join(text), fill(summary, values), {
        "words": words, "plot": plot, "features": ending["features"], "beats": beats, "values": values,
        "parts_of_speech": parts_of_speech, "drawn": drawn}


def speaks(parts):
    """Has this compiled phrasing speech in it, whatever is chosen?"""
    return any("“" in part for part in parts if isinstance(part, str))


def introduce(parts, name, full):
    """The parts of a story, with the hero introduced, as `full`, where they first have the name, and only there."""
    parts = [part.replace(full, name) for part in parts]
    first = next((i for i, part in enumerate(parts) if name in part), None)
    return [part.replace(name, full, 1) if i == first else part for i, part in enumerate(parts)]


# -----------------------------------------------------------------------------
# a summary retold

@functools.cache
def authored_summaries(split):
    """[(clauses, features), …] of the authored stories in whose summary the first clause names somebody. Those with a
    held-out word are left out."""
    summaries = [(clauses(record["summary"]), set(record["features"]) - {"对话"}) for record in authored(split)
                 if not any(word in record["summary"] for word in held_out_words())]
    return [(parts, features) for parts, features in summaries if protagonist_of(parts)]


def protagonist_of(parts):
    """The entry of the person or animal that the first clause names; None where it names nobody."""
    return next((entry for entry in words_in(parts[0]) if entry["class"] in PERSONS), None)


def splice(parts, pool, rng):
    """As many clauses as `parts` has, of which nothing but copying tells how they go on: the first up to whom it names,
    the rest halves of others."""
    some = [rng.choice(rng.choice(pool)[0]) for _ in range(2 * len(parts))]
    halves = [clause[:rng.randint(1, len(clause))] + other[rng.randint(0, len(other) - 1):]
              for clause, other in zip(some[::2], some[1::2])]
    word = protagonist_of(parts)["word"]
    return [parts[0][:parts[0].index(word)] + word + halves[0][-8:], *halves[1:]]


def open_summary(world, rng, words, held_out):
    """A summary that no model knows by heart -> (clauses, features, {"hero": …}): an authored one, sometimes spliced,
    sometimes only its beginning, with another hero and other things in it, those that are asked for first. The hero is
    whom the first clause names."""
    pool = authored_summaries("heldout" if held_out else "train")
    parts, features = rng.choice(pool)
    if not held_out and rng.random() < SPLICED_SUMMARY:
        parts, features = splice(parts, pool, rng), set()
    if rng.random() < SHORT_SUMMARY:  # its features come at its end
        parts, features = parts[:rng.randint(1, len(parts))], set()
    there = {entry["word"]: entry for clause in parts for entry in words_in(clause)}
    others, waiting = {}, [word for word in words if len(word["word"]) > 1]
    for entry in there.values():
        asked = [word for word in waiting if word["class"] == entry["class"]][:1]
        waiting = [word for word in waiting if word not in asked]
        others[entry["word"]] = (asked[0] if asked else entry if rng.random() > OTHER_WORDS
                                 else draw_entry(world["lexicon"][entry["class"]], rng))
    protagonist = protagonist_of(parts)
    if not protagonist:  # a seam has made another word
        return open_summary(world, rng, words, held_out)
    hero = others[protagonist["word"]]
    values = about("hero", hero) | {"hero.full": hero["word"], "hero.kind": hero["word"]}
    if hero not in words and rng.random() < NAMED_HERO:
        values, _, _ = draw(world, {"hero": language.tables_of(world["lexicon"], HERO, "")}, rng)
        others[protagonist["word"]] = {"word": values["hero.full"]}
    pronouns = set("它他她") & set("".join(parts))
    if pronouns and values["hero.ta"] not in pronouns:
        return open_summary(world, rng, words, held_out)
    names = re.compile("(" + "|".join(sorted({entry["m"] for entry in there.values() if "m" in entry})) + "|)"
                       "[小老大]?(" + "|".join(sorted(others, key=len, reverse=True)) + ")们?")

    def exchange(found):
        m, word = found.groups()
        return (others[word].get("m", m) if m and m == there[word].get("m") else m) + others[word]["word"]
    parts = [names.sub(exchange, clause) for clause in parts]
    if values["hero.full"] not in parts[0]:  # another word stood across it
        return open_summary(world, rng, words, held_out)
    return parts, features, values


def setting_of(world, hero):
    """The setting of later.toml for heroes of this class."""
    settings = world["later"].values()
    own = (setting for setting in settings if hero in setting.get("主角", ()))
    return next(own, None) or next(setting for setting in settings if not setting.get("主角"))


def afterwards(world, rng, words, values, talk, spoken):
    """What the hero then makes of it all (draws it, plays it, dreams of it), with a sentence for each word, which
    begins with it. spoken: the first sentence is to be speech."""
    setting = setting_of(world, values["hero.class"])
    first = [text for text in setting["开头"] if ("“" in text or not spoken) and ("“" not in text or talk)]
    parts = [rng.choice(first)]
    for i, word in enumerate(words):
        kind = next((kind for kind, classes in KINDS.items() if word["class"] in classes), "其他")
        # each place has sentences of its own, or else the likeliest would be told of every word
        parts.append(rng.choice(setting[kind][2 * i:2 * i + 2]).replace("{词}", word["word"]))
    return "".join(parts + [rng.choice(setting["结尾"])]).replace("{hero}", values["hero"])


def retell(world, rng, words, sentence, talk, dialogue, held_out):
    """As `tell`, of a summary that somebody else wrote: it is told in its own words. Where words or dialogue are asked
    for, which need a place, what the hero makes of it comes behind."""
    told, features, values = open_summary(world, rng, words, held_out)
    summary = "，".join(told) + "。"
    words, there = list(words), words_in(summary, words_to_ask_for())
    for i, word in enumerate(words):
        if word["word"] not in summary and rng.random() < FROM_SUMMARY:
            free = [entry for entry in there
                    if not held_out and not clashes(entry["word"], [other["word"] for other in words])]
            words[i] = rng.choice(free or [word])
    behind = LATER + afterwards(world, rng, words, values, talk, dialogue) if words or dialogue else ""
    return sentence + summary + behind, summary, {
        "words": words, "plot": None, "features": features, "values": values, "drawn": [],
        "parts_of_speech": {entry["word"]: world["lexicon"][entry["class"]]["pos"] for entry in there}}


# -----------------------------------------------------------------------------
# a story with its labels

def sound(text, summary, source):
    """Is this story worth keeping? Right length, no repeated sentence, everything in it that must be."""
    low, high = STORY_CHARS[length(source["plot"])]
    parts = list(map(fold, sentences(text)))
    return (low <= len(text) <= high and SUMMARY_CHARS[0] <= len(summary) <= SUMMARY_CHARS[1]
            and len(set(parts)) == len(parts) and (not source["plot"] or recurs(text, source["plot"], source["values"]))
            and all(word["word"] in text for word in source["words"]) and not leaks(text) and not leaks(summary))


def labels_of(text, summary, source, sentence, rng):
    """The labels of a story, all of them true: {"words", "features", "sentence", "summary"}."""
    there = {word: pos for word, pos in source["parts_of_speech"].items() if word in text}
    features = source["features"] | ({"对话"} if has_dialogue(text) else set())
    if not sentence:
        parts = [s for s in sentences(text) if s.count("“") == s.count("”") and text.count(s) == 1]
        sentence = rng.choice([s for s in parts if SENTENCE_CHARS[0] <= len(s) <= SENTENCE_CHARS[1]] or parts)
    in_text = source["plot"]["in_text"].items() if source["plot"] else ()
    in_text = {word: pos for word, pos in in_text if word in text}
    return {"words": [word["word"] for word in source["words"]] or some_words(there | in_text, text, rng),
            "features": [feature for feature in FEATURES if feature in features], "sentence": sentence,
            "summary": summary}


def compose(world, rng, asked=(), held_out=False, like=None):
    """A story record without its id, and what it was made from: {"words", "plot", "features", "beats", "values",
    "parts_of_speech", "drawn"}; no plot and no beats where a summary is asked for, which is then retold.

    asked: the keys of its instruction, in order; 词汇 and 随机句子 are drawn before the story. The record's "asked" are
    the constraints. held_out: the words are of `held_out_words`. like: what another story was made from; this one is
    of another plot, about the same things where it can be. ValueError if a plot cannot be told.
    """
    words = asked_words(world, rng, rng.choice(ASKED_WORDS), held_out) if WORDS in asked else []
    sentence = free_sentence(world, rng, held_out) if SENTENCE in asked else ""
    first = {WORDS: words and words[0]["word"], SENTENCE: sentence}
    key = next((first[k][0] for k in asked if first.get(k)), "")
    dialogue = FEATURE in asked and (held_out or rng.random() < DIALOGUE)  # the only feature that can be judged
    talk = dialogue or (FEATURE not in asked and rng.random() < TALK)  # asked for something else: without speech
    for i in range(TRIES):
        try:
            if SUMMARY in asked:
                text, summary, source = retell(world, rng, words, sentence, talk, dialogue, held_out)
            else:
                text, summary, source = tell(world, rng, words, sentence, key, talk, dialogue,
                                             like if i < 20 else None)
        except Crowded:
            continue
        if sound(text, summary, source):
            labels = labels_of(text, summary, source, sentence, rng)
            if labels["words"] and (labels["features"] or FEATURE not in asked):
                break
    else:
        asked_for = "，".join(word["word"] for word in words) or "no word"
        raise ValueError(f"{TRIES} tries gave no story that has {asked_for} and {sentence!r}")
    others = [feature for feature in labels["features"] if feature != "对话"]
    some = rng.sample(others, min(len(others), rng.choice((1, 1, 1, 2, 2, 3))))
    if "对话" in labels["features"] and (dialogue or not others or held_out):
        some = ["对话"] if held_out else ["对话", *some[1:]]  # it is the one that a rule can tell
    ask = {WORDS: labels["words"], FEATURE: some, SENTENCE: labels["sentence"], SUMMARY: summary}
    return {"text": text} | labels | {"asked": {key: ask[key] for key in asked}}, source


# -----------------------------------------------------------------------------
# many stories, and instructions for them

COMBINATIONS = [kinds for k in range(1, len(KEYS) + 1) for kinds in combinations(KEYS, k)]
# each of them as often as makes every number of constraints equally frequent
BY_NUMBER = [kinds for kinds in COMBINATIONS for _ in range(12 // math.comb(len(KEYS), len(kinds)))]


def stories(n, seed, folder=LANGUAGE, held_out=False):
    """n story records, made one by one: text, words, features, sentence, summary, asked, story_id. Raises ValueError.

    Story i depends on (seed, i) only, so fewer stories are the beginning of more; texts seen before are passed over.
    The 15 combinations of constraints are asked for in turn. held_out: stories to judge by, as many with one, two,
    three and four constraints: the asked words are in no training slot or label, sentences from outside the plot new.
    """
    if n < 1:
        raise ValueError(f"--n {n}: must be at least 1")
    world = load(folder)     # bad files are reported by the call, not by the first story
    for name in CLASSES:
        if not world["lexicon"].get(name, {}).get("open"):
            raise ValueError(f"{Path(folder, 'words.toml')}: no open class {name!r}")
    return _stories(n, seed, world, held_out)


def _stories(n, seed, world, held_out):
    seen, i, turns = set(), -1, BY_NUMBER if held_out else COMBINATIONS
    while len(seen) < n:
        i += 1
        rng = random.Random(f"{seed}-{i}")
        kinds = turns[i % len(turns)]
        record, _ = compose(world, rng, rng.sample(kinds, len(kinds)), held_out)
        key = hashlib.blake2b(record["text"].encode(), digest_size=12).digest()
        if key in seen:
            if i > 100 + 10 * len(seen):
                raise ValueError(f"--n {n}: the plots have only about {len(seen)} different stories")
            continue
        seen.add(key)
        yield record | {"story_id": f"builtin-{seed}-{i}"}


def authored(split=None):
    """The story records written one by one (authored.jsonl); those of the split "train" or "heldout", or all."""
    with open(LANGUAGE / "authored.jsonl", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return [record for record in records if split in (None, record["split"])]


def instructions(records, seed):
    """Yield one instruction record a story record: what it was written for, or else, of an authored one, a part of its
    labels, the 15 combinations of constraint kinds equally often."""
    rng = random.Random(f"instructions-{seed}")
    given = dict.fromkeys(COMBINATIONS, 0)
    for record in records:
        constraints = record.get("asked")
        if constraints is None:
            some = rng.choice((1, 1, 1, 2, 2, 3))
            labels = {WORDS: rng.sample(record["words"], len(record["words"])), SUMMARY: record["summary"],
                      FEATURE: rng.sample(record["features"], min(len(record["features"]), some)),
                      SENTENCE: record["sentence"]}
            possible = [kinds for kinds in given if all(labels[key] for key in kinds)]
            least = min(given[kinds] for kinds in possible)  # one without features cannot have 特点; others catch up
            kinds = rng.choice([kinds for kinds in possible if given[kinds] == least])
            given[kinds] += 1
            constraints = {key: labels[key] for key in rng.sample(kinds, len(kinds))}
        yield {"instruction": render(constraints), "input": "", "output": record["text"], "constraints": constraints,
               "story_id": record["story_id"]}


def segments(texts):
    """Texts cut at the lexicon's words and at punctuation, for the tokenizer: no piece then crosses the edge of a word,
    and a word has the same pieces in a prompt and in a story."""
    words = {word for plot in load()["plots"] for table in plot["lexicon"].values() if "entries" in table
             for word in table["by_word"]}
    by_length = sorted(words, key=len, reverse=True)
    edge = re.compile("(" + "|".join(map(re.escape, by_length)) + "|[，。！？：、《》“”])")
    return [part for text in texts for part in edge.split(text) if part]


# -----------------------------------------------------------------------------
# command line

def parse_args(argv=None):
    parser = command_line("Compose small Chinese stories with truthful labels.")
    parser.add_argument("--n", type=int, default=20000, help="number of stories")
    parser.add_argument("--seed", type=seed_number, default=1, help="same seed, same stories")
    parser.add_argument("--split", choices=("train", "heldout"), default="train",
                        help="heldout: asked words and sentences are ones that no train story has")
    parser.add_argument("--out", type=to_path, default=Path("out/data/stories.jsonl"),
                        help="story records, JSONL; overwritten")
    parser.add_argument("--instructions", type=to_path, metavar="FILE",
                        help="also write one instruction a story, JSONL; overwritten")
    parser.add_argument("--language", default=LANGUAGE, metavar="DIR", help="folder of the language files")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        for path in filter(None, (args.out, args.instructions)):
            check_writable(path.parent)
        written = stories(args.n, args.seed, args.language, args.split == "heldout")
        records = list(tqdm(written, total=args.n, unit="story", disable=args.n < 20000))
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
