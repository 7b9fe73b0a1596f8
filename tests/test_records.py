import json
import random

import pytest

from records import (
    RowError,
    instruction_of,
    place,
    read_blocks,
    read_instructions,
    read_records,
    read_stories,
    scan,
    split_by_story,
    story_hash,
)


def test_hash_and_split_are_the_ones_they_always_were():
    """Literal values: another hash would let stories that old runs trained on into validation."""
    assert story_hash("小猫来了。") == story_hash("小猫，来了！ ") == 0xbad86acf2599bc3a
    assert story_hash(" Ａ cat, sat.") == 0x442fec369959c324 and story_hash("") == 0xe3b0c44298fc1c14
    assert place("小猫来了。") == 0.729864764759987
    items = [f"故事{n}。" for n in range(60)]
    train, val = split_by_story(items, 0.1)
    assert [items.index(text) for text in val] == [15, 19, 23, 36, 52, 57]
    assert train == [text for text in items if text not in val]


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
    ("[]", ["no rows"]),
    (GOOD + "\n{broken\n", ["row 2", "not JSON"]),
    (GOOD + '\n\n{"instruction": "词汇：猫"}', ["row 3", "'output'"]),
    (GOOD + '\n{"instruction": "词汇：猫", "output": " "}', ["row 2", "'output'", "empty"]),
    (GOOD + '\n{"instruction": "词汇：猫", "output": null}', ["row 2", "no 'output'"]),
    (GOOD + '\n{"instruction": ["猫"], "output": "猫"}', ["row 2", "'instruction'", "list"]),
    (GOOD + "\n[1]", ["row 2", "list"]), (GOOD + '\n"猫"', ["row 2 has no 'instruction'"]),
    (GOOD + '\n{"instruction": "词汇：猫", "output": "\\ud83d"}', ["row 2", "surrogate"]),
    ("[" + GOOD + ', {"instruction": "猫"}]', ["row 2", "'output'"]),
    # other people's formats
    ('{"Prompt": "词汇：小猫", "completion": "猫来了。"}', ["row 1 has no 'instruction'"]),
    ('{"messages": [{"role": "user", "content": "词汇：猫"}]}', ["row 1 has no 'output'"]),
    ('{"messages": ["词汇：猫", "猫来了。"]}', ["row 1 has 'messages' that are no turns"]),
    (json.dumps({"conversations": [{"from": who, "value": "猫"} for who in ("human", "gpt", "human", "gpt")]}),
     ["row 1 has the turns human, gpt, human, gpt; one"]),
    ('{"messages": [{"role": "tool", "content": "x"}]}', ["row 1 has the turns tool"]),
    ('{"messages": [{"role": ["user"], "content": "x"}]}', ["row 1 has the turns ['user']"]),
    ('{"title": "猫", "content": "猫来了。"}', ["row 1 has no 'instruction'"]),
    (GOOD + '\n{"instruction": " ", "output": "猫来了。"}', ["row 2", "'instruction' is empty"]),
    (GOOD + '\n{"instruction": null, "input": null, "output": "猫来了。"}', ["row 2 has no 'instruction'"]),
    (GOOD + '\n{"input": "", "output": "猫来了。"}', ["row 2", "'input' is empty"]),
    # a list or an object is one thing
    ("[" + GOOD + ",", ["not JSON"]),
    (f"[{GOOD} {GOOD}]", ["not JSON"]),
    (f"[{GOOD}]\n[{GOOD}]", ["follows the end of the list", "line 2"]),
    (f"[{GOOD}] [{GOOD}]", ["follows the end of the list"]),
    (f"[{GOOD}]\n{GOOD}", ["follows the end of the list"]),
    (f'{{\n"17": {GOOD}\n}}\n{{\n"18": {GOOD}\n}}', ["follows the end of the list or object"]),
    ('{"data": [' + GOOD + "]}", ["a list of records is wanted"]),
    ('{\n"version": 1,\n"data": [\n' + GOOD + "\n]}", ["a list of records is wanted"]),
    ("[" * 100_000, ["not JSON"]),
    # other formats
    ("instruction,output\n词汇：猫,猫来了。\n词汇：猫，狗\n", ["row 2 has not as many cells"]),
    ("instruction,output\n词汇：猫,猫来了,坐下。\n", ["row 1 has not as many cells"]),
    ('instruction,output\n词汇：猫,"猫来了。', ["row 1 is not CSV"]),
    ('instruction,output\n词汇：猫,\n', ["row 1 has no 'output'"]),
    ("instruction,output\n", ["no rows"]),
    (b"instruction,output\n" + "词汇：猫,猫".encode("gb18030"), ["is not UTF-8"]),
    (b"\x1f\x8b\x08\0\0", ["is gzip-compressed; JSONL"]),
    (b"PK\x03\x04\x14\0", ["is a zip file", "xlsx"]),
    # other encodings
    (GOOD.encode() + b"\n" + GOOD.encode("gb18030"), ["row 2 is not UTF-8"]),
    (b"[" + GOOD.encode("gb18030") + b"]", ["is not UTF-8"]),
    ((GOOD + "\n" + GOOD).encode("utf-16"), ["is not UTF-8"]),
])
def test_what_is_wrong_is_named(tmp_path, content, words):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as e:
        read_instructions(path)
    assert all(word in str(e.value) for word in (*words, str(path))) and "\n" not in str(e.value)


