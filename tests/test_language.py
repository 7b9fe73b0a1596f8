"""The language files: what is wrong in one is one line that names file and entry."""
import json
import re
import shutil
from collections import Counter

import pytest

from data import generate, language


@pytest.fixture(scope="module")
def world():
    return language.load()


def failure(capsys, *argv):
    """The one line that the command prints when it exits with 2."""
    with pytest.raises(SystemExit) as stop:
        generate.main(list(map(str, argv)))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# ---- what is there ----

def test_open_classes_are_large_and_have_scenes(world):
    lexicon = world["lexicon"]
    opened = {name: table for name, table in lexicon.items() if table.get("open")}
    assert sum(len(table["entries"]) for table in opened.values()) >= 8000
    assert set(generate.CLASSES) == set(opened)
    for name in set(opened) - {"其他"}:
        assert len(world["scenes"][name]) >= 30, name
    assert sum(map(len, world["scenes"].values())) >= 600 and len(world["scenes"][language.ANY]) >= 30
    where = Counter(word for table in opened.values() for word in table["by_word"])
    assert max(where.values()) == 1  # one class each
    assert 350 <= len(generate.held_out_words()) <= 500


def test_sentence_shapes_are_many(world):
    assert len(world["sentences"]) >= 150
    assert not [p["text"] for p in world["sentences"] if "“" in p["text"]]


def test_open_plots_are_many_and_varied(world):
    plots = [plot for plot in world["plots"] if plot["open"]]
    assert len(plots) >= 60 and len(world["plots"]) - len(plots) == 72
    for plot in plots:
        assert len(plot["endings"]) >= 3, plot["name"]
        for ending in plot["endings"]:
            assert len(ending["summary"]) >= 6, plot["name"]
            assert min(len(every) for _, (_, every) in ending["beats"]) >= 4, plot["name"]
        opening = plot["endings"][0]["beats"][0][1][1]
        for parts in opening:  # what the story is about is there from its first sentence on
            assert {"hero", plot["central"]} <= {p.partition(".")[0] for p in parts if isinstance(p, language.Slot)}
    central = Counter(plot["central"] for plot in plots)
    assert len(central) >= 8 and max(central.values()) < len(plots) / 2


# ---- bad files ----

HERO_SCENE = '["主角"]\nsay = [\n'
LATER = '"名物" = [\n'
SCENE, WORD = '["东西"]\nsay = [\n', '["东西"]\nopen = true'


