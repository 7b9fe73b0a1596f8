"""augment.py: what people have in, clean and leak-free rows out."""
import gzip
import itertools
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import augment
import constraints
from constraints import KEYS, SENTENCE, SUMMARY, WORDS, parse, parse_record, permutations, render
from records import fold

STORY = "小狗点点在草地上捡到一把铲子。它问妈妈：“这是谁的铲子？”妈妈摇摇头。天空中飘着几朵白云。"
RECORD = {"词汇": ["铲子", "草地"], "特点": ["对话", "转折"], "摘要": "小狗的名字叫点点。",
          "随机句子": "天空中飘着几朵白云。"}


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def run(tmp_path, *argv, out="made"):
    """augment.main(argv) -> (train rows, val rows, report, rejected rows)"""
    augment.main([str(a) for a in (*argv, "--out", tmp_path / out, "--overwrite")])
    read = [[json.loads(line) for line in open(tmp_path / out / name, encoding="utf-8")]
            for name in ("train.jsonl", "val.jsonl", "rejected.jsonl")]
    return *read[:2], json.loads((tmp_path / out / "report.json").read_text(encoding="utf-8")), read[2]


def one_by_one(rows):
    return [(row["constraints"], row["output"]) for row in rows]


# ---- reading ----

FORMATS = {
    "cache": lambda: json.dumps({"17": render(RECORD) + f"\n故事：{STORY}"}, ensure_ascii=False, indent=1),
    "alpaca": lambda: json.dumps([{"instruction": render(RECORD), "input": "", "output": STORY}], ensure_ascii=False),
    "alpaca, input": lambda: json.dumps({"instruction": "请根据下面的要求写一个故事。", "input": render(RECORD),
                                         "output": STORY}, ensure_ascii=False),
    "instruct": lambda: f"Features: Dialogue, Twist\nWords: 铲子, 草地\nSummary: {RECORD[SUMMARY]}\n"
                        f"Random sentence: {RECORD[SENTENCE]}\nStory: \n\n{STORY}\n<|endoftext|>\n",
    "ours": lambda: json.dumps({"instruction": render(RECORD), "output": STORY, "constraints": RECORD,
                                "story_id": "a-1"}, ensure_ascii=False),
    "story": lambda: json.dumps({"text": STORY, "words": RECORD["词汇"], "features": ["Dialogue", "Twist"],
                                 "summary": RECORD[SUMMARY], "sentence": RECORD[SENTENCE]}, ensure_ascii=False),
    "chinese tinystories": lambda: json.dumps({
        "story": "A dog found a spade.", "story_zh": STORY, "summary": RECORD[SUMMARY], "source": "GPT-4",
        "sentence": RECORD[SENTENCE],
        "instruction": {"prompt:": "Write", "words": RECORD["词汇"], "features": ["Dialogue", "Twist"]}},
        ensure_ascii=False),
    "spelled otherwise": lambda: f"总结: {RECORD[SUMMARY]}\r\n\r\n故事： {STORY}\r\n关键词：铲子、草地\r\n"
                                 f"特征:有对话；反转\r\n随机句子：随机句子：{RECORD[SENTENCE]}\r\n<|endoftext|>",
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_record(tmp_path, name):
    path = tmp_path / "in"
    path.write_bytes(FORMATS[name]().encode())
    train, _, report, _ = run(tmp_path, path, "--permute", "1", "--val-fraction", "0")
    assert one_by_one(train) == [(RECORD, STORY)]
    assert parse(train[0]["instruction"])[0] == RECORD and train[0]["input"] == ""
    assert train[0]["story_id"] == ("a-1" if name == "ours" else train[0]["story_id"])
    assert report["leading sentences left out"] == ({"请根据下面的要求写一个故事。": 1} if "input" in name else {})


def test_english_words_and_summaries_of_a_chinese_story_are_left_out_and_counted(tmp_path):
    path = write(tmp_path / "in", [{"story": "A dog.", "story_zh": STORY, "summary": "A dog finds a spade.",
                                    "instruction": {"prompt:": "", "words": ["spade", "铲子"],
                                                    "features": ["Dialogue", "Funny"]}}])
    train, _, report, _ = run(tmp_path, path, "--permute", "1", "--val-fraction", "0")
    assert train[0]["constraints"] == {"词汇": ["铲子"], "特点": ["对话"]}
    assert report["changed"] == {"left out: unknown feature Funny": 1, "left out: word of another language": 1,
                                 "left out: summary of another language": 1}


def test_what_stands_behind_the_story_is_cut_from_it_and_counts():
    text = "请写。\n词汇：猫\n故事：猫来了。\n\n它笑了。\n总结：猫来了，\n又走了。\n词汇：笑"
    constraints, preamble, story = parse_record(text)
    assert constraints == {"词汇": ["猫", "笑"], "摘要": "猫来了，又走了。"}
    assert preamble == "请写。" and story == "猫来了。\n\n它笑了。"


words = st.text("铲子草地小狗名字单词主题总结故事词汇点abc", min_size=1, max_size=4)
letters = "铲子草地名字单词主题总结故事词汇特点：:，。！“” abc"
sentences = st.text(letters, min_size=1, max_size=30).map(str.strip).filter(
    lambda s: s and constraints.sections(s, (*KEYS, constraints.STORY)) == [(None, [s])])


@st.composite
def records(draw):
    values = {"词汇": st.lists(words, min_size=1, max_size=4, unique=True),
              "特点": st.lists(st.sampled_from(constraints.FEATURES), min_size=1, max_size=6, unique=True),
              "摘要": sentences, "随机句子": sentences}
    keys = draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=4, unique=True))
    return {key: draw(values[key]) for key in keys}


