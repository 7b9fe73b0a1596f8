import json
import random

import pytest

from constraints import (
    FEATURE_ALIASES,
    FEATURES,
    KEY_ALIASES,
    KEYS,
    check,
    fold,
    has_dialogue,
    normalize,
    parse,
    parse_record,
    permutations,
    render,
    sentences,
    vary,
)

FULL = {"词汇": ["铲子", "草地"], "特点": ["转折", "对话"], "摘要": "小狗的名字叫点点。", "随机句子": "它说：你好！"}


def test_parse_reads_what_render_writes_in_every_order():
    orders = list(permutations(FULL))
    assert len(orders) == 24 == len({render(c) for c in orders})
    for constraints in orders:
        parsed, preamble = parse(render(constraints))
        assert parsed == constraints and list(parsed) == list(constraints) and preamble == ""


def test_keys_count_at_the_start_of_a_line_only():
    text = "摘要：小狗的名字叫点点，它学了很多词汇：大、小。\n词汇：名字，单词，总结"
    assert parse(text)[0] == {"摘要": "小狗的名字叫点点，它学了很多词汇：大、小。", "词汇": ["名字", "单词", "总结"]}
    assert parse("摘要：一只猫\n它学了很多词汇：大、小。")[0] == {"摘要": "一只猫它学了很多词汇：大、小。"}
    assert parse("单词表在桌上")[0] == {} == parse("词 铲子")[0]


@pytest.mark.parametrize("text, expected", [
    ("关键词: 铲子、草地", {"词汇": ["铲子", "草地"]}),
    ("Words: 铲子, 草地", {"词汇": ["铲子", "草地"]}),
    ("词汇：铲子 草地；铲子", {"词汇": ["铲子", "草地"]}),
    ("  特征 ： Dialogue，BadEnding、moral value", {"特点": ["对话", "坏结局", "道德价值"]}),
    ("总结：一只猫", {"摘要": "一只猫"}),
    ("random sentence: Hello.", {"随机句子": "Hello."}),
    ("随机句子：随机句子：你好：再见", {"随机句子": "你好：再见"}),
    ("词汇：铲子\r\n\r\n特点：转折\r\n", {"词汇": ["铲子"], "特点": ["转折"]}),
    ("摘要：第一行\n第二行\n特点：转折", {"摘要": "第一行第二行", "特点": ["转折"]}),
    ("摘要：\n第一行", {"摘要": "第一行"}),
    ("词汇：铲子\n单词：草地，铲子", {"词汇": ["铲子", "草地"]}),
    ("词汇：\n特点：，", {}),
    ("特点：悬疑", {"特点": ["悬疑"]}),
])
def test_what_people_write(text, expected):
    assert parse(text)[0] == expected


TWO = {"词汇": ["铲子", "草地"]}


@pytest.mark.parametrize("text", [
    "词汇：铲子，草地。", "词汇：铲子、草地！", "词汇：铲子，草地……", "词汇：铲子，草地．",
    "词汇：“铲子”，“草地”", "词汇：“铲子，草地。”", '词汇："铲子", "草地"', "词汇：'铲子'，‘草地’。",
    "词汇：「铲子」，『草地』", "词汇：“铲子”“草地”", "词汇：「铲子」「草地」。",
    "词汇：《铲子》、【草地】", '词汇：["铲子", "草地"]', "词汇：['铲子', '草地']", "词汇：[铲子，草地]。",
    "词汇：**铲子**，`草地`", "词汇：\n- 铲子\n• 草地", "词汇：\u200b铲子\u200b，\ufeff草地\u00ad"])
def test_marks_around_words_are_no_part_of_them(text):
    assert parse(text)[0] == TWO
    assert normalize(text) == "词汇：铲子，草地"


def test_words_in_a_list_of_lines():
    for lines in ("1. 铲子\n2. 草地", "- 铲子\n- 草地", "（1）铲子\n（2）草地", "1、铲子\n2、草地"):
        assert parse(f"词汇：\n{lines}")[0] == {"词汇": ["铲子", "草地"]}