@pytest.mark.parametrize("file, old, new, expected", [
    ("plots/lost.toml", "有一{thing.m}", "有一{thing.mm}", "beat 1, phrasing 1: unknown slot {thing.mm}"),
    ("plots/lost.toml", "有一{thing.m}", "有一{toing}", "beat 1, phrasing 1: unknown slot {toing}"),
    ("plots/lost.toml", "有一{thing.m}", "有一{thing.m", "brace"),
    ("plots/lost.toml", "有一{thing.m}", "有一{spot.full}", "unknown slot {spot.full}"),
    ("plots/lost.toml", "有一{thing.m}", "有一{thing.class}", "unknown slot {thing.class}"),
    ("plots/lost.toml", 'thing = "thing"', 'thing = "thong"', "slot 'thing': unknown class 'thong'"),
    ("plots/lost.toml", 'thing = "thing"', "thing = 3", "slot 'thing': unknown class 3"),
    ("plots/lost.toml", 'name = "lost"', "", "field 'name' is missing"),
    ("plots/lost.toml", 'central = "thing"', 'central = "thong"', "central 'thong'"),
    ("plots/lost.toml", 'name = "lost"', 'name = "gift"', "duplicate plot name"),
    ("plots/lost.toml", 'name = "lost"', 'name = "lost', "lost.toml"),
    ("plots/lost.toml", 'name = "nook"', 'name = "bag"', "ending 2: duplicate ending name 'bag'"),
    ("plots/lost.toml", 'only = ["nook", "bird"]', 'only = ["nock"]', "beat 2: unknown ending 'nock'"),
    ("plots/lost.toml", "say = [", 'say = ["{hero}来了。", "{hero}来了。",', "'{hero}来了。' is there twice"),
    ("words.toml", "件 衣服,", "件 衣服, 个 菠萝,", "]: '菠萝' is in [东西], too"),
    ("scenes.toml", SCENE, SCENE + '"{东西}在呢。",\n"{东西}在呀！",\n"{东西}在吧。",\n', "slots or particles"),
    ("plots/lost.toml", "\noptional = true", '\noptional = "yes"', "field 'optional' is not a bool"),
    ("plots/lost.toml", "\n[slots]", '\n[class.thing]\nwords = "帽子"\n[slots]', "[thing]: duplicate class name"),
    ("plots/lost.toml", "\n[slots]", '\n[class.cap]\nword = "帽子"\n[slots]', "[cap]: field 'words' is missing"),
    ("plots/lost.toml", 'thing = "thing"', 'thing = "scene"', "slot 'thing': unknown class 'scene'"),
    ("plots/lost.toml", 'features = ["转折"]', 'features = ["转机"]', "ending 1: unknown feature '转机'"),
    ("plots/lost.toml", 'features = ["转折"]', 'feature = ["转折"]', "ending 1: unknown field 'feature'"),
    ("plots/lost.toml", 'features = ["转折"]', 'features = "转折"', "ending 1: field 'features' is not a list"),
    ("plots/lost.toml", "summary = [", "summary = [3,", "ending 1, summary: must be a list"),
    ("plots/lost.toml", "[[beat]]", "beat = [3]\n[[ignored]]", "lost.toml"),
    ("lexicon.toml", "[scene]\nsay = [", "[scene]\nsay = [3,", "[scene]: say must be a list of strings"),
    ("lexicon.toml", "[scene]\nsay = [", '[scene]\nsay = ["“走吧。”",', "[scene]: a sentence with quotation marks"),
    ("lexicon.toml", "[scene]\nsay = [", '[scene]\nsay = ["{night}",', "[scene]: a sentence class within another"),
    ("lexicon.toml", "\n顶 帽子", "\n帽子", "[thing]: '帽子' does not have the form 'm word'"),
    ("lexicon.toml", "\n顶 帽子", "\n顶 帽子，", "[thing]: '顶 帽子，' does not have the form"),
    ("lexicon.toml", "\n顶 帽子", "\n条 围巾", "[thing]: duplicate word '围巾'"),
    ("lexicon.toml", 'pos = "noun"', 'pos = "none"', "pos must be one of"),
    ("lexicon.toml", 'names = "pet_name"', 'names = "pet"', "[animal]: unknown class 'pet'"),
    ("lexicon.toml", "[scene]\nsay = [", '[scene]\nsay = ["{moon}。",', "{scene}, sentence 1: unknown slot {moon}"),
    ("lexicon.toml", "[animal]", "[animal", "lexicon.toml"),
    ("lexicon.toml", "[animal]", "x = 1\n[animal]", "lexicon.toml"),
    ("words.toml", WORD, '["东西"]\nopne = true', "[东西]: field 'opne' is not a str"),
    ("words.toml", WORD, "[thing]\nopen = true", "[thing]: duplicate class name"),
    ("words.toml", '"animal", "animal"', '"animol", "animal"', "[主角]: unknown class 'animol'"),
    ("scenes.toml", SCENE, SCENE + '"路边有一棵树。",\n', "[东西] 1: no {东西} in '路边有一棵树。'"),
    ("scenes.toml", SCENE, SCENE + '"路边有{东西}和{动吻}。",\n', "[东西] 1, phrasing 1: unknown slot {动吻}"),
    ("scenes.toml", SCENE, SCENE + '"{东西}和{动物}在。",\n"{动物}和{东西}在。",\n', "only in its slots"),
    ("scenes.toml", SCENE, '["东西"]\nsya = [\n', "[东西]: field 'say' is missing"),
    ("scenes.toml", SCENE, '["东东"]\nsay = [\n', "[东东]"),
    ("scenes.toml", HERO_SCENE, HERO_SCENE + '"{动物}来了。",\n', "[主角] 1: no {hero} in '{动物}来了。'"),
    ("later.toml", LATER, LATER + '"画了{词}。",\n', "[画画] 名物 1: '画了{词}。' does not begin with {词}"),
    ("later.toml", LATER, LATER + '"{词}像{动物}。",\n', "only {词} can stand in '{词}像{动物}。'"),
    ("later.toml", LATER, LATER + '"{词}画了{。",\n', "only {词} can stand in"),
    ("later.toml", LATER, LATER + "3,\n", "[画画] 名物 1: 3 is not a sentence"),
    ("later.toml", LATER, LATER + '"{词}画得真高。",\n' * 2, "[画画] 名物 2: '{词}画得真高。' is there twice"),
    ("later.toml", LATER, '"名物" = ["{词}亮亮的。"]\n"其他" = [\n', "later.toml"),
    ("later.toml", LATER, '"动词" = [\n', "[画画]: field '名物' is missing"),
    ("later.toml", '["画画"]', '["画画"]\n"别的" = ["{词}。"]', "[画画]: unknown field '别的'"),
    ("later.toml", '["画画"]', '["画画"]\n"主角" = ["animal"]', "[做梦] 主角: 'animal' is no class"),
    ("later.toml", '["画画"]', '["画画"]\n"主角" = ["动吻"]', "[画画] 主角: '动吻' is no class"),
    ("later.toml", '"主角" = ["人物"]\n', "", "later.toml: one setting, and no more, must be without 主角"),
    ("later.toml", '["人物"]', "[]", "later.toml: one setting, and no more, must be without 主角"),
    ("later.toml", '["画画"]', '["甲"]\n"开头" = ["{hero}来了。"]\n["画画"]', "[甲]: field '结尾' is missing"),
    ("sentences.toml", "say = [\n", 'say = [\n"“下雨啦！”{人物}说。",\n', "does not stand alone"),
    ("sentences.toml", "say = [\n", 'say = [\n"{hero}说要下雨。",\n', "does not stand alone"),
    ("sentences.toml", "say = [\n", 'say = [\n"{人物说要下雨。",\n', "brace"),
])
def test_a_bad_language_file_is_one_line(tmp_path, capsys, file, old, new, expected):
    shutil.copytree(language.LANGUAGE, tmp_path / "data", ignore=shutil.ignore_patterns("*.py*"))
    path = tmp_path / "data" / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    line = failure(capsys, "--n", 200, "--out", tmp_path / "s.jsonl", "--language", tmp_path / "data")
    assert (path.name in line or "{scene}" in expected) and expected in line
    assert not (tmp_path / "s.jsonl").exists()