@settings(max_examples=150, deadline=None)
@given(records(), sentences)
def test_parse_undoes_render_in_every_order(record, story):
    for order in permutations(record):
        for text in (render(order) + f"\n故事：{story}", f"故事：{story}\n" + render(order)):
            assert parse_record(text) == (order, "", story)
            assert list(parse_record(text)[0]) == list(order)


# ---- split ----

def numbered(n, seed=0):
    """n stories, no two alike, as records with one to four constraints."""
    rng = random.Random(seed)
    letters = [chr(c) for c in range(0x4e00, 0x4e00 + 2000)]
    rows = []
    for i in range(n):
        text = "。".join("".join(rng.choices(letters, k=12)) for _ in range(8)) + "。"
        record = {"词汇": [text[:2]], "特点": ["转折"], "摘要": text[3:9], "随机句子": text[13:26]}
        combination = list(itertools.chain.from_iterable(itertools.combinations(KEYS, k) for k in (1, 2, 3, 4)))[i % 15]
        rows.append({"instruction": render({key: record[key] for key in combination}), "input": "", "output": text})
    return rows


def test_no_validation_story_has_a_sibling_or_a_near_duplicate_in_training(tmp_path):
    rows = numbered(300)
    rng = random.Random(1)
    planted = []
    for row in rows[:150]:
        planted.append(row | {"instruction": "特点：伏笔"})  # a sibling
        planted.append(row | {"instruction": "特点：伏笔", "output": " " + row["output"].replace("。", "！ ")})
        text = row["output"]
        planted.append(row | {"output": text[:50] + "好" + text[51:]})  # 8 of 89 shingles differ: Jaccard 0.83
        planted.append(row | {"output": text[:20] + "好" + text[21:60] + "好" + text[61:]})  # Jaccard 0.70
    everything = rows + planted
    rng.shuffle(everything)
    write(tmp_path / "in", everything)
    train, val, report, _ = run(tmp_path, tmp_path / "in", "--val-fraction", "0.2", "--permute", "1")
    assert len(train) + len(val) == len(everything) and 100 < len(val) < 300

    def shingles(row):
        text = fold(row["output"])
        return {text[i:i + 8] for i in range(len(text) - 7)}

    of_train = [shingles(row) for row in train]
    nearest = max(len(s & t) / len(s | t) for row in val for s in [shingles(row)] for t in of_train)
    assert 0.6 < nearest < 0.8  # the ones that are not near enough may fall apart
    assert report["split"]["records_with_a_near_duplicate"] >= 600

    exact, val_of_exact, report, _ = run(tmp_path, tmp_path / "in", "--val-fraction", "0.2", "--exact")
    assert not {fold(r["output"]) for r in exact} & {fold(r["output"]) for r in val_of_exact}
    assert max(len(s & t) / len(s | t) for row in val_of_exact for s in [shingles(row)]
               for t in map(shingles, exact)) > 0.8
    assert "not looked for: --exact" == report["split"]["near_duplicates"]