def test_what_belongs_to_a_word_stays():
    for word in ("T恤", "C++", ".NET", "3.5", "小明（猫）", "don't", "Jean-Luc", "冰：雪", "A/B"):
        assert parse(f"词汇：{word}，铲子")[0] == {"词汇": [word, "铲子"]}


@pytest.mark.parametrize("line", [
    "\u200b词汇：铲子，草地", "\ufeff词汇：铲子，草地", "词\u200d汇：铲子，草地", "词\u00ad汇\u200b：铲子，草地",
    "词 汇：铲子，草地", "\u3000词汇\u3000：\u3000铲子，草地",
    "**词汇**：铲子，草地", "**词汇：**铲子，草地", "**词汇：** 铲子，草地", "**词汇：铲子，草地**",
    "__词汇__：铲子，草地",
    "*词汇*：铲子，草地", "`词汇`：铲子，草地", "- **词汇**: 铲子，草地",
    "- 词汇：铲子，草地", "-词汇：铲子，草地", "* 词汇：铲子，草地", "+ 词汇：铲子，草地",
    "• 词汇：铲子，草地", "·词汇：铲子，草地",
    "1. 词汇：铲子，草地", "1.词汇：铲子，草地", "12. **词汇**：铲子，草地", "**1. 词汇**：铲子，草地",
    "1、词汇：铲子，草地",
    "1) 词汇：铲子，草地", "1）词汇：铲子，草地", "（1）词汇：铲子，草地", "(1) 词汇：铲子，草地",
    "①词汇：铲子，草地",
    "一、词汇：铲子，草地", "（一）词汇：铲子，草地",
    "# 词汇：铲子，草地", "## 词汇：铲子，草地", "### **词汇**：铲子，草地", "> 词汇：铲子，草地",
    "> - 词汇：铲子，草地",
    "【词汇】铲子，草地", "【词汇】：铲子，草地", "【词汇】 铲子，草地", "**【词汇】**铲子，草地",
    "1. 【词汇】铲子，草地",
    "[词汇]：铲子，草地", "「词汇」：铲子，草地", "“词汇”：铲子，草地", '"词汇": "铲子", "草地"',
    "《词汇》：铲子，草地",
    "（词汇）：铲子，草地",
    "詞彙：铲子，草地", "關鍵詞：铲子，草地", "單詞：铲子，草地", "【關鍵詞】铲子，草地",
    "Ｗｏｒｄｓ：铲子，草地", "WORDS﹕铲子，草地", "Key words: 铲子，草地", "**Words:** 铲子, 草地"])
def test_marks_around_a_key_are_read_as_meant(line):
    for text in (line, f"请写一个故事。\n\n{line}", f"特点：对话\n{line}\n摘要：小猫。"):
        assert parse(text)[0]["词汇"] == ["铲子", "草地"]
    assert normalize(line) == "词汇：铲子，草地"


@pytest.mark.parametrize("line, key", [
    ("摘要", "摘要"), ("總結", "摘要"), ("总结", "摘要"), ("隨機句子", "随机句子"), ("隨機語句", "随机句子"),
    ("句子", "随机句子"), ("Random_Sentence", "随机句子"), ("randomsentence", "随机句子"), ("ＳＵＭＭＡＲＹ", "摘要")])
@pytest.mark.parametrize("before, behind", [
    ("", "："), ("**", "**："), ("**", "：**"), ("- ", "："), ("1. ", "："), ("【", "】"), ("【", "】："),
    ("## ", "："), ("\u200b", "："), ("「", "」:")])
def test_what_is_asked_stays_as_it_is_written(line, key, before, behind):
    for value in ("“真好，”小狗说，“走吧！”", "《春天》- 第1天：天很蓝；云很白……", "**不要**停下。", "1. 开头",
                  "“词汇”这个词很长。"):
        assert parse(before + line + behind + value)[0] == {key: value}


def test_a_line_in_bold_ends_where_its_text_does():
    assert parse("摘要：\u200b小狗迷路了。\ufeff\n\u200b")[0] == {"摘要": "小狗迷路了。"}
    assert parse("摘要：\u200b") == ({}, "")
    assert parse("**摘要：小狗迷路了。**")[0] == {"摘要": "小狗迷路了。"}
    assert parse("**摘要：** 小狗迷路了。")[0] == {"摘要": "小狗迷路了。"}