@pytest.mark.parametrize("speech, n, expected", [
    ("{hero}来了。", 10, "[甲] 开头: needs sentences with speech and without"),
    ("“来！”{hero}说。", 9, "[甲] 名物: needs 10 sentences")])
def test_a_setting_has_what_every_story_needs(tmp_path, capsys, speech, n, expected):
    shutil.copytree(language.LANGUAGE, tmp_path / "data", ignore=shutil.ignore_patterns("*.py*"))
    words = {kind: [f"{{词}}是{kind}{i}。" for i in range(n)] for kind in ("名物", "动作", "其他")}
    setting = {"开头": ["{hero}走了。", speech], "结尾": ["{hero}睡了。"]} | words
    lines = [f'"{heading}" = {json.dumps(texts, ensure_ascii=False)}\n' for heading, texts in setting.items()]
    (tmp_path / "data" / "later.toml").write_text('["甲"]\n' + "".join(lines), encoding="utf-8")
    assert expected in failure(capsys, "--n", 9, "--out", tmp_path / "s.jsonl", "--language", tmp_path / "data")


@pytest.mark.parametrize("heading", [language.ANY, language.HERO])
def test_scenes_that_every_world_needs(tmp_path, capsys, heading):
    shutil.copytree(language.LANGUAGE, tmp_path / "data", ignore=shutil.ignore_patterns("*.py*"))
    path = tmp_path / "data" / "scenes.toml"
    text, n = re.subn(rf'\["{heading}"\]\nsay = \[\n(.*\n)*?\]\n', "", path.read_text(encoding="utf-8"))
    assert n == 1
    path.write_text(text, encoding="utf-8")
    line = failure(capsys, "--n", 200, "--out", tmp_path / "s.jsonl", "--language", tmp_path / "data")
    assert f"[{heading}]: fewer than" in line and not (tmp_path / "s.jsonl").exists()


def test_other_errors_are_one_line(tmp_path, capsys):
    assert "--n 0" in failure(capsys, "--n", 0, "--out", tmp_path / "s.jsonl")
    assert "lexicon.toml" in failure(capsys, "--language", tmp_path, "--out", tmp_path / "s.jsonl")
    assert str(tmp_path) in failure(capsys, "--n", 1, "--out", tmp_path)            # a folder cannot be the file
    for name in ("lexicon.toml", "words.toml"):
        shutil.copy(language.LANGUAGE / name, tmp_path)
    assert "no plot files" in failure(capsys, "--language", tmp_path, "--out", tmp_path / "s.jsonl")


def test_names_are_no_words_of_the_plots(world):
    """豆豆 must not be counted where it is no name."""
    names = {word for group in ("pet_name", "boy_name", "girl_name") for word in world["lexicon"][group]["by_word"]}
    text = "\n".join(path.read_text(encoding="utf-8") for path in (language.LANGUAGE / "plots").glob("*.toml"))
    assert not [name for name in names if name in re.sub(r"\{[^{}]*\}", "", text)]