def test_a_story_falls_on_the_same_side_whatever_the_order_and_the_company(tmp_path):
    rows = numbered(300)
    write(tmp_path / "a", rows)
    write(tmp_path / "b", reversed(rows))
    write(tmp_path / "c", rows[::3])
    val = {name: {row["output"] for row in run(tmp_path, tmp_path / name, "--val-fraction", "0.1", "--seed", seed)[1]}
           for name, seed in (("a", 1), ("b", 2), ("c", 3))}
    assert val["a"] == val["b"] and val["c"] == val["a"] & {row["output"] for row in rows[::3]}
    from records import split_by_story
    assert val["a"] == {row["output"] for row in split_by_story(rows, 0.1, story=lambda row: row["output"])[1]}


def test_large_clusters_are_not_drawn_to_one_side():
    rng = np.random.default_rng(0)
    hashes = rng.integers(1 << 63, size=20000, dtype=np.uint64) * np.uint64(2)
    clusters = np.arange(20000) // 20
    val = augment.validation(hashes, clusters, 0.1)
    assert 0.07 < val.mean() < 0.13 and (val.reshape(-1, 20).std(1) == 0).all()


# ---- rows ----

def test_all_orders_of_the_15_combinations_are_64_rows(tmp_path):
    write(tmp_path / "in", numbered(150))
    train, _, report, _ = run(tmp_path, tmp_path / "in", "--val-fraction", "0")
    assert report["rows"]["before"] == 150 and report["rows"]["after"] == len(train) == 640
    assert report["rows"]["per_record"] == round(64 / 15, 3)
    assert round(13_000 * 64 / 15) == 55_467  # what the study's 13,000 would give, if they were balanced
    assert report["rows_by_number_of_constraints"] == {"1": 40, "2": 120, "3": 240, "4": 240}
    assert report["rows_by_kind"]["词汇"] == sum("词汇" in row["constraints"] for row in train)
    assert len({row["instruction"] + row["output"] for row in train}) == 640
    by_story = {}
    for row in train:
        by_story.setdefault(row["output"], set()).add(frozenset(row["instruction"].split("\n")))
    assert all(len(sets) == 1 for sets in by_story.values())  # an order changes neither story nor constraints


def counts(rows):
    stories = [row["story_id"] for row in rows]
    return {n: sorted({stories.count(row["story_id"]) for row in rows if len(row["constraints"]) == n})
            for n in (1, 2, 3, 4)}


@pytest.mark.parametrize("flags, expected", [
    (["--permute", "1"], {1: [1], 2: [1], 3: [1], 4: [1]}),
    (["--permute", "3"], {1: [1], 2: [2], 3: [3], 4: [3]}),
    (["--permute", "all"], {1: [1], 2: [2], 3: [6], 4: [24]}),
])
def test_how_often_a_story_is_seen(tmp_path, flags, expected):
    rows = numbered(60)
    write(tmp_path / "in", rows)
    train, _, report, _ = run(tmp_path, tmp_path / "in", "--val-fraction", "0", *flags)
    assert counts(train) == expected
    distinct = len({(row["instruction"], row["output"]) for row in train})
    assert distinct == len(train)
    if "1" in flags:
        assert [row["instruction"] for row in train] == [row["instruction"] for row in rows]  # as it was
    else:
        assert len({tuple(row["constraints"]) for row in train if len(row["constraints"]) == 4}) > 4


def test_same_seed_same_bytes(tmp_path):
    write(tmp_path / "in", numbered(1200))

    def made(out, *flags):
        run(tmp_path, tmp_path / "in", "--permute", "2", "--extract", "sentence", *flags, out=out)
        return [(tmp_path / out / name).read_bytes() for name in ("train.jsonl", "val.jsonl")]

    one = made("one")
    assert made("two") == one != made("three", "--seed", "2")


# ---- cleaning ----

LONG = "小狗在院子里玩了一整天，跑得满头大汗。" + STORY