def test_stories_without_their_field(tmp_path):
    (tmp_path / "rows.jsonl").write_text('[{"title": "猫", "text": null}]', encoding="utf-8")
    with pytest.raises(ValueError, match="row 1 has no 'text'"):
        read_stories(tmp_path / "rows.jsonl")
    (tmp_path / "rows.CSV").write_text("指令,输出\n词汇：猫,猫来了。\n", encoding="utf-8")
    with pytest.raises(ValueError, match="row 1 has no 'instruction'"):
        read_instructions(tmp_path / "rows.CSV")


PAIR = [("词汇：猫", "“猫，\n来了。”")]


@pytest.mark.parametrize("name, content", [
    ("a.jsonl", '{"prompt": "词汇：猫", "completion": "“猫，\\n来了。”"}'),
    ("a.json", '[{"question": "词汇：猫", "answer": "“猫，\\n来了。”"}]'),
    ("a.jsonl", '{"query": "词汇：猫", "response": "“猫，\\n来了。”"}'),
    ("a.jsonl", json.dumps({"messages": [
        {"role": "system", "content": "写故事。"}, {"role": "user", "content": "词汇：猫"},
        {"role": "assistant", "content": PAIR[0][1]}]}, ensure_ascii=False)),
    ("a.jsonl", json.dumps({"conversations": [{"from": "human", "value": "词汇：猫"},
                                              {"from": "gpt", "value": PAIR[0][1]}]}, ensure_ascii=False)),
    ("a.jsonl", json.dumps({"conversations": [{"role": "user", "content": "词汇：猫"},
                                              {"role": "assistant", "content": PAIR[0][1]}]}, ensure_ascii=False)),
    ("a.csv", 'instruction,input,output\r\n词汇：猫,,"“猫，\n来了。”"\r\n'),
    ("a.csv", '\ufeffprompt;completion\n词汇：猫;"“猫，\n来了。”"\n'),
    ("a.tsv", 'instruction\toutput\n词汇：猫\t"“猫，\n来了。”"\n'),
    ("a", 'id,instruction,output\n1,词汇：猫,"“猫，\n来了。”"\n')])
@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_pairs_in_other_peoples_formats(tmp_path, name, content, encoding):
    path = tmp_path / name
    path.write_bytes((content if encoding == "utf-8" else content.removeprefix("\ufeff")).encode(encoding))
    assert read_instructions(path, encoding) == PAIR


@pytest.mark.parametrize("first", ["[序]", "{第一章}", "[1] 开头"])
def test_a_text_file_may_begin_with_a_bracket(tmp_path, first):
    (tmp_path / "a.txt").write_text(f"{first}\n猫来了。\n", encoding="utf-8")
    assert read_stories(tmp_path / "a.txt") == [first, "猫来了。"]
    (tmp_path / "a.txt").write_text('[\n"猫来了。"]', encoding="utf-8")
    assert read_stories(tmp_path / "a.txt") == ["猫来了。"]


def test_the_stories_of_pairs_are_stories_too(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "词汇：猫", "completion": "猫来了。"}', encoding="utf-8")
    assert read_stories(tmp_path / "a.jsonl") == ["猫来了。"]


@pytest.mark.parametrize("name, content, said", [
    ("a.txt", "\n猫来了。\n它饿了。\n\n \n狗来了。\n", "2 stories, separated by blank lines"),
    ("a.TXT", "猫来了。\r\n狗来了。\r\n", "2 stories, one a line"),
    ("a.txt", "\n猫来了。\n狗来了。\n\n", "2 stories, one a line"),
    ("a.json", '["猫来了。\\n它饿了。", "狗来了。"]', ""), ("a.jsonl", '"猫来了。"\n"狗来了。"', ""),
    ("a.jsonl", '{"content": "猫来了。"}\n{"title": "", "content": "狗来了。"}', ""),
    ("a.csv", "text\n猫来了。\n狗来了。\n", ""),
    ("a.tsv", "title\tcontent\n甲\t猫来了。\n乙\t狗来了。\n", "'title' is not read")])
def test_stories_in_other_peoples_formats(tmp_path, name, content, said, capsys):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert [text.split("\n")[0] for text in read_stories(tmp_path / name)] == ["猫来了。", "狗来了。"]
    heard = "".join(capsys.readouterr())
    assert said in heard and heard.count("\n") <= 1
    (tmp_path / name).write_bytes(content.encode("gb18030"))
    assert len(read_stories(tmp_path / name, "gb18030")) == 2
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_stories(tmp_path / name)


