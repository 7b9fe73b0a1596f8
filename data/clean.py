"""Cleaning real stories (augment.py --clean): what is cut, repeated or left over from a translation is mended or
refused, and labels that a story does not meet are left out. Each rule of CHECKS can be kept from its work by name."""
import re
from collections import Counter

from constraints import LIST_KEYS, check, fold

CHINESE = re.compile("[\u4e00-\u9fff]")
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


def clean(constraints, story, keep, counts):
    """Mend a story, and leave out labels that it does not meet. -> (constraints, story). Raises ValueError when it
    cannot be mended; counts what was mended. keep: names of CHECKS that are left alone."""
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
    if "english" not in keep and CHINESE.search(story) and ENGLISH.search(story):
        raise ValueError("clean: mixed with English")
    if "labels" not in keep:
        drop_false_labels(constraints, story, counts)
    return constraints, story


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