@pytest.mark.parametrize("check, story, mended, counted", [
    ("residue", LONG + "\n总结一下：小狗很好。", LONG, "residue"),
    ("residue", LONG + "小结：小狗很好。", LONG, "residue"),
    ("residue", LONG + "故事结束。", LONG, "residue"),
    ("residue", LONG + "\n（完）", LONG, "residue"),
    ("residue", LONG + "老师总结：小狗很好。比赛结束了。", LONG + "老师总结：小狗很好。比赛结束了。", None),
    ("cut", LONG + "后来，小狗又", LONG, "cut"),
    ("cut", "小狗在院子里玩了一整天", None, "cut"),
    ("cut", STORY + "小狗" * 60, None, "too little"),
    ("repeats", LONG + "它笑了。小狗走了回去。小狗走了回去。", LONG + "它笑了。小狗走了回去。", "twice"),
    ("repeats", ("小狗走了回去。它不说话。" * 5) + LONG, None, "more than three"),
    ("english", LONG + "小狗very开心。", None, "English"),
    ("english", LONG + "小狗看DVD，叫Ａ。", LONG + "小狗看DVD，叫Ａ。", None),
])
def test_cleaning_mends_or_drops_and_counts(tmp_path, check, story, mended, counted):
    other = {"instruction": "特点：转折", "output": "另一个故事很好。"}
    write(tmp_path / "in", [{"instruction": "特点：转折", "output": story}, other])
    clean = run(tmp_path, tmp_path / "in", "--clean", "--val-fraction", "0")
    assert [row["output"] for row in clean[0]] == [s for s in (mended, other["output"]) if s]
    said = [*clean[2]["changed"], *clean[2]["rejected"]]
    assert (counted in said[0] and len(said) == 1) if counted else not said
    assert len(clean[3]) == (mended is None) and all(row["row"] == 1 for row in clean[3])
    if counted and counted != "too little":
        kept = run(tmp_path, tmp_path / "in", "--clean", "--keep", f"{check},cut", "--val-fraction", "0")
        assert kept[0][0]["output"] == story and not kept[2]["changed"] and not kept[3]
    assert run(tmp_path, tmp_path / "in", "--val-fraction", "0")[0][0]["output"] == story


def test_labels_that_do_not_hold(tmp_path, capsys):
    rows = [{"instruction": "词汇：铲子，月亮\n随机句子：月亮出来了。\n特点：转折", "output": STORY},
            {"instruction": "特点：对话", "output": "谁也没有说话。"},
            {"instruction": "随机句子：天空中飘着几朵白云！", "output": STORY}]
    write(tmp_path / "in", rows)
    train, _, report, rejected = run(tmp_path, tmp_path / "in", "--clean", "--val-fraction", "0", "--permute", "1")
    assert [row["constraints"] for row in train] == [{"词汇": ["铲子"], "特点": ["转折"]},
                                                     {"随机句子": "天空中飘着几朵白云！"}]
    assert report["changed"] == {f"left out: {key} that is not in the story": 1 for key in ("词汇", "随机句子")}
    assert "\nleft out: 词汇 that is not in the story: 1\n" in capsys.readouterr().out
    assert [(row["row"], row["reason"]) for row in rejected] == [
        (2, "no constraints (left out: 特点 that is not in the story)")]
    kept = run(tmp_path, tmp_path / "in", "--clean", "--keep", "labels", "--val-fraction", "0", "--permute", "1")
    assert [row["instruction"] for row in kept[0]] == [row["instruction"] for row in rows]


# ---- constraints from plain stories ----

def test_constraints_of_plain_stories_hold(tmp_path, real_data):
    kinds = "words,sentence,features"
    train, val, report, rejected = run(tmp_path, real_data / "real_stories_zh.jsonl", "--extract", kinds,
                                       "--permute", "1")
    assert len(train) + len(val) + len(rejected) == 3196 and len(rejected) < 30
    for row in train:
        met = constraints.check(row["output"], row["constraints"])
        assert all(all(m.values()) if isinstance(m, dict) else m for m in met.values()), row
        assert 2 <= len(row["constraints"].get(WORDS, "二三")) <= 3
        assert row["constraints"].get(SENTENCE, "") in row["output"]
    by_number = report["rows_by_number_of_constraints"]
    assert set(by_number) == {"1", "2", "3"} and min(by_number.values()) > 200
    with pytest.raises(SystemExit):
        run(tmp_path, real_data / "real_stories_zh.jsonl")  # without --extract there is nothing to ask for


