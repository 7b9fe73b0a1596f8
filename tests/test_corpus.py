"""The built-in corpus as published: the authored stories, the books of pretraining."""
import re
import shutil
from difflib import SequenceMatcher
from itertools import combinations

import pytest

from constraints import FEATURES, has_dialogue, parse
from data import books, builtin, generate
from records import story_hash

# ---- the authored stories ----

@pytest.fixture(scope="module")
def authored():
    return generate.authored()


def test_authored_records_are_true_and_complete(authored):
    assert len(authored) >= 150 and len(generate.authored("heldout")) == 30
    assert len(generate.authored("train")) == len(authored) - 30
    assert len({record["story_id"] for record in authored}) == len(authored)
    for record in authored:
        text = record["text"]
        assert set(record) == {"text", "words", "features", "sentence", "summary", "story_id", "split"}
        assert 100 <= len(text) <= 300 and "\n" not in text
        assert 2 <= len(record["words"]) <= 3 and all(word in text for word in record["words"])
        assert text.count(record["sentence"]) == 1 and 15 <= len(record["summary"]) <= 60
        assert record["features"] == [f for f in FEATURES if f in record["features"]]
        assert ("对话" in record["features"]) == has_dialogue(text)
        same = SequenceMatcher(None, record["summary"], text, autojunk=False).find_longest_match()
        assert same.size < 15


def test_no_two_authored_stories_are_alike(authored):
    texts = [record["text"] for record in authored]
    assert len({text[:8] for text in texts}) == len(texts)
    grams = [{text[i:i + 5] for i in range(len(text) - 4)} for text in texts]
    assert max(len(a & b) / len(a | b) for a, b in combinations(grams, 2)) < 0.1


# ---- which part is for what ----

def test_nothing_that_is_judged_by_is_trained_on():
    seeds = builtin.SEEDS
    assert len(set(seeds.values())) == len(seeds)
    instructions = [*builtin.held_out_instructions(),
                    *generate.instructions(list(generate.stories(100, seeds["more instructions"], held_out=True)), 1)]
    judged = [*builtin.plain_stories(), *builtin.pretraining_validation(), *(r["output"] for r in instructions),
              *(r["text"] for r in generate.authored("heldout"))]
    trained = [*(r["output"] for r in builtin.fine_tuning()), *books.texts(1000, seeds["pretraining"]),
               *(r["text"] for r in generate.stories(500, seeds["openings"]))]
    assert len(set(trained)) > 4000 and len(set(judged)) > 500
    assert not {story_hash(story) for story in judged} & {story_hash(story) for story in trained}
    parts = {part for text in trained for part in text.split("\n")}  # a book may hold two stories
    assert not parts & set(judged)
    pairs = [r["constraints"]["词汇"] for r in instructions if len(r["constraints"].get("词汇", ())) == 2]
    assert len(pairs) > 50
    for first, second in pairs[:40]:
        assert not any(first in text and second in text for text in (r["output"] for r in builtin.fine_tuning()[:3000]))


# ---- the books ----

def test_books_hold_no_instructions_and_no_held_out_story(authored):
    told = list(books.texts(1000, 5))
    assert not [text for text in told if parse(text)[0]]
    held_out = {record["text"] for record in authored if record["split"] == "heldout"}
    assert not held_out & set(told) and {r["text"] for r in generate.authored("train")} & set(told)
    assert told[:50] == list(books.texts(50, 5)) != list(books.texts(50, 6))
    drilled = list(books.exercises(300, 5))
    assert not [text for text in drilled if parse(text)[0]]
    assert drilled[:50] == list(books.exercises(50, 5)) != list(books.exercises(50, 6))


def test_what_books_are_made_of():
    told = list(books.texts(2000, 5))
    two = [text.split("\n\n") for text in told if "\n\n" in text]
    assert 0.4 < len(two) / len(told) < 0.6
    lexicon, _ = generate.load()
    names = [e["word"] for group in ("pet_name", "boy_name", "girl_name") for e in lexicon[group]["entries"]]
    name = re.compile("|".join(names))
    same = sum(bool(set(name.findall(first)) & set(name.findall(second))) for first, second in two)
    assert same > 0.9 * len(two)  # the second story is about the same characters
    assert 0.3 < sum(text.startswith("《") for text in told) / len(told) < 0.6


def test_an_exercise_is_a_line_and_the_same_again():
    drilled = [text.split("\n") for text in books.exercises(300, 5)]
    assert all(line.endswith(first) for first, *again in drilled for line in again)
    assert {len(again) for _, *again in drilled} == set(range(1, books.AGAIN + 1))
    assert len({first for first, *_ in drilled}) > 290  # nothing to know by heart
    assert len(books.CHARACTERS) == 3755 and {"一", "啊", "座"} <= set(books.CHARACTERS)
    assert set("".join(first for first, *_ in drilled[2::3])) <= set(books.CHARACTERS)
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
