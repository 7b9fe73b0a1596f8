import json
import re
import shutil
from collections import Counter
from itertools import islice

import pytest

from constraints import FEATURES, KEYS, check, has_dialogue, parse, sentences
from data import generate

NEVER = ("一只小蚂蚁在花园里寻找吃的，最后找到了一个苹果", "天空中飘着几朵白云", "汤姆和杰瑞")


@pytest.fixture(scope="module")
def language():
    return generate.load()


@pytest.fixture(scope="module")
def records():
    return list(generate.stories(5000, seed=5))


@pytest.fixture(scope="module")
def told(records):
    """The instruction records of the first 3,000 stories."""
    return list(generate.instructions(records[:3000], seed=5))


@pytest.fixture(scope="module")
def composed(language):
    """2,000 stories with what they were made from: [(record, (plot, values)), ...]."""
    return [generate.compose(language[1], generate.random.Random(f"made-{i}")) for i in range(2000)]


def phrasings(plot):
    """Every phrasing of a plot, with {} where a word goes."""
    for ending in plot["endings"]:
        for parts in [p for _, (_, beat) in ending["beats"] for p in beat] + ending["summary"]:
            yield "{}".join("/".join(part) if isinstance(part, list) else part for part in parts[::2])


def names(plot, values):
    """The slots of a story that are filled with a name."""
    return [slot for slot in plot["slots"] if slot in values and values[slot] != values[slot + ".kind"]]


# ----------------------------------------------------------------------------- labels

def test_labels_are_true(records):
    for record in records[:2000]:
        text = record["text"]
        assert list(record) == ["text", "words", "features", "sentence", "summary", "story_id"]
        assert 120 <= len(text) <= 400
        assert 2 <= len(record["words"]) == len(set(record["words"])) <= 3
        assert all(word in text for word in record["words"])
        assert text.count(record["sentence"]) == 1
        assert record["sentence"][-1] in "。！？”" and record["sentence"].count("“") == record["sentence"].count("”")
        assert 15 <= len(record["summary"]) <= 60 and record["summary"] not in text
        assert record["features"] == [f for f in FEATURES if f in record["features"]]
        assert ("对话" in record["features"]) == has_dialogue(text)


def test_features_are_those_of_plot_and_ending(composed):
    for record, made in composed:
        declared = next(e["features"] for e in made["plot"]["endings"] if e["name"] == made["ending"])
        assert set(record["features"]) - {"对话"} == declared


def test_shares_of_features_and_length(records):
    share = Counter(feature for record in records for feature in record["features"])
    for feature in FEATURES:
        assert 0.10 < share[feature] / len(records) < 0.60, feature
    assert 250 <= sum(len(record["text"]) for record in records) / len(records) <= 320
    assert sum(6 <= len(record["sentence"]) <= 30 for record in records) > 0.9 * len(records)


def test_names_and_the_central_word_recur(composed):
    for record, made in composed:
        plot, values = made["plot"], made["values"]
        text = record["text"]
        assert text.count(values[plot["central"]]) >= 3
        named = [values[slot] for slot in names(plot, values)]
        assert named and text.count(named[0]) >= 3
        assert all(text.count(name) >= 3 for name in named if name in text)


def test_no_word_hides_in_another(composed, language):
    """豆豆 must not be counted in a 豆豆 that is no name; a name in the plots' own text would be one."""
    for _, made in composed[:500]:
        plot, values = made["plot"], made["values"]
        drawn = [values[slot] for slot in plot["slots"] if slot in values]
        assert not [(a, b) for a in drawn for b in drawn if a is not b and a in b]
    lexicon, plots = language
    names = [entry["word"] for group in ("pet_name", "boy_name", "girl_name") for entry in lexicon[group]["entries"]]
    text = "\n".join(line for plot in plots for line in phrasings(plot))
    assert not [name for name in names if name in text]


def test_pronouns_agree(composed):
    for record, made in composed:
        plot, values = made["plot"], made["values"]
        own = [values[slot + ".ta"] for slot in names(plot, values)][:2]
        they = (own[0] if len(set(own)) == 1 else "他") + "们"
        assert values["they"] == they
        of_others = set(re.findall("[他她它]们", plot["path"].read_text(encoding="utf-8")))  # fireflies, children
        assert set(re.findall("[他她它]们", record["text"])) <= {they} | of_others