def test_extraction_adds_only_what_a_record_lacks(tmp_path):
    rows = [{"instruction": "词汇：铲子", "output": LONG.replace("一整天", f"{i}天")} for i in range(40)]
    write(tmp_path / "in", rows)
    train, *_ = run(tmp_path, tmp_path / "in", "--extract", "words,sentence", "--val-fraction", "0", "--permute", "1")
    assert all(row["constraints"]["词汇"] == ["铲子"] for row in train)
    assert 5 < sum("随机句子" in row["constraints"] for row in train) < 35


# ---- bad input ----

GOOD = json.dumps({"instruction": "词汇：铲子", "output": STORY}, ensure_ascii=False)


def malformed(rng):
    """A row that cannot be used, as bytes without a newline."""
    good = GOOD.encode()
    wrong = rng.choice([
        {"instruction": "词汇：铲子", "output": None}, {"instruction": 3, "output": STORY}, {"output": STORY}, {}, [],
        {"instruction": "词汇：铲子", "output": ""}, {"instruction": "词汇：铲子", "output": " \n"}, 17, "", None,
        {"instruction": "写一个故事", "output": STORY}, {"instruction": "词汇：", "output": STORY}, {"text": ["a"]},
        {"constraints": [], "output": STORY}, {"constraints": {"词汇": 3}, "output": STORY},
        {"constraints": {"词汇": [None]}, "output": STORY}, {"instruction": {"words": 7}, "story_zh": STORY},
        {"instruction": "特点：幽默", "output": STORY}, {"story_zh": STORY}, {"text": STORY, "words": [[]]},
    ])
    return rng.choice([
        lambda: good[:rng.randrange(1, len(good) - 1)],  # cut, perhaps within a character
        lambda: json.dumps(wrong, ensure_ascii=False).encode(),
        lambda: b'{"instruction": "\\ud83d", "output": "\\udc00"}',
        lambda: GOOD.encode("gb18030"),
        lambda: GOOD.encode("utf-16-le"),
        lambda: b"\xef\xbb\xbf" * 3 + b"{",
        lambda: b'{"output": "' + b"x" * (10 << 20 if rng.random() < 0.02 else 1000),
        lambda: b"[" * rng.randrange(1, 100_000),
        lambda: b'{"output": ' + b"9" * 5000 + b"}",
        lambda: b"\x00\xff\xfe",
        lambda: "词汇：铲子 故事：".encode(),
    ])()


def test_300_malformed_records_lose_no_good_one(tmp_path):
    rng = random.Random(7)
    lines, good = [], set()
    for i in range(600):
        bad = i % 2 and malformed(rng).replace(b"\n", b"")
        lines.append(bad or GOOD.replace("小狗", f"{i}小狗", 1).encode())
        if not bad:
            good.add(STORY.replace("小狗", f"{i}小狗", 1))
    (tmp_path / "in").write_bytes(b"\n".join(lines))
    train, val, report, rejected = run(tmp_path, tmp_path / "in", "--exact")
    assert {row["output"] for row in train + val} == good and len(good) >= 300
    assert [row["row"] for row in rejected] == [i + 1 for i in range(600) if i % 2 and len(lines[i].strip())]
    assert sum(report["rejected"].values()) == len(rejected) and all(row["reason"] for row in rejected)


@pytest.mark.parametrize("name, content, more", [
    ("a.csv", f"prompt,completion\n词汇：铲子,{STORY}\n", []),
    ("a.jsonl", json.dumps({"messages": [{"role": "user", "content": "词汇：铲子"},
                                         {"role": "assistant", "content": STORY}]}), []),
    ("a.txt", f"{STORY}\n\n{STORY[::-1]}\n", ["--extract", "words"]),
    ("a.json", json.dumps([STORY, STORY[::-1]]), ["--extract", "words"]),
    ("a.jsonl", json.dumps(STORY), ["--extract", "words"]),
    ("a.txt", f"词汇：铲子\n故事：{STORY}<|endoftext|>", []),
    ("a.jsonl", "\n" + json.dumps({"instruction": "词汇：铲子", "output": STORY + "<|endoftext|>"})
     + "\n" + json.dumps({"instruction": "词汇：铲子", "output": STORY}), [])])
