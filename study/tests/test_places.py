"""Where what is asked stands in a story."""
from study import places


def test_places_and_their_table():
    asked = {"词汇": ["小猫", "桥", "雨"], "随机句子": "天黑了。"}
    found = places.places(asked, "天黑了。小猫过桥。")
    assert found == [("first word", 4 / 9), ("other words", 7 / 9), ("other words", None), ("sentence", 0)]
    table = list(places.lines(found))
    assert table[0].count("|") == table[1].count("|") == table[2].count("|")
    assert table[2] == "| first word | 0% | 0% | 100% | 0% | 0% | 0% | 1 |"
    assert table[3] == "| other words | 0% | 0% | 0% | 50% | 0% | 50% | 2 |"


def test_beginnings_and_repetitions():
    rows = [{"词汇": ["桥"]}, {"词汇": ["雨"]}, {"词汇": ["猫"]}, {"随机句子": "天黑了。"}]
    stories = ["从前有一座小小的石桥。雨停了。", "从前有一座小小的石桥。过桥去。过桥去。", "猫。", "桥。"]
    said = "4 stories: {} tell a sentence twice; of 3 without an asked sentence 2 begin alike"
    assert places.alike(rows, stories) == said.format(0)
    stories[0] += "从前有一座小小的石桥！"
    assert places.alike(rows, stories) == said.format(1)
    assert places.alike(rows[3:], stories[:1]).endswith("of 0 without an asked sentence 0 begin alike")


def test_the_command(model_dir, capsys, monkeypatch, tmp_path, refused):
    monkeypatch.setattr(places, "SAMPLING", places.SAMPLING | {"max_new_tokens": 4})
    monkeypatch.setattr(places, "HANDWRITTEN", tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"instruction": "词汇：小猫\\n特点：对话"}\n{"instruction": "特点：对话"}\n',
                                         encoding="utf-8")
    places.main([str(model_dir)])
    out = capsys.readouterr().out
    assert out.startswith(str(model_dir)) and "| 1 |" in out and "2 stories: " in out
    refused(places.main, [tmp_path], tmp_path)
