"""Constraint lines: the small language in which a story is ordered.

    词汇：铲子，草地
    特点：转折，对话
    摘要：一只小蚂蚁找到了一个苹果。
    随机句子：天空中飘着几朵白云。

One `key：value` line each, in any order. In Python a set of constraints is a dict by key whose order is the order of
the lines; 词汇 and 特点 hold lists, 摘要 and 随机句子 hold strings:

    {"词汇": ["铲子", "草地"], "特点": ["转折", "对话"], "摘要": "…", "随机句子": "…"}

This file alone knows how such lines are read, written and checked; training, sampling and evaluation call it.
"""
import itertools
import re
import unicodedata

WORDS, FEATURE, SUMMARY, SENTENCE = KEYS = ("词汇", "特点", "摘要", "随机句子")
LIST_KEYS = (WORDS, FEATURE)
FEATURES = ("对话", "转折", "坏结局", "道德价值", "伏笔", "冲突")

# Every spelling that stands for a key or a feature. Spaces, letter case and width do not matter, nor do traditional
# characters.
KEY_ALIASES = {
    WORDS: ("单词", "词语", "词", "关键词", "关键字", "words", "word", "keywords"),
    FEATURE: ("特征", "特色", "特性", "features", "feature"),
    SUMMARY: ("总结", "概要", "梗概", "概括", "summary"),
    SENTENCE: ("句子", "随机语句", "随机句", "random sentence", "sentence"),
}
FEATURE_ALIASES = {
    "对话": ("有对话", "对白", "dialogue", "dialog"),
    "转折": ("情节转折", "反转", "twist"),
    "坏结局": ("不好的结局", "悲剧结局", "坏结果", "bad ending"),
    "道德价值": ("道德", "道德观", "道德寓意", "寓意", "moral value"),
    "伏笔": ("铺垫", "预示", "foreshadowing"),
    "冲突": ("矛盾", "conflict"),
}
STORY = "故事"  # no constraint, but a field of the records that augment.py reads
STORY_ALIASES = ("正文", "故事正文", "故事内容", "完整故事", "story")
SIMPLIFIED = str.maketrans("詞彙匯單語關鍵點徵總結隨機對話轉節壞劇價觀筆鋪墊預衝內",
                           "词汇汇单语关键点征总结随机对话转节坏剧价观笔铺垫预冲内")

NOISE = re.compile(r"[\W_]+")
ASCII_NOISE = {i: None for i in range(128) if NOISE.match(chr(i))}