@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "utf-16"])
def test_other_peoples_formats(tmp_path, name, content, more, encoding):
    (tmp_path / name).write_bytes(content.encode(encoding))
    augment.main([str(tmp_path / name), "--out", str(tmp_path / "out"), "--encoding", encoding, "--val-fraction", "0",
                  *more])
    rows = [json.loads(line) for line in open(tmp_path / "out" / "train.jsonl", encoding="utf-8")]
    assert STORY in {row["output"] for row in rows}


@pytest.mark.parametrize("content, words", [
    (f"{GOOD}\n{GOOD}".encode("gb18030"), ["row 1 is not UTF-8"]),
    (f"词汇：铲子\n故事：{STORY}<|endoftext|>".encode("gb18030"), ["row 1 is not UTF-8"]),
    (f"{GOOD}\n{GOOD}".encode("utf-16"), ["row 1 is not UTF-8"]),
    (f"[{GOOD}, {GOOD[:-9]}]".encode(), ["not JSON"]),  # one broken list is one error
    (f"[{GOOD}]\n[{GOOD}]".encode(), ["follows the end of the list"]),
    (b'{"data": [' + GOOD.encode() + b"]}", ["a list of records is wanted"]),
    (b'{"prompt": "x", "answers": "y"}\n' * 2, ["row 1 has no 'output'"]),
    (f"instruction,output\n词汇：铲子\n{STORY}\n".encode(), ["row 1 has not as many cells"]),
    (f"instruction,output\n词汇：铲子,{STORY}\n".encode("gb18030"), ["is not UTF-8"]),
    (gzip.compress(GOOD.encode()), ["is gzip-compressed"]),
    (b"PK\x03\x04\n{", ["is a zip file"]),
    (b"\n", ["no rows"]),
])
def test_files_that_will_not_do(tmp_path, refused, content, words):
    path = tmp_path / "in"
    path.write_bytes(content)
    refused(augment.main, [path, "--out", tmp_path / "x"], path, *words)
    assert list(tmp_path.iterdir()) == [path]


def test_null_is_absence(tmp_path):
    rows = [{"instruction": "词汇：铲子", "input": None, "output": STORY, "constraints": None, "story_id": None},
            {"text": STORY, "words": None, "features": ["Dialogue"], "summary": float("nan"), "sentence": None},
            {"story_zh": STORY, "text": None, "instruction": {"words": ["铲子"], "features": None}},
            {"output": STORY, "constraints": {"词汇": ["铲子"], "摘要": None}}]
    train, _, report, rejected = run(tmp_path, write(tmp_path / "in", rows), "--val-fraction", "0", "--permute", "1")
    assert [row["constraints"] for row in train] == [{"词汇": ["铲子"]}, {"特点": ["对话"]}, *[{"词汇": ["铲子"]}] * 2]
    assert not rejected and not report["changed"] and len({row["story_id"] for row in train}) == 1


def test_mistakes_are_one_line_and_leave_what_is_there(tmp_path, refused):
    path = write(tmp_path / "in", numbered(20))
    out = tmp_path / "out"
    augment.main([str(path), "--out", str(out)])
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert set(before) == {"train.jsonl", "val.jsonl", "rejected.jsonl", "report.json"}
    refused(augment.main, [path, "--out", out], "--overwrite")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    refused(augment.main, [path, "--out", tmp_path / "mine", "--overwrite"], "mine", "is not replaced")
    refused(augment.main, [path, "--out", path / "x"], "cannot write to", path)
    refused(augment.main, [tmp_path / "missing", "--out", out, "--overwrite"], "missing")
    for flag, value in (("--permute", "0"), ("--permute", "some"), ("--keep", "all"), ("--extract", "summary"),
                        ("--val-fraction", "1")):
        refused(augment.main, [path, "--out", out, "--overwrite", flag, value], flag)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out", "mine"}


def test_out_is_never_half_made(tmp_path, refused, monkeypatch):
    path = write(tmp_path / "in", numbered(20))
    out = tmp_path / "out"
    augment.main([str(path), "--out", str(out)])
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full(*args):
        raise OSError("no space left on device")
    monkeypatch.setattr("common.write_json", full)
    for name in ("out", "new"):
        refused(augment.main, [path, "--out", tmp_path / name, "--overwrite"], "no space left")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out"}