def test_what_holds_content_and_is_not_read_is_named_once(tmp_path, capsys):
    row = {"instruction": "词汇：猫", "output": "猫来了。", "system": "写故事。", "history": [["词汇：狗", "狗。"]]}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 3 + json.dumps(row | {"system": ""}))
    assert len(read_instructions(tmp_path / "rows.jsonl")) == 4
    assert capsys.readouterr().err.splitlines() == [
        f"notice: {tmp_path / 'rows.jsonl'}: {name!r} is not read (row 1)" for name in ("system", "history")]


def test_files_as_people_have_them(tmp_path):
    path = tmp_path / "rows"
    path.write_bytes("\ufeff".encode() + GOOD.encode() + b"\r\n")  # a byte order mark, Windows line ends
    assert read_instructions(path) == [("词汇：猫", "猫来了。")]
    path.write_bytes(("\ufeff[\r\n" + GOOD + ",\r\n" + GOOD + "\r\n]\r\n").encode())
    assert read_instructions(path) == [("词汇：猫", "猫来了。")] * 2
    path.write_text(f" \n[{GOOD}]", encoding="utf-8")
    assert read_instructions(path) == [("词汇：猫", "猫来了。")]
    path.write_text(json.dumps(json.loads(GOOD), indent=2), encoding="utf-8")
    assert read_instructions(path) == [("词汇：猫", "猫来了。")]
    path.write_text('{"instruction": "写一个故事", "input": "词汇：猫", "output": "猫来了。"}', encoding="utf-8")
    assert read_instructions(path) == [("写一个故事\n词汇：猫", "猫来了。")]
    path.write_text('{"story_zh": "猫来了。", "story": "A cat."}\n{"text": "狗来了。"}', encoding="utf-8")
    assert read_stories(path) == ["猫来了。", "狗来了。"]
    path.write_bytes(b'{"text": "cat"}\n' * 1000 + b'{"text": "' + "小狗".encode("gbk") + b'"}')
    with pytest.raises(ValueError, match="row 1001 is not UTF-8"):
        list(read_records(path))


@pytest.mark.parametrize("nothing", ["null", "NaN"])
def test_null_is_absence(tmp_path, nothing):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"instruction": "词汇：猫", "input": {nothing}, "output": "猫来了。", "words": {nothing}}}\n'
                    f'{{"instruction": {nothing}, "input": "词汇：狗", "output": "狗来了。", "text": {nothing}}}\n'
                    f'{{"story_zh": {nothing}, "text": "鸡来了。"}}\n', encoding="utf-8")
    (_, cat), (_, dog), (_, hen) = read_records(path)
    assert instruction_of(path, 1, cat) == "词汇：猫" and instruction_of(path, 2, dog) == "词汇：狗"
    assert "words" not in cat and hen == {"text": "鸡来了。"}
    assert instruction_of(path, 3, {"constraints": {}, "instruction": None}, required=False) == ""


def test_real_instructions(real_data):
    pairs = read_instructions(real_data / "real_instructions_zh.json")
    assert len(pairs) == 3185
    train, val = split_by_story(pairs, 0.05, story=lambda pair: pair[1])
    assert not {p[1] for p in train} & {p[1] for p in val} and 100 < len(val) < 220
    assert len(json.dumps(train)) > 0


BROKEN = '{"instruction": "词汇：狗" "output": "狗来了。"}'


@pytest.mark.parametrize("content, good", [
    (f"{GOOD}\n{BROKEN}\n\n{GOOD}", {1, 4}),
    (f"{BROKEN}\n{BROKEN}\n{GOOD}", {3}),
    (f"{GOOD[:-9]}\n{GOOD}\n{GOOD}", {2, 3}),
    (f"{GOOD}\nbroken\n[\n{GOOD}", {1, 4}),
    (f"broken\n{GOOD}", {2}),
    (b"\n".join((GOOD.encode(), GOOD.encode("gb18030"), GOOD.encode())), {1, 3}),
    ('{"17"\n' + GOOD, {2}),
])
def test_reading_goes_on_behind_a_broken_line(tmp_path, content, good):
    path = tmp_path / "rows"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with open(path, "rb") as f:
        rows = list(scan(f, path))
    assert {row for row, record in rows if not isinstance(record, RowError)} == good
    for row, record in rows:
        assert record == json.loads(GOOD) if row in good else f"row {row} " in str(record) and record.raw


@pytest.mark.parametrize("content", [
    '{"17": "故事：猫来了。", "18": "词汇：狗\\n故事：狗来了。"}',
    '{"17": "故事：猫来了。",\n"18": "词汇：狗\\n故事：狗来了。"}',
    '{\n"17": {"text": "猫来了。"},\n"18": {"text": "狗来了。"}}',
])
def test_an_object_of_records_by_their_ids(tmp_path, content):
    (tmp_path / "rows").write_text(content, encoding="utf-8")
    assert list(read_records(tmp_path / "rows")) == list(enumerate(json.loads(content).values(), 1))


def test_blocks_of_prompts(tmp_path):
    (tmp_path / "prompts").write_bytes("\ufeff词汇：猫\r\n特点：对话\r\n \r\n\r\n词汇：狗".encode())
    assert read_blocks(tmp_path / "prompts") == ["词汇：猫\n特点：对话", "词汇：狗"]
