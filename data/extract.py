"""Constraints made from a story itself, where a record has none of the kind (augment.py --extract)."""
import math
import random
import re
from collections import Counter

from constraints import FEATURE, SENTENCE, WORDS, fold, has_dialogue
from data.clean import CHINESE, SENTENCES

EXTRACTS = ("words", "sentence", "features")

# In a word of more than one character these are signs of a piece that is cut across words.
FUNCTION = re.compile("[的了着过吗呢吧啊呀哦是在我你他她它们这那和与就也都还又很把被给对从到向不没有个只条一两几"
                      "上下里去来说道想要会能让地得之为于其而且但却才再]")


def candidate_words(story, tokenizer):
    """Words that a story could be asked for: pieces of the tokenizer of two or more characters -> how often each."""
    pieces = Counter(tokenizer.pieces(story))
    return {piece: n for piece, n in pieces.items()
            if len(piece) >= 2 and len(CHINESE.findall(piece)) == len(piece) and not FUNCTION.search(piece)}


def candidate_sentences(story):
    """Sentences of 6 to 30 characters that stand in the story once, with quotation marks that close."""
    found = [s.strip() for s in SENTENCES.findall(story)]
    return [s for s in found if 6 <= len(s) <= 30 and len(fold(s)) >= 5 and story.count(s) == 1
            and all(s.count(a) == s.count(b) for a, b in ("“”", "「」", "『』", "‘’", "（）"))
            and s.count('"') % 2 == 0]


def extract(constraints, story, kinds, tokenizer, df, seed):
    """Add constraints of these kinds (of EXTRACTS) that the record lacks: a random choice of those that the story
    offers, so that single and combined ones both come. 词汇 stays empty until all stories have been seen: `df` counts
    the stories that each candidate occurs in, for `choose_words`."""
    rng = random.Random(f"{seed}-{fold(story)}")
    offered, words = {}, {}
    if "words" in kinds and WORDS not in constraints:
        words = candidate_words(story, tokenizer)
        if len(words) >= 2:
            offered[WORDS] = []
    if "sentence" in kinds and SENTENCE not in constraints and (found := candidate_sentences(story)):
        offered[SENTENCE] = rng.choice(found)
    if "features" in kinds and FEATURE not in constraints and has_dialogue(story):
        offered[FEATURE] = ["对话"]
    chosen = [key for key in offered if rng.random() < 0.5]
    if not constraints and offered and not chosen:
        chosen = [rng.choice(list(offered))]
    if WORDS in chosen:
        df.update(words.keys())
    items = [*constraints.items(), *((key, offered[key]) for key in chosen)]
    rng.shuffle(items)
    return dict(items)


def choose_words(story, candidates, df, stories, rng):
    """Two or three words out of the best by tf-idf, in random order."""
    def score(word):
        return candidates[word] * math.log(stories / (1 + df[word]))
    best = sorted(candidates, key=lambda word: (-score(word), word))[:5]
    return rng.sample(best, min(len(best), rng.choice((2, 3, 3))))
