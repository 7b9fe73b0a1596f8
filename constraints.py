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

# Every spelling that stands for a key or a feature. Latin names are matched without regard to case.
KEY_ALIASES = {
    WORDS: ("单词", "词语", "词", "关键词", "关键字", "words", "word", "keywords"),
    FEATURE: ("特征", "特色", "特性", "features", "feature"),
    SUMMARY: ("总结", "概要", "梗概", "概括", "summary"),
    SENTENCE: ("句子", "随机语句", "随机句", "random sentence", "sentence"),
}
FEATURE_ALIASES = {
    "对话": ("有对话", "对白", "dialogue", "dialog"),
    "转折": ("情节转折", "反转", "twist"),
    "坏结局": ("不好的结局", "悲剧结局", "坏结果", "badending", "bad ending"),
    "道德价值": ("道德", "道德观", "道德寓意", "寓意", "moralvalue", "moral value"),
    "伏笔": ("铺垫", "预示", "foreshadowing"),
    "冲突": ("矛盾", "conflict"),
}


def _lookup(aliases):
    return {name: canonical for canonical, others in aliases.items() for name in (canonical, *others)}


KEY_OF = _lookup(KEY_ALIASES)
FEATURE_OF = _lookup(FEATURE_ALIASES)

NEWLINE = re.compile(r"\r\n|\r|\n")  # not str.splitlines(), which also cuts at U+2028, form feeds and the like
KEY_LINE = re.compile(r"\s*(" + "|".join(map(re.escape, KEY_OF)) + r")\s*[：:]\s*(.*)", re.IGNORECASE)
SEPARATORS = re.compile(r"[，,、；;\s]+")


def parse(text):
    """Read constraint lines. -> (constraints, preamble)

    A key counts at the start of a line only, so that 摘要：小狗的名字叫点点。 stays whole. A line without a key
    continues the line above it; what stands before the first key is the preamble ("请写一个故事。"), returned as it
    is. A key that comes twice, in one line (随机句子：随机句子：…) or in two, is merged. A key without a value is
    left out.
    """
    preamble, values = [], {}
    lines = None  # the value that is being read, as its lines
    for line in NEWLINE.split(text):
        match = KEY_LINE.fullmatch(line)
        if match:
            key, value = KEY_OF[match[1].lower()], match[2]
            while (again := KEY_LINE.fullmatch(value)) and KEY_OF[again[1].lower()] == key:
                value = again[2]
            lines = values.setdefault(key, [])
            line = value
        elif lines is None:
            preamble.append(line)
            continue
        if line.strip():
            lines.append(line.strip())
    constraints = {}
    for key, lines in values.items():
        if key in LIST_KEYS:
            items = [item for line in lines for item in _split(key, line)]
        else:
            items = lines
        items = list(dict.fromkeys(items))  # without repeats, in order
        if items:
            constraints[key] = items if key in LIST_KEYS else "".join(items)
    return constraints, "\n".join(preamble).strip("\n")


def _split(key, line):
    if key == WORDS:
        return [word for word in SEPARATORS.split(line) if word]
    names = [name.strip(" 。.") for name in re.split(r"[，,、；;]+", line)]  # "bad ending" is one name
    return [FEATURE_OF.get(name.lower(), name) for name in names if name]


def render(constraints):
    """Constraints as text, one line a key, in the dict's own order. parse(render(c))[0] == c."""
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


# ---- does this story meet it? ----

QUOTED = re.compile(r"“([^“”]+)”|「([^「」]+)」|『([^『』]+)』|\"([^\"]+)\"")
INTRODUCED = re.compile(r"[：:]\s*[“”「『\"]|[说道问喊答]\s*[“「『\"]")  # real text closes what it opens carelessly
SPEECH_END = tuple("。！？!?…，,～~—.")


def has_dialogue(story):
    """True if someone speaks in quotation marks. A merely quoted word (一只叫“点点”的小狗) is no speech: a
    quotation must follow a colon or a verb of saying, or end in punctuation of its own."""
    quotations = ("".join(filter(None, groups)) for groups in QUOTED.findall(story))
    return bool(INTRODUCED.search(story)) or any(q.strip().endswith(SPEECH_END) for q in quotations)


def fold(text):
    """Text without spaces, punctuation, letter width and case: what must agree for a sentence to count as there."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", text).casefold())


def check(story, constraints):
    """Which constraints does the story meet? -> the same dict with True, False, or None (no rule can tell) as values;
    for 词汇 and 特点 a dict by word and by feature.

    词汇: the word is a substring. 随机句子: it is one after `fold`. 特点 对话: `has_dialogue`.
    """
    met = {}
    for key, value in constraints.items():
        if key == WORDS:
            met[key] = {word: word in story for word in value}
        elif key == FEATURE:
            met[key] = {name: has_dialogue(story) if name == "对话" else None for name in value}
        elif key == SENTENCE:
            folded = fold(value)
            met[key] = folded in fold(story) if folded else None
        else:
            met[key] = None
    return met


def common_subsequence(a, b):
    """Length of the longest common subsequence of two strings."""
    best = [0] * (len(b) + 1)  # best[j]: of the part of a read so far and b[:j]
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, best[j] = best[j], diagonal + 1 if x == y else max(best[j], best[j - 1])
    return best[-1]


def rouge_l(summary, story):
    """ROUGE-L recall (Lin 2004) on folded characters: the share of the summary that is a subsequence of the story."""
    summary = fold(summary)
    return common_subsequence(summary, fold(story)) / len(summary) if summary else 0.0


def overlap(summary, story):
    """Share of the summary's distinct character 2- and 3-grams that occur in the story, both folded."""
    summary, story = fold(summary), fold(story)
    grams = {summary[i:i + n] for n in (2, 3) for i in range(len(summary) - n + 1)}
    return sum(gram in story for gram in grams) / len(grams) if grams else 0.0


def tells(story, summary, others):
    """Is the story closer to its own summary than to every one of the others (by `overlap`)? A tie is a no."""
    own = overlap(summary, story)
    return all(own > overlap(other, story) for other in others)