def test_features_in_every_spelling():
    traditional = "對話，轉折、壞結局；道德價值 伏筆，衝突。"
    for text in (f"特點：{traditional}", "特点：“对话”、“转折”，[坏结局]，**道德价值**，伏笔。，冲突！",
                 "Features: Dialogue, Twist, Bad Ending, MoralValue, Foreshadowing, Ｃｏｎｆｌｉｃｔ."):
        assert parse(text)[0] == {"特点": list(FEATURES)}
    assert parse("特点：悬疑。")[0] == {"特点": ["悬疑"]}


def test_several_keys_in_one_line():
    assert parse("词汇：铲子，草地；特点：对话")[0] == {**TWO, "特点": ["对话"]}
    assert parse("摘要：小狗迷路了；词汇：铲子，草地; **特点**：转折；对话；句子：天很蓝；云很白。")[0] == {
        "摘要": "小狗迷路了", **TWO, "特点": ["转折", "对话"], "随机句子": "天很蓝；云很白。"}
    assert parse("请写一个故事；词汇：铲子，草地") == (TWO, "请写一个故事")
    assert parse_record("词汇：铲子；故事：他说；总结：好。\n他又说；总结：好。\n特点：对话；词汇：草地") == (
        {**TWO, "特点": ["对话"]}, "", "他说；总结：好。\n他又说；总结：好。")


@pytest.mark.parametrize("text", [
    "“词汇：铲子，草地”", "“词汇：大、小。”老师说。", "（词汇：铲子）", "【词汇：铲子", "「词汇”：铲子",
    "词汇】铲子",
    "【词汇表】铲子", "词汇表：铲子", "词汇 铲子", "[词汇] 铲子", "（词汇）铲子", "- 词汇 铲子",
    "词，汇：铲子", "新词汇：铲子",
    "他说：词汇：铲子", "它学了很多词汇：大、小。", "1. 小猫，词汇：铲子", "*" * 70, "_" * 70 + "：",
    "- " * 40 + "：", "：铲子", "；；",
    "天很蓝；【总结】好", "他学了词汇；它的特点是慢。", "“你好；词汇”：铲子", "天很蓝；（总结：好）"])
def test_what_is_no_key(text):
    assert parse(text) == ({}, text)
    assert normalize(text) == text
    assert parse("摘要：小猫" + text)[0] == {"摘要": "小猫" + text}


def test_normalize_is_what_the_model_is_trained_on():
    assert normalize("写个故事。\n关键词: 铲子、草地\n特征：Twist") == "写个故事。\n词汇：铲子，草地\n特点：转折"
    assert normalize("随便写一个故事") == "随便写一个故事"
    for text in map(render, permutations(FULL)):
        assert normalize(text) == text == normalize(normalize(text))


def test_aliases_are_unambiguous():
    for aliases, names in ((KEY_ALIASES, KEYS), (FEATURE_ALIASES, FEATURES)):
        everything = [*aliases, *(name for others in aliases.values() for name in others)]
        assert tuple(aliases) == names and len(everything) == len(set(everything))


def test_render_keeps_one_line_a_key_and_refuses_unknown_keys():
    assert render({"摘要": "一\n二"}) == "摘要：一二"
    with pytest.raises(ValueError, match="主题"):
        render({"主题": "猫"})


def test_hypothesis_round_trip():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    word = st.text(alphabet="小猫名字单词总结特点abc：", min_size=1, max_size=5)
    line = st.text(alphabet="小猫的名字叫词汇，。：“” a", min_size=1, max_size=30)
    line = line.map(str.strip).filter(lambda s: s and not parse(s)[0])
    whole = st.fixed_dictionaries({}, optional={
        "词汇": st.lists(word, min_size=1, max_size=4, unique=True), "摘要": line, "随机句子": line,
        "特点": st.lists(st.sampled_from(FEATURES), min_size=1, unique=True)})

    @hypothesis.given(whole, st.randoms(use_true_random=False))
    @hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
    def check_round_trip(constraints, rng):
        keys = list(constraints)
        rng.shuffle(keys)
        constraints = {key: constraints[key] for key in keys}
        parsed, _ = parse(render(constraints))
        assert parsed == constraints and list(parsed) == keys
    check_round_trip()


