"""The base model that ships: it is the one its card describes, made from the corpus as it is."""
import hashlib
import importlib.util
import json
import re
from itertools import islice

import pytest
from conftest import ROOT

import pretrain
from checkpoint import find_base, gpt_config, load_model
from data import books, generate
from model import PRESETS
from records import read_stories

BASE = ROOT / "base"


@pytest.fixture(scope="module")
def corpus():
    return json.loads((BASE / "corpus.json").read_text(encoding="utf-8"))


def test_the_corpus_is_the_one_that_the_base_was_trained_on(corpus):
    assert (corpus["version"], corpus["texts"], corpus["exercises"], corpus["seed"]) == (
        generate.VERSION, pretrain.BUILTIN_TEXTS, pretrain.BUILTIN_EXERCISES, pretrain.BUILTIN_SEED)
    for made in (books.texts, books.exercises):
        first = "\n".join(made(1000, corpus["seed"]))
        assert hashlib.sha256(first.encode()).hexdigest() == corpus[f"sha256_of_first_1000_{made.__name__}"]
    held_out = "\n".join(r["text"] for r in generate.stories(100, 99, held_out=True))
    assert hashlib.sha256(held_out.encode()).hexdigest() == corpus["sha256_of_heldout_stories"]


def test_it_is_small_and_loads(corpus):
    assert find_base() == BASE
    assert sum(p.stat().st_size for p in BASE.iterdir() if p.is_file()) <= 16e6
    model, tokenizer = load_model(BASE)
    assert gpt_config(BASE / "config.json") == PRESETS["small"] and model.num_params() == 6_163_712
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
    for record in generate.stories(200, 98):
        pieces = "\0".join(tokenizer.sp.encode_as_pieces(record["text"]))
        for word in record["words"]:
            of += 1
            same += "\0".join(tokenizer.sp.encode_as_pieces(word)) in pieces
    assert same / of > 0.9


def test_the_card_prints_losses_and_samples(capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("card", BASE / "card.py")
    card = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(card)
    monkeypatch.setattr(card, "texts", lambda: {"ours": [r["text"] for r in generate.stories(20, card.SEED)]})
    monkeypatch.setattr(books, "EXERCISED", 20)
    card.main([])
    out = capsys.readouterr().out
    loss, tokens, bits = (float(cell) for cell in out.split("ours (20 fit into the context) |")[1].split("|")[:3])
    assert loss < 0.5 and bits == pytest.approx(loss * tokens / 0.6931, abs=2e-3) and out.count("\n> ") >= 10
    first, again = (float(x) for x in re.findall(r"([\d.]+) where they", out))
    assert again < 1 < 3 < first  # it copies
    by_kind = dict(re.findall(r"(sentences|words|characters) (\d+\.\d+)", out))
    assert len(by_kind) == 3 and all(float(loss) < 1 for loss in by_kind.values())  # word for word