# ----------------------------------------------------------------------------- variety and identity

def test_no_duplicates(records):
    assert len({record["text"] for record in records}) == len({record["story_id"] for record in records}) == 5000


def test_plots_and_words(composed, language):
    lexicon, plots = language
    assert len(plots) >= 16
    assert {made["plot"]["name"] for _, made in composed} == {plot["name"] for plot in plots}
    words = {entry["word"] for group in lexicon.values() if group.get("pos") for entry in group["entries"]}
    assert len(words) >= 260
    assert max(Counter(record["text"][:2] for record, _ in composed).values()) < 0.15 * len(composed)   # many openings
    beats = [beat for plot in plots for ending in plot["endings"] for _, (_, beat) in ending["beats"]]
    assert sum(len(beat) >= 3 for beat in beats) > 0.7 * len(beats) and min(map(len, beats)) >= 2


def test_same_seed_same_bytes_other_seed_other_stories(records, told):
    def dump(rows):
        return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)

    assert dump(generate.stories(300, seed=5)) == dump(records[:300])       # and a prefix of more
    assert dump(generate.instructions(records[:300], seed=5)) == dump(told[:300])
    assert not {r["text"] for r in generate.stories(300, seed=6)} & {r["text"] for r in records}
    assert dump(generate.instructions(records[:300], seed=6)) != dump(told[:300])


def test_slot_words_are_other_words_of_the_same_stories(records, language):
    lexicon, plots = language
    fixed = {entry["word"] for table in (*lexicon.values(), *(t for plot in plots for t in plot["lexicon"].values()))
             if table.get("in_text") for entry in table["entries"]}
    more, changed = list(generate.stories(1000, seed=5, slot_words=True)), 0
    for record, plain in zip(more, records):
        words, text = record["words"], record["text"]
        assert record | {"words": 0} == plain | {"words": 0} and list(record) == list(plain)
        assert 2 <= len(words) == len(set(words)) and all(word in text for word in words)
        if words != plain["words"]:
            changed += 1
            assert not fixed & set(words)
    assert 0.7 < changed / len(more) < 0.8      # the rest as ever, so that words of phrasings are asked for too
    assert any(fixed & set(record["words"]) for record in more)
    assert sum(len(record["words"]) > 3 for record in more) > 300
    assert more[:50] == list(generate.stories(50, seed=5, slot_words=True))
    for row, record in zip(generate.instructions(more, 5), more):
        assert sorted(parse(row["instruction"])[0].get("词汇", record["words"])) == sorted(record["words"])