@pytest.mark.parametrize("text, speaks", [
    ("他说：“好”", True), ("“救命！”小狗叫起来。", True), ("他说“好”，就走了", True), ("「好。」", True),
    ('"快跑，"他喊。', True), ("他问：”什么“", True),
    ("一只叫“点点”的小狗", False), ("他造了一座“桥”。", False), ("他说不行。", False), ("", False),
    ("“”", False), ("小猫说：“”。", False), ("小猫说：“", False), ("小猫问「 」", False), ("小猫说：“走吧", True),
    ("他说：「『小猫』在哪里」", True),
])
def test_dialogue(text, speaks):
    assert has_dialogue(text) is speaks


def test_check():
    story = "小猫拿着铲子。天空中飘着 几朵白云,“走吧！”它说。"
    assert check(story, {"词汇": ["铲子", "草地"], "特点": ["对话", "转折"], "摘要": "小猫挖土",
                         "随机句子": "天空中飘着几朵白云。"}) == {
        "词汇": {"铲子": True, "草地": False}, "特点": {"对话": True, "转折": None}, "摘要": None, "随机句子": True}
    assert check(story, {"随机句子": "天空中飘着一朵白云。"}) == {"随机句子": False}
    assert check(story, {"随机句子": "“走吧！”它说。小猫拿着铲子。"}) == {"随机句子": True}  # each, in any order
    assert check(story, {"随机句子": "“走吧！”它说。小猫丢了铲子。"}) == {"随机句子": False}
    assert check("铲\n子", {"词汇": ["铲子"]}) == {"词汇": {"铲子": False}}
    assert check(story, {"随机句子": "……"}) == {"随机句子": None}  # nothing that could be missing
    assert check("", {"随机句子": "好。", "词汇": ["猫"], "特点": ["对话"]}) == {
        "随机句子": False, "词汇": {"猫": False}, "特点": {"对话": False}}
    assert fold("Ａb，“ 你好！”") == fold("ab你好")


def test_sentences_are_whole():
    text = "豆豆说：“来呀！快来！”朵朵跑来了。“好。”米米说。“好呀，”乐乐说，“走吧！”天黑了！"
    assert sentences(text) == ["豆豆说：“来呀！快来！”", "朵朵跑来了。", "“好。”米米说。",
                               "“好呀，”乐乐说，“走吧！”", "天黑了！"]
    assert sentences("“走吧！”豆豆说：“天黑了。”好。") == ["“走吧！”豆豆说：“天黑了。”", "好。"]


def test_real_instructions_hold(real_data):
    rows = json.loads((real_data / "real_instructions_zh.json").read_text(encoding="utf-8"))
    for row in random.Random(0).sample(rows, 500):
        constraints, preamble = parse(row["instruction"])
        assert preamble == "" and render(constraints) == row["instruction"]
        met = check(row["output"], constraints)
        assert all(met.get("词汇", {}).values()) and met.get("随机句子", True)


def test_orders_and_omissions_are_drawn():
    rng = random.Random(0)
    text = "请写一个故事。\n" + render({"词汇": ["铲子"], "特点": ["对话"], "摘要": "小猫。",
    "随机句子": "天空很蓝。"})
    seen = [vary(text, rng, True, 0.0) for _ in range(400)]
    assert len(set(seen)) == 24 and {frozenset(t.split("\n")) for t in seen} == {frozenset(text.split("\n"))}
    assert all(t.startswith("请写一个故事。\n") for t in seen)
    assert {vary(text, rng, False, 0.0) for _ in range(20)} == {text}
    fewer = [parse(vary(text, rng, False, 0.5))[0] for _ in range(4000)]
    assert all(list(c) == [key for key in parse(text)[0] if key in c] for c in fewer)  # in the order as it is
    sizes = [sum(len(c) == n for c in fewer) / 4000 for n in range(5)]
    assert sizes[0] == 0 and sizes[4] == pytest.approx(1 / 16,
    abs=0.02) and sizes[1] == pytest.approx(5 / 16, abs=0.03)
    assert vary("写一个故事", rng, True, 0.9) == "写一个故事"
