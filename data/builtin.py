"""The built-in data sets: which stories of the built-in world are for what. No two parts share a seed, and no story
that anything is judged by is ever trained on (tests/test_corpus.py)."""
import functools

from constraints import SUMMARY, WORDS
from data import books, generate

SEEDS = {  # of data/generate.py and data/books.py
    # to train on
    "pretraining": 1,
    "fine-tuning": 2,
    "more fine-tuning": 5,   # of runs/longer.sh
    "reinforcement": 6,
    # to judge by
    "pretraining, validation": 3,
    "reinforcement, validation": 7,
    "features": 97,          # the labelled stories of study/features.py
    "plain stories": 98,     # on which forgetting is measured
    "instructions": 99,      # of words and sentences that no training story has
}
BOOKS, EXERCISES = 300_000, 4_000  # texts of pretraining
VALIDATION_STORIES = 200
STORIES = 6400                      # of fine-tuning
REPLAYED = 5000                     # texts of pretraining that --replay draws from
REINFORCED = 2400                   # instructions of train_rl.py
PLAIN, INSTRUCTIONS = 215, 600


def pretraining():
    """Yield the texts that the base model reads."""
    yield from books.exercises(EXERCISES, SEEDS["pretraining"])
    yield from books.texts(BOOKS, SEEDS["pretraining"])


def pretraining_validation():
    """-> plain stories, a list of texts."""
    return [r["text"] for r in generate.stories(VALIDATION_STORIES, SEEDS["pretraining, validation"])]


def replayed():
    """Yield the texts of the base's pretraining that --replay reads again."""
    return books.texts(REPLAYED, SEEDS["pretraining"])


@functools.cache  # many fine-tunings in one process ask for them
def fine_tuning():
    """-> instruction records. Authored stories are not among them: what they are asked for stands anywhere in them, and
    a model that learns from them no longer tells it first (docs/log.md)."""
    seed = SEEDS["fine-tuning"]
    return list(generate.instructions(generate.stories(STORIES, seed), seed))


def reinforcement():
    """-> the instructions that train_rl.py lets a model write stories for."""
    return hard(instruction_rows(REINFORCED, SEEDS["reinforcement"]))


def reinforcement_validation(n):
    """-> n other ones, by which it chooses the best model."""
    return hard(instruction_rows(3 * n, SEEDS["reinforcement, validation"]))[:n]


def hard(rows):
    """Those that a model does not follow anyway after fine-tuning: with a summary, or with three words or more."""
    return [row for row in rows if SUMMARY in row["constraints"] or len(row["constraints"].get(WORDS, [])) > 2]


def instruction_rows(n, seed):
    """Yield the instructions of n stories as rows of data/judged.py, with the story."""
    for record in generate.instructions(generate.stories(n, seed), seed):
        yield {"constraints": record["constraints"], "story": record["output"]}


def plain_stories(n=None):
    """-> those of n stories (default: PLAIN) that have a plot, as most do that the base has read: a list of texts.
    Nothing is trained on them."""
    stories = generate.stories(n or PLAIN, SEEDS["plain stories"])
    return [record["text"] for record in stories if SUMMARY not in record["asked"]]


def held_out_instructions(n=INSTRUCTIONS):
    """-> instruction records of stories with words and sentences that no training story has."""
    seed = SEEDS["instructions"]
    return list(generate.instructions(generate.stories(n, seed, held_out=True), seed))
