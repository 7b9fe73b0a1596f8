"""The base model that ships: it is the one its card describes, made from the corpus as it is."""
import hashlib
import json
from itertools import islice

import pytest
from conftest import ROOT

from checkpoint import find_base, gpt_config, load_model
from data import books, builtin, generate
from data.builtin import SEEDS
from model import PRESETS
from records import read_stories

BASE = ROOT / "base"


@pytest.fixture(scope="module")
def corpus():
    return json.loads((BASE / "corpus.json").read_text(encoding="utf-8"))


def test_the_corpus_is_the_one_that_the_base_was_trained_on(corpus):
    assert (corpus["texts"], corpus["exercises"], corpus["seed"]) == (
        builtin.BOOKS, builtin.EXERCISES, SEEDS["pretraining"])
    held_out = "\n".join(r["output"] for r in builtin.held_out_instructions())
    assert hashlib.sha256(held_out.encode()).hexdigest() == corpus["sha256_of_heldout_stories"]
    if corpus["version"] != generate.VERSION:
        pytest.skip(f"the generator is at version {generate.VERSION}, the base was trained on {corpus['version']}")
    for source in (books.texts, books.exercises):
        first = "\n".join(source(1000, corpus["seed"]))
        assert hashlib.sha256(first.encode()).hexdigest() == corpus[f"sha256_of_first_1000_{source.__name__}"]


def test_it_is_small_and_loads(corpus):
    assert find_base() == BASE
    assert sum(p.stat().st_size for p in BASE.iterdir() if p.is_file()) <= 16e6
    model, tokenizer = load_model(BASE)
    assert gpt_config(BASE / "config.json") == PRESETS["small"] and model.num_params() == 6_688_000
    assert str(model.lm_head.weight.dtype) == "torch.bfloat16"
    text = next(islice(books.texts(1000, corpus["seed"]), 7, None))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_its_tokenizer_serves_real_chinese(real_data):
    _, tokenizer = load_model(BASE)
    stories = read_stories(real_data / "real_stories_zh.jsonl")
    assert sum(len(tokenizer.encode(s)) for s in stories) / sum(map(len, stories)) <= 1.2


def test_a_word_has_the_same_pieces_in_a_prompt_and_in_a_story():
    _, tokenizer = load_model(BASE)
    same = of = 0
    for record in generate.stories(200, SEEDS["plain stories"]):
        pieces = "\0".join(tokenizer.sp.encode_as_pieces(record["text"]))
        for word in record["words"]:
            of += 1
            same += "\0".join(tokenizer.sp.encode_as_pieces(word)) in pieces
    assert same / of > 0.9