def test_more_sentences_of_the_same_stories(records):
    more, number = list(generate.stories(1000, seed=5, more_sentences=True)), Counter()
    for record, plain in zip(more, records):
        asked, told = sentences(record["sentence"]), sentences(record["text"])
        assert record | {"sentence": 0} == plain | {"sentence": 0} and list(record) == list(plain)
        assert set(asked) <= set(told) and all(record["text"].count(s) == 1 for s in asked)
        assert len(set(asked)) == len(asked) <= max(1, len(told) // 2)
        number[len(asked)] += 1
        number["in order"] += asked == sorted(asked, key=told.index)
    assert all(number[k] > 80 for k in (1, 2, 3, 4)) and number["in order"] < 700
    assert more[:50] == list(generate.stories(50, seed=5, more_sentences=True))
    for row in generate.instructions(more, 5):
        assert check(row["output"], parse(row["instruction"])[0]).get("随机句子", True)


def test_more_sentences_never_read_as_one(monkeypatch):
    def compose(plots, rng, held_out):
        told = [f"豆豆有{rng.randrange(10 ** 9)}颗糖。", "“好。”", "“走！”朵朵喊。"]     # the last two read as one
        return {"text": "".join(told[::2] + told[1:2]), "sentence": told[0]}, {"sentences": told * 2}

    monkeypatch.setattr(generate, "compose", compose)
    told = list(generate.stories(300, seed=1, more_sentences=True))
    assert all(check(r["text"], {"随机句子": r["sentence"]})["随机句子"] for r in told)
    assert any(len(sentences(r["sentence"])) > 1 for r in told)


def test_a_duplicate_is_passed_over(language, monkeypatch):
    real, calls = generate.compose, []

    def compose(plots, rng, *_):
        calls.append(rng)
        return real(plots, generate.random.Random(0) if len(calls) < 4 else rng)   # the first three are alike

    plain = list(generate.stories(6, seed=9))
    monkeypatch.setattr(generate, "compose", compose)
    rows = list(generate.stories(4, seed=9))
    assert [row["story_id"] for row in rows] == [f"builtin-9-{i}" for i in (0, 3, 4, 5)]
    assert rows[1:] == plain[3:]


def test_the_cases_of_the_study_are_never_written(records):
    files = [generate.LANGUAGE / "lexicon.toml", *(generate.LANGUAGE / "plots").glob("*.toml")]
    text = "\n".join([path.read_text(encoding="utf-8") for path in files]
                     + [record[key] for record in records for key in ("text", "summary")])
    assert "小兔" in text
    for case in NEVER:
        assert case not in text


# ----------------------------------------------------------------------------- instructions

def test_instructions_ask_for_what_the_story_has(records, told):
    for record, row in zip(records, told):
        assert list(row) == ["instruction", "input", "output", "constraints", "story_id"]
        assert (row["output"], row["input"], row["story_id"]) == (record["text"], "", record["story_id"])
        asked, preamble = parse(row["instruction"])
        assert list(asked.items()) == list(row["constraints"].items()) and not preamble
        assert sorted(asked.get("词汇", record["words"])) == sorted(record["words"])
        assert set(asked.get("特点", [])) <= set(record["features"])
        assert asked.get("特点", ["-"])
        assert asked.get("摘要", record["summary"]) == record["summary"]
        assert asked.get("随机句子", record["sentence"]) == record["sentence"]


def test_the_15_combinations_are_balanced_and_in_any_order(told):
    sets = Counter(frozenset(row["constraints"]) for row in told)
    assert len(sets) == 15 and max(sets.values()) - min(sets.values()) <= 2
    first = Counter(next(iter(row["constraints"])) for row in told if len(row["constraints"]) == 4)
    assert set(first) == set(KEYS) and max(first.values()) < 0.4 * first.total()
    features = Counter(len(row["constraints"]["特点"]) for row in told if "特点" in row["constraints"])
    assert features[1] + features[2] > 0.8 * features.total() > 0 and features[3]


def test_a_story_without_features_is_not_asked_for_any(records):
    plain = [record | {"features": []} for record in records[:150]]
    rows = list(generate.instructions(plain + records[150:600], seed=1))
    assert not any("特点" in row["constraints"] for row in rows[:150])
    sets = Counter(frozenset(row["constraints"]) for row in rows)
    assert max(sets.values()) - min(sets.values()) <= 2                     # the others caught up


# ----------------------------------------------------------------------------- command line

def test_command_writes_both_files(tmp_path, records):
    out, pairs = tmp_path / "new" / "s.jsonl", tmp_path / "i.jsonl"
    pairs.write_text("old", encoding="utf-8")
    generate.main(["--n", "20", "--seed", "5", "--out", str(out), "--instructions", str(pairs)])
    lines = out.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == records[:20]
    assert "\\u" not in lines[0]
    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    assert rows == list(generate.instructions(islice(records, 20), seed=5))
    assert sorted(path.name for path in tmp_path.rglob("*.jsonl*")) == ["i.jsonl", "s.jsonl"]       # no .tmp left


def failure(capsys, *argv):
    """The one line that the command prints when it exits with 2."""
    with pytest.raises(SystemExit) as stop:
        generate.main(list(map(str, argv)))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("file, old, new, expected", [
    ("plots/lost.toml", "有一{thing.m}", "有一{thing.mm}", "beat 1, phrasing 1: unknown slot {thing.mm}"),
    ("plots/lost.toml", "有一{thing.m}", "有一{toing}", "beat 1, phrasing 1: unknown slot {toing}"),
    ("plots/lost.toml", "有一{thing.m}", "有一{thing.m", "brace"),
    ("plots/lost.toml", "有一{thing.m}", "有一{spot.full}", "unknown slot {spot.full}"),
    ("plots/lost.toml", 'thing = "thing"', 'thing = "thong"', "slot 'thing': unknown class 'thong'"),
    ("plots/lost.toml", 'thing = "thing"', "thing = 3", "slot 'thing': unknown class 3"),
    ("plots/lost.toml", 'name = "lost"', "", "field 'name' is missing"),
    ("plots/lost.toml", 'central = "thing"', 'central = "thong"', "central 'thong'"),
    ("plots/lost.toml", 'name = "lost"', 'name = "gift"', "duplicate plot name"),
    ("plots/lost.toml", 'name = "lost"', 'name = "lost', "lost.toml"),
    ("plots/lost.toml", 'name = "nook"', 'name = "bag"', "ending 2: duplicate ending name 'bag'"),
    ("plots/lost.toml", 'only = ["nook", "bird"]', 'only = ["nock"]', "beat 2: unknown ending 'nock'"),
    ("plots/lost.toml", "\noptional = true", '\noptional = "yes"', "field 'optional' is not a bool"),
    ("plots/lost.toml", "\n[slots]", '\n[class.thing]\nwords = "帽子"\n[slots]', "[thing]: duplicate class name"),
    ("plots/lost.toml", "\n[slots]", '\n[class.cap]\nword = "帽子"\n[slots]', "[cap]: field 'words' is missing"),
    ("plots/lost.toml", 'thing = "thing"', 'thing = "scene"', "slot 'thing': unknown class 'scene'"),
    ("lexicon.toml", "[scene]\nsay = [", "[scene]\nsay = [3,", "[scene]: say must be a list of strings"),
    ("lexicon.toml", "[scene]\nsay = [", '[scene]\nsay = ["“走吧。”",', "[scene]: a sentence with quotation marks"),
    ("lexicon.toml", "[scene]\nsay = [", '[scene]\nsay = ["{night}",', "[scene]: a sentence class within another"),

    ("plots/lost.toml", 'features = ["转折"]', 'features = ["转机"]', "ending 1: unknown feature '转机'"),
    ("plots/lost.toml", 'features = ["转折"]', 'feature = ["转折"]', "ending 1: unknown field 'feature'"),
    ("plots/lost.toml", 'features = ["转折"]', 'features = "转折"', "ending 1: field 'features' is not a list"),
    ("plots/lost.toml", "summary = [", "summary = [3,", "ending 1, summary: must be a list"),
    ("plots/lost.toml", "[[beat]]", "beat = [3]\n[[ignored]]", "lost.toml"),
    ("plots/lost.toml", 'hero = "who"\npal = "who"', 'hero = "boy"\npal = "boy"', "slot 'pal': its class has no word"),
    ("plots/lost.toml", 'central = "thing"', 'central = "nook"', "each name and 'nook' three times"),
    ("lexicon.toml", "\n顶 帽子", "\n帽子", "[thing]: '帽子' does not have the form 'm word'"),
    ("lexicon.toml", "\n顶 帽子", "\n顶 帽子，", "[thing]: '顶 帽子，' does not have the form"),
    ("lexicon.toml", "\n顶 帽子", "\n条 围巾", "[thing]: duplicate word '围巾'"),
    ("lexicon.toml", 'pos = "noun"', 'pos = "none"', "pos must be one of"),
    ("lexicon.toml", 'names = "pet_name"', 'names = "pet"', "[animal]: unknown class 'pet'"),
    ("lexicon.toml", "[scene]\nsay = [", '[scene]\nsay = ["{moon}。",', "{scene}, sentence 1: unknown slot {moon}"),
    ("lexicon.toml", "[animal]", "[animal", "lexicon.toml"),
    ("lexicon.toml", "[animal]", "x = 1\n[animal]", "lexicon.toml"),
])
def test_a_bad_language_file_is_one_line(tmp_path, capsys, file, old, new, expected):
    shutil.copytree(generate.LANGUAGE, tmp_path / "data", ignore=shutil.ignore_patterns("*.py*"))
    path = tmp_path / "data" / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    line = failure(capsys, "--n", 2000, "--out", tmp_path / "s.jsonl", "--language", tmp_path / "data")
    assert (path.name in line or "{scene}" in expected) and expected in line
    assert not (tmp_path / "s.jsonl").exists()


def test_other_errors_are_one_line(tmp_path, capsys):
    assert "--n 0" in failure(capsys, "--n", 0, "--out", tmp_path / "s.jsonl")
    assert "lexicon.toml" in failure(capsys, "--language", tmp_path, "--out", tmp_path / "s.jsonl")
    assert str(tmp_path) in failure(capsys, "--n", 1, "--out", tmp_path)            # a folder cannot be the file
    for flag in ("--slot-words", "--more-sentences"):
        assert flag in failure(capsys, "--split", "heldout", flag, "--out", tmp_path / "s.jsonl")
    (tmp_path / "plots").mkdir()
    shutil.copy(generate.LANGUAGE / "lexicon.toml", tmp_path)
    assert "no plot files" in failure(capsys, "--language", tmp_path, "--out", tmp_path / "s.jsonl")


# ----------------------------------------------------------------------------- rules that our own plots rarely need

AGAIN, SUMMARY = "{who}跑来了，{who}又走了，天黑了。", "{who}跑来跑去，最后累得睡着了，做了个梦。"


def small(folder, times=8, again=AGAIN, summary=SUMMARY):
    """Write a language of one plot with two stories, `again` said `times` times. -> arguments for the command"""
    (folder / "plots").mkdir()
    (folder / "lexicon.toml").write_text("""
[who]
pos = "noun"
names = "name"
form = "m word"
words = "只 小兔"
[running]
pos = "verb"
in_text = true
words = "睡着, 醒来"
[name]
words = "豆豆, 米米"
""", encoding="utf-8")
    (folder / "plots" / "a.toml").write_text(f"""# 醒来
name = "a"
central = "who"
slots = {{who = "who"}}
beat = [{{say = ["{again * times}"]}}]
ending = [{{name = "end", say = [["{{who.full}}睡着了。"]], summary = ["{summary}"]}}]
""", encoding="utf-8")
    return "--out", str(folder / "s.jsonl"), "--language", str(folder)


def test_a_sentence_said_twice_is_no_constraint_and_only_words_in_the_text_are_words(tmp_path):
    small(tmp_path)
    for record in generate.stories(2, seed=1, folder=tmp_path):
        assert re.fullmatch("小兔(豆豆|米米)睡着了。", record["sentence"])
        assert sorted(record["words"]) == ["小兔", "睡着"]


def test_a_small_language_says_when_it_is_exhausted(tmp_path, capsys):
    where = small(tmp_path)
    assert "only about 2 different stories" in failure(capsys, "--n", 3, *where)
    generate.main(["--n", "2", *where])


@pytest.mark.parametrize("change", [
    {"times": 4}, {"times": 28}, {"again": "小鸟飞来了，小鸟又飞走了，天黑了。"},
    {"summary": "{who}睡着了，做了个梦。"}, {"summary": SUMMARY * 4}, {"summary": AGAIN},
])
def test_a_plot_that_cannot_be_told_by_the_rules(tmp_path, capsys, change):
    line = failure(capsys, "--n", 1, *small(tmp_path, **change))
    assert "a.toml: ending 'end': 1000 tries" in line


def test_a_helper_who_is_named_is_named_three_times(tmp_path, capsys):
    where = small(tmp_path)
    path = tmp_path / "plots" / "a.toml"
    text = path.read_text(encoding="utf-8").replace('{who = "who"}', '{who = "who", pal = "pal"}')
    path.write_text(text.replace("{who.full}睡着了", "{who.full}睡着了，{pal}也睡着了"), encoding="utf-8")
    with open(tmp_path / "lexicon.toml", "a", encoding="utf-8") as file:
        file.write('[pal]\nnames = "name"\nwords = "小狗"\n')
    assert "1000 tries" in failure(capsys, "--n", 1, *where)
    path.write_text(text.replace("{who.full}睡着了", "{who.full}睡着了，" + "{pal}也睡着了，" * 3), encoding="utf-8")
    generate.load.cache_clear()  # the files are read once a process
    generate.main(["--n", "1", *where])


def test_held_out_word_pairs_occur_in_no_training_story():
    told = [record["text"] for record in generate.stories(5000, 1)]
    held_out = list(generate.stories(150, 99, held_out=True))  # some endings have no such pair: they are passed over
    for record in held_out:
        assert len(record["words"]) == 2 and all(word in record["text"] for word in record["words"])
        assert not [text for text in told if all(word in text for word in record["words"])]
    assert not {record["text"] for record in held_out} & set(told)
