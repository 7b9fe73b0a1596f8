"""The built-in corpus as published: the authored stories, the books of pretraining."""
import re
import shutil
from difflib import SequenceMatcher
from itertools import combinations, product

import pytest

from constraints import FEATURES, has_dialogue, parse
from data import books, builtin, generate
from records import story_hash

# ---- the authored stories ----

@pytest.fixture(scope="module")
def authored():
    return generate.authored()


def test_authored_records_are_true_and_complete(authored):
    assert len(authored) >= 1000 and len(generate.authored("heldout")) == 150
    assert len(generate.authored("train")) == len(authored) - 150
    assert len({record["story_id"] for record in authored}) == len(authored)
    for record in authored:
        text = record["text"]
        assert set(record) - {"asked"} == {"text", "words", "features", "sentence", "summary", "story_id", "split"}
        assert 80 <= len(text) <= 330 and "\n" not in text
        assert 2 <= len(record["words"]) <= 5 and all(word in text for word in record["words"])
        assert text.count(record["sentence"]) == 1 and 12 <= len(record["summary"]) <= 62
        asked = record.get("asked", {})  # the instruction that it was written for
        assert set(asked.get("词汇", [])) <= set(record["words"])
        assert set(asked.get("特点", [])) <= set(record["features"])
        assert asked.get("随机句子", record["sentence"]) == record["sentence"]
        assert record["features"] == [f for f in FEATURES if f in record["features"]]
        assert ("对话" in record["features"]) == has_dialogue(text)
        same = SequenceMatcher(None, record["summary"], text, autojunk=False).find_longest_match()
        assert same.size < 15


def test_no_two_authored_stories_are_alike_nor_a_generated_one(authored):
    texts = [record["text"] for record in authored]
    assert len({text[:8] for text in texts}) == len(texts)
    def grams(texts):
        return [{text[i:i + 5] for i in range(len(text) - 4)} for text in texts]
    own, generated = grams(texts), grams(record["text"] for record in generate.stories(300, 1))
    assert max(len(a & b) / len(a | b) for a, b in combinations(own, 2)) < 0.1
    # a generated story may retell an authored summary, which is as long as a quarter of its story
    assert max(len(a & b) / len(a | b) for a, b in product(own, generated)) < 0.15


# ---- which part is for what ----

def test_nothing_that_is_judged_by_is_trained_on():
    seeds = builtin.SEEDS
    assert len(set(seeds.values())) == len(seeds)
    judged = [*builtin.plain_stories(), *builtin.pretraining_validation(),
              *(r["output"] for r in builtin.held_out_instructions()),
              *(r["text"] for r in generate.authored("heldout"))]
    trained = [*(r["output"] for r in builtin.fine_tuning()), *books.texts(1000, seeds["pretraining"])]
    assert len(set(trained)) > 6000 and len(set(judged)) > 1000
    assert not {story_hash(story) for story in judged} & {story_hash(story) for story in trained}
    parts = {part for text in trained for part in text.split("\n")}  # a book may hold two stories
    assert not parts & set(judged)


def test_no_authored_story_is_fine_tuned_on():
    """What they are asked for stands anywhere in them (docs/log.md)."""
    rows = builtin.fine_tuning()
    assert len(rows) == builtin.STORIES and not [r for r in rows if r["story_id"].startswith("authored")]
    assert len({frozenset(r["constraints"]) for r in rows}) == 15
    asked = [r for r in rows if "随机句子" in r["constraints"]]
    assert all(r["output"].startswith(r["constraints"]["随机句子"]) for r in asked)


# ---- the books ----

def test_books_hold_no_instructions_and_no_held_out_story(authored):
    texts = list(books.texts(1500, 5))
    assert not [text for text in texts if parse(text)[0]]
    parts = {part for text in texts for part in text.split("\n")}
    assert not parts & {record["text"] for record in authored if record["split"] == "heldout"}
    assert parts & {r["text"] for r in generate.authored("train")}
    assert texts[:50] == list(books.texts(50, 5)) != list(books.texts(50, 6))
    drilled = list(books.exercises(300, 5))
    assert not [text for text in drilled if parse(text)[0]]
    assert drilled[:50] == list(books.exercises(50, 5)) != list(books.exercises(50, 6))


def test_what_books_are_made_of():
    """Lines that name what is in the text stand before it, some of them behind; what they name is there."""
    forms = books.load()[1]
    texts = list(books.texts(1500, 5))
    heads = [re.escape(form.split("{")[0]) for form in forms["words"] if not form.startswith("{")]
    lists = [re.compile(f"^(?:{'|'.join(heads)})", re.M).search(text) for text in texts]
    assert 0.7 < sum(map(bool, lists)) / len(texts) < 0.95
    first = [found.start() < len(text) / 2 for found, text in zip(lists, texts) if found]
    assert 0.7 < sum(first) / len(first) < 0.97
    short = sum(len(text) < 150 for text in texts) / len(texts)
    assert 0.15 < short < 0.4
    secret = generate.held_out_words()
    named = re.compile("今天的新字卡：(.*?)。")
    words = [word for text in texts for found in named.findall(text) for word in re.split("[、， ]", found)]
    assert len(words) > 50 and not secret & set(words)


def test_an_exercise_is_a_line_and_the_same_again():
    drilled = [text.split("\n") for text in books.exercises(300, 5)]
    assert all(line.endswith(first) for first, *again in drilled for line in again)
    assert {len(again) for _, *again in drilled} == set(range(1, books.AGAIN + 1))
    assert len({first for first, *_ in drilled}) > 290  # nothing to know by heart
    assert len(generate.CHARACTERS) == 3755 and {"一", "啊", "座"} <= set(generate.CHARACTERS)
    assert set("".join(first for first, *_ in drilled[2::3])) <= set(generate.CHARACTERS)
    assert all("。" in first or "？" in first or "！" in first for first, *_ in drilled[0::3])
    assert all("、" in first for first, *_ in drilled[1::3])


def test_books_command(tmp_path, capsys):
    books.main(["--n", "5", "--seed", "2", "--out", str(tmp_path / "b.jsonl")])
    from records import read_stories
    assert read_stories(tmp_path / "b.jsonl") == list(books.texts(5, 2))
    books.main(["--n", "5", "--seed", "2", "--exercises", "--out", str(tmp_path / "b.jsonl")])
    assert read_stories(tmp_path / "b.jsonl") == list(books.exercises(5, 2))


def test_books_without_a_field_are_one_line(tmp_path, monkeypatch, refused):
    shutil.copytree(generate.LANGUAGE, tmp_path / "data")
    path = tmp_path / "data" / "books.toml"
    path.write_text(path.read_text(encoding="utf-8").replace("again =", "agian ="), encoding="utf-8")
    monkeypatch.setattr(generate, "LANGUAGE", tmp_path / "data")
    refused(books.main, ["--n", "2", "--out", tmp_path / "b.jsonl"], path, "again")
    assert not (tmp_path / "b.jsonl").exists()