def fold(text):
    """Text without spaces, punctuation, letter width and case: what must agree for a sentence to count as there."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return text.translate(ASCII_NOISE) if text.isascii() else NOISE.sub("", text)  # the first is seven times as fast


def _name(text):
    """The spelling of a key or a feature -> the one it is looked up by."""
    return fold(text).translate(SIMPLIFIED)


def _lookup(aliases):
    return {_name(name): canonical for canonical, others in aliases.items() for name in (canonical, *others)}


KEY_OF = _lookup(KEY_ALIASES | {STORY: STORY_ALIASES})
FEATURE_OF = _lookup(FEATURE_ALIASES)


# ---- reading and writing ----

NEWLINE = re.compile(r"\r\n|\r|\n")  # not str.splitlines(), which also cuts at U+2028, form feeds and the like
SEMICOLON = re.compile("[；;]")
SEPARATORS = re.compile(r"[，,、；;\s]+|(?<=[”’」』》】])(?=[“‘「『《【])")  # also between 「铲子」「草地」
INVISIBLE = "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"  # soft hyphen, joiners, byte order mark: copied along
PAIRS = {"": "", "【": "】", "［": "］", "[": "]", "「": "」", "『": "』", "《": "》", "“": "”", "‘": "’", '"': '"',
         "'": "'", "（": "）", "(": ")"}
QUOTES = re.escape("".join(PAIRS))
CLOSING = re.escape("".join(PAIRS.values()))

NUMERAL = r"(?:\d{1,2}|[一二三四五六七八九十])"
MARK = rf"""(?: [\s{INVISIBLE}] | [-+•·●○◦■▪◆>\#] | \*(?=\s) | [①-⑳]  # list marks, headings, quoted text
                 | [（(]{NUMERAL}[）)] | {NUMERAL}[.．、）)](?!\d) )*"""
LISTED = re.compile(MARK, re.X)
# The start of a line that may be a key: "词汇：", "- **词汇**：", "（1）词汇：", "【词汇】".
HEAD = re.compile(rf"""
    {MARK} (?P<emphasis>[*_`]+)? {MARK}
    (?P<open>[{QUOTES}]?) (?P<name>[^\W_][\w\ {INVISIBLE}-]*?) [\s{INVISIBLE}]* (?P<close>[{CLOSING}]?)
    (?(emphasis) (?P<ended>(?P=emphasis))? ) [\s{INVISIBLE}]*
    (?: (?P<colon>[：:﹕∶]) | (?<=】) )""", re.X)


def head(line, start=0):
    """The match of HEAD, of a key or of any name that stands like one; None if there is none."""
    found = HEAD.match(line, start, start + 60)  # stories have long lines, and no key is so long
    return found if found and PAIRS[found["open"]] == found["close"] else None


def key_of(found):
    """`head` -> the canonical key or 故事; None if its name is neither."""
    return KEY_OF.get(_name(found["name"])) if found else None


def _key_and_value(line):
    """摘要：… -> ("摘要", "…"); (None, None) for a line without a key."""
    found = head(line)
    if not key_of(found):
        return None, None
    value, mark = line[found.end():], found["emphasis"]
    if mark and not found["ended"]:  # **摘要：**… or **摘要：…**
        value = value.removeprefix(mark) if value.startswith(mark) else value.rstrip().removesuffix(mark)
    return key_of(found), value.lstrip()


def _parts(line, keys, in_story):
    """Cut a line at each ； behind which a key and a colon stand. A story stays whole."""
    parts, start = [], 0
    for semicolon in SEMICOLON.finditer(line):
        key = key_of(head(line, start))
        if key == STORY or (in_story and not key):
            break
        found = head(line, semicolon.end())
        if found and found["colon"] and key_of(found) in keys:
            parts.append(line[start:semicolon.start()])
            start = semicolon.end()
    return [*parts, line[start:]]


def sections(text, keys=KEYS):
    """Cut a text where a key begins: [(key, its lines)], in order; first (None, what stands before).

    A key counts at the start of a line and behind ； only, so that 摘要：小狗的名字叫点点。 stays whole. A line
    without a key continues what stands above it. A key that comes twice in a row (随机句子：随机句子：…) counts once.
    """
    found = [(None, [])]
    for line in NEWLINE.split(text):
        for part in _parts(line, keys, found[-1][0] == STORY):
            key, value = _key_and_value(part)
            if key not in keys:
                found[-1][1].append(part)
                continue
            while (again := _key_and_value(value))[0] == key:
                value = again[1]
            found.append((key, [value]))
    return found


def _constraints(fields):
    """[(key, lines)] -> constraints. A key that comes twice is merged, one without a value left out."""
    values = {}
    for key, lines in fields:
        items = [item for line in lines if (item := line.strip().strip(INVISIBLE).strip())]
        values.setdefault(key, []).extend(
            items if key not in LIST_KEYS else (item for line in items for item in _split(key, line)))
    merged = {key: list(dict.fromkeys(items)) for key, items in values.items() if items}  # no repeats, in order
    return {key: items if key in LIST_KEYS else "".join(items) for key, items in merged.items()}


def parse(text):
    """Read constraint lines. -> (constraints, preamble)

    The preamble is what stands before the first key ("请写一个故事。"), as it is. See `sections` for what is a key.
    What people put around keys, words and features (quotes, list marks, final punctuation) is no part of them; the text
    of 摘要 and 随机句子 stays as it is written.
    """
    (_, preamble), *fields = sections(text)
    return _constraints(fields), "\n".join(preamble).strip("\n")


def parse_record(text):
    """Read constraint lines and 故事：…, in any order. -> (constraints, preamble, story)

    A constraint behind the story (摘要：…, as translators leave it there) is cut from it, and counts.
    """
    (_, preamble), *fields = sections(text, (*KEYS, STORY))
    story = "\n".join(line for key, lines in fields if key == STORY for line in lines)
    return _constraints(f for f in fields if f[0] != STORY), "\n".join(preamble).strip(), story.strip()


MARKS = "“”‘’\"'「」『』《》〈〉【】[]［］*_`-•·●" + INVISIBLE  # around a word: “铲子”, ["铲子"], • 铲子
STOPS = "。．.！!？?…~～"  # and behind it


def _split(key, line):
    if key == WORDS:
        line = line[LISTED.match(line).end():]  # 1. 铲子
        return [word for part in SEPARATORS.split(line) if (word := part.lstrip(MARKS).rstrip(MARKS + STOPS))]
    names = re.split(r"[，,、；;]+", line)  # "bad ending" is one name, 对话 转折 are two
    names = [part for name in names
             for part in (name.split() if all(_name(p) in FEATURE_OF for p in name.split()) else [name])]
    return [FEATURE_OF.get(_name(name), name.strip(MARKS + STOPS + " ")) for name in names if _name(name)]


def render(constraints):
    """Constraints as text, one line a key, in the dict's own order. For c of `parse`: parse(render(c))[0] == c."""
    lines = []
    for key, value in constraints.items():
        if key not in KEYS:
            raise ValueError(f"unknown constraint {key!r} (known: {'，'.join(KEYS)})")
        value = "，".join(value) if key in LIST_KEYS else value
        lines.append(f"{key}：{NEWLINE.sub('', value)}")
    return "\n".join(lines)


def normalize(text):
    """An instruction as users write it -> as the model is trained on it. Text without any constraint stays as it is."""
    constraints, preamble = parse(text)
    if not constraints:
        return text
    return "\n".join(filter(None, [preamble, render(constraints)]))


def permutations(constraints):
    """The same constraints in every order of their lines: n! dicts."""
    for order in itertools.permutations(constraints):
        yield {key: constraints[key] for key in order}


def vary(text, rng, shuffle, drop):
    """An instruction -> the same with its constraints in a random order (shuffle: True), each of them left out with
    probability `drop`; at least one stays."""
    constraints, preamble = parse(text)
    if not constraints:
        return text
    kept = [key for key in constraints if rng.random() >= drop] or [rng.choice(list(constraints))]
    if shuffle:
        rng.shuffle(kept)
    return "\n".join(filter(None, [preamble, render({key: constraints[key] for key in kept})]))


# ---- does this story meet it? ----

def sentences(text):
    """Whole sentences: 。！？ ends one where no quotation is open; speech at its beginning keeps the “…”某某说。"""
    found, start, open_quote = [], 0, False
    for i, char in enumerate(text):
        if char in "“”":
            open_quote = char == "“"
        ends = char in "。！？" and not open_quote
        if char == "”" and text[i - 1] in "。！？":
            ends = text[start] != "“" or text.count("“", start, i) > 1
        if ends:
            found.append(text[start:i + 1])
            start = i + 1
    return found + ([text[start:]] if text[start:] else [])


def clauses(text):
    """What stands between the marks ，。；！？："""
    return [clause for clause in re.split("[，。；！？：]", text) if clause]


def clauses_told(summary, story):
    """For each clause of the summary: does it stand in the story?"""
    told = fold(story)
    return [clause in told for clause in map(fold, clauses(summary)) if clause]


QUOTED = re.compile(r"“([^“”]+)”|「([^「」]+)」|『([^『』]+)』|\"([^\"]+)\"")
# real text closes what it opens carelessly, but there is something between
INTRODUCED = re.compile(r"(?:[：:]\s*[“”「『\"]|[说道问喊答]\s*[“「『\"])(?=[\s“「『]*[^\s“”「」『』\"])")
SPEECH_END = tuple("。！？!?…，,～~—.")


def has_dialogue(story):
    """True if someone speaks in quotation marks. A merely quoted word (一只叫“点点”的小狗) is no speech: a
    quotation must follow a colon or a verb of saying, or end in punctuation of its own."""
    quotations = ("".join(filter(None, groups)) for groups in QUOTED.findall(story))
    return bool(INTRODUCED.search(story)) or any(q.strip().endswith(SPEECH_END) for q in quotations)


def check(story, constraints, rivals=(), detect=None):
    """Which constraints does the story meet? -> the same dict with True, False, or None (no rule can tell) as values;
    for 词汇 and 特点 a dict by word and by feature.

    词汇: the word is a substring. 随机句子: each sentence of it is one after `fold`. 特点 对话: `has_dialogue`; other
    features: what detect(story) -> {feature: True or False} tells. 摘要: is it closer than the rivals, other summaries?
    """
    met = {}
    for key, value in constraints.items():
        if key == WORDS:
            met[key] = {word: word in story for word in value}
        elif key == FEATURE:
            detected = detect(story) if detect else {}
            met[key] = {name: has_dialogue(story) if name == "对话" else detected.get(name) for name in value}
        elif key == SENTENCE:
            whole, folded = fold(value), fold(story)
            met[key] = (whole in folded or all(fold(s) in folded for s in sentences(value))) if whole else None
        else:
            met[key] = tells(story, value, rivals) if rivals else None
    return met


EACH_WORD = "每个词"


def outcomes(met):
    """What `check` found -> {name: [True or False, …]} of whatever can be told: each key as a whole, and beside it
    每个词 and each feature (特点 对话)."""
    found = {}
    for key, value in met.items():
        parts = value if key in LIST_KEYS else {key: value}
        known = {name: ok for name, ok in parts.items() if ok is not None}
        if known:
            found[key] = [all(known.values())]
        if known and key == WORDS:
            found[EACH_WORD] = list(known.values())
        if key == FEATURE:
            found |= {f"{key} {name}": [ok] for name, ok in known.items()}
    return found


def overlap(summary, story):
    """Share of the summary's distinct character 2- and 3-grams that occur in the story, both folded."""
    summary, story = fold(summary), fold(story)
    grams = {summary[i:i + n] for n in (2, 3) for i in range(len(summary) - n + 1)}
    return sum(gram in story for gram in grams) / len(grams) if grams else 0.0


def tells(story, summary, others):
    """Is the story closer to its own summary than to every one of the others (by `overlap`)? A tie is a no."""
    own = overlap(summary, story)
    return all(own > overlap(other, story) for other in others)
