"""sample.py --force: asked words, and the sentence, that a story has not told yet become likelier, the more the longer.

Nothing is written into the story: where a sentence begins, the first piece of each unmet thing gets a bonus that grows
with every sentence; once a thing has begun, the rest of it follows; a story with something unmet does not end. Whether
it suits the story is left to the model, so no rate of a model is ever measured this way.
"""
import functools
import math

from constraints import SENTENCE, WORDS, parse
from dataset import PROMPT

BONUS = 1.5     # nats, for each sentence that has been told
FOLLOWS = 20.0  # nats, for a piece that goes on with what has begun
ENDS = "。！？…”“‘\n"  # what a sentence, or speech, begins behind


def at_start(story):
    """Does a sentence, or speech, begin behind it?"""
    return not story or story[-1] in ENDS


def steer_to(tokenizer):
    """-> `steer` of decoding.stream."""
    before, behind = map(len, PROMPT.split("{}"))

    @functools.cache
    def things(prompt):
        """[(what is asked for, its ids), …] of a prompt, a tuple of ids."""
        asked, _ = parse(tokenizer.decode(prompt)[before:-behind])
        texts = asked.get(WORDS, []) + list(filter(None, [asked.get(SENTENCE)]))
        return [(text, tokenizer.encode(text)) for text in texts]

    def steer(prompt, told):
        """The ids of a prompt and of its story so far -> {id: nats to add to its logit}."""
        story = tokenizer.decode(told)
        unmet = [ids for text, ids in things(tuple(prompt)) if text not in story]
        added = {tokenizer.eos_id: -math.inf} if unmet else {}
        for ids in unmet:
            for begun in range(min(len(ids) - 1, len(told)), -1, -1):  # how much of it does the story end with?
                if told[len(told) - begun:] == ids[:begun] and at_start(tokenizer.decode(told[:len(told) - begun])):
                    grown = BONUS * sum(character in ENDS for character in story)
                    added[ids[begun]] = max(added.get(ids[begun], 0), FOLLOWS if begun else grown)
                    break
        return added
    return steer
