import json
import random

import pytest

from records import RowError, read_instructions, read_records, read_stories, scan, split_by_story


def test_a_story_falls_on_one_side_with_all_its_rows():
    rng = random.Random(0)
    items = [(f"指令{k}", f"故事{n}，很长。") for n in range(400) for k in range(3)]
    items += [("变体", f" 故事{n}， 很长！") for n in range(400)]  # the same story, punctuated otherwise
    train, val = split_by_story(items, 0.1, story=lambda item: item[1])
    assert len(train) + len(val) == 1600 and 80 < len(val) < 260

    def numbers(side):
        return {"".join(c for c in item[1] if c.isdigit()) for item in side}

    assert not numbers(train) & numbers(val)
    rng.shuffle(items)
    assert set(split_by_story(items[:500], 0.1, story=lambda item: item[1])[1]) <= set(val)  # whatever else is there
    assert len(split_by_story(items[:5], 0.001, story=lambda item: item[1])[1]) >= 1
    assert split_by_story(items, 0, story=lambda item: item[1])[1] == []
    with pytest.raises(ValueError, match="val-fraction"):
        split_by_story([("a", "同一个故事")] * 5, 0.5, story=lambda item: item[1])


GOOD = '{"instruction": "词汇：猫", "output": "猫来了。"}'


@pytest.mark.parametrize("content, words", [
    ("", ["no rows"]),
    ("\n \n", ["no rows"]),
    (GOOD + "\n{broken\n", ["row 2", "not JSON"]),
    (GOOD + '\n\n{"instruction": "词汇：猫"}', ["row 3", "'output'"]),
    (GOOD + '\n{"instruction": "词汇：猫", "output": " "}', ["row 2", "'output'", "empty"]),
    (GOOD + '\n{"instruction": "词汇：猫", "output": null}', ["row 2", "'output'", "NoneType"]),
    (GOOD + '\n{"instruction": ["猫"], "output": "猫"}', ["row 2", "'instruction'", "list"]),
    (GOOD + "\n[1]", ["row 2", "list"]),
    (GOOD + '\n{"instruction": "", "output": "\\ud83d"}', ["row 2", "surrogate"]),
    ("[" + GOOD + ', {"instruction": "猫"}]', ["row 2", "'output'"]),
    ("[" + GOOD + ",", ["not JSON"]),
    ("[]", ["no rows"]),
])
def test_bad_rows_are_named(tmp_path, content, words):
    path = tmp_path / "rows.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError) as e:
        read_instructions(path)
    assert all(word in str(e.value) for word in (*words, str(path))) and "\n" not in str(e.value)


def test_files_as_people_have_them(tmp_path):
    path = tmp_path / "rows"
    path.write_bytes("\ufeff".encode() + GOOD.encode() + b"\r\n")  # a byte order mark, Windows line ends
    assert read_instructions(path) == [("词汇：猫", "猫来了。")]
    path.write_text(f" \n[{GOOD}]", encoding="utf-8")
    assert read_instructions(path) == [("词汇：猫", "猫来了。")]
    path.write_text('{"instruction": "写一个故事", "input": "词汇：猫", "output": "猫来了。"}', encoding="utf-8")
    assert read_instructions(path) == [("写一个故事\n词汇：猫", "猫来了。")]
    path.write_text('{"story_zh": "猫来了。", "story": "A cat."}\n{"text": "狗来了。"}', encoding="utf-8")
    assert read_stories(path) == ["猫来了。", "狗来了。"]
    path.write_bytes(b'{"text": "cat"}\n' * 1000 + b'{"text": "' + "小狗".encode("gbk") + b'"}')
    with pytest.raises(ValueError, match="row 1001 is not UTF-8 .byte 16012 "):
        list(read_records(path))


def test_real_instructions(real_data):
    pairs = read_instructions(real_data / "real_instructions_zh.json")
    assert len(pairs) == 3185
    train, val = split_by_story(pairs, 0.05, story=lambda pair: pair[1])
    assert not {p[1] for p in train} & {p[1] for p in val} and 100 < len(val) < 220
    assert len(json.dumps(train)) > 0


@pytest.fixture(params=[(1 << 20, 1 << 20), (64, 7)])  # whole files at once; seven bytes at a time
def piece(request, monkeypatch):
    monkeypatch.setattr("records.HEAD", request.param[0])
    monkeypatch.setattr("records.PIECE", request.param[1])


BROKEN = '{"instruction": "词汇：狗" "output": "狗来了。"}'


@pytest.mark.parametrize("content, good", [
    (f"{GOOD}\n{BROKEN}\n\n{GOOD}", {1, 4}),
    (f"[{GOOD}, {BROKEN}, {GOOD}]", {1, 3}),
    (f"[\n{GOOD},\n{GOOD[:30]}\n{GOOD}\n]", {1, 3}),
    (f"[{GOOD}, 3, {GOOD}, {{", {1, 2, 3}),
    (f"[{GOOD}, {GOOD}", {1, 2}),
    (f"{GOOD[:-9]}\n{GOOD}\n{GOOD}", {2, 3}),
    ('{"17": "故事：猫来了。", "18": "故事：狗来了。"}', {1, 2}),
    ('{"17": "故事：猫来了。"}\n{"18": "故事：狗来了。"}', {1, 2}),
    ('{"17": "故事：猫来了。",\n"18": 狗来了。",\n"19": {"text": "鸡来了。"}}', {1, 3}),
    ('{"17"\n' + GOOD, {2}),
])
def test_reading_goes_on_behind_a_broken_row(tmp_path, piece, content, good):
    path = tmp_path / "rows"
    path.write_text(content, encoding="utf-8")
    rows = list(scan(path))
    assert {row for row, record in rows if not isinstance(record, RowError)} == good
    for row, record in rows:
        assert not isinstance(record, RowError) or f"row {row} " in str(record)


def test_bytes_that_are_no_utf8_spoil_their_own_row_only(tmp_path, piece):
    path = tmp_path / "rows"
    gbk = GOOD.encode("gb18030")
    for before, between, after in ((b"", b"\n", b""), (b"[", b",\n", b"]")):
        path.write_bytes(before + GOOD.encode() + between + gbk + between + GOOD.encode() + after)
        (_, first), (_, bad), (_, third) = scan(path)
        assert first == third and isinstance(bad, RowError)
        at = int(str(bad).split("(byte ")[1].split()[0])
        content = path.read_bytes()
        with pytest.raises(UnicodeDecodeError) as e:
            content.decode()
        assert at == e.value.start and "gb18030" in str(bad)
    path.write_bytes(GOOD.encode("utf-16"))
    with pytest.raises(ValueError, match="UTF-16"):
        list(scan(path))


def test_a_row_without_an_end_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("records.HEAD", 64)
    monkeypatch.setattr("records.PIECE", 64)
    monkeypatch.setattr("records.LONGEST", 1000)
    path = tmp_path / "rows"
    path.write_text(GOOD + "\n" + "x" * 5000 + "\n" + GOOD, encoding="utf-8")
    rows = dict(scan(path))
    assert rows[1] == rows[3] and "row 2 is longer" in str(rows[2])
