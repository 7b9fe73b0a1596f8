"""What a constraint line is worth."""
import pytest
from conftest import random_model, tiny_config

from study import asked

STORY = "小猫在小河边拍皮球。皮球掉进了小河！河水哗啦啦地流着，真好听。“我帮你捞上来！”小鸭说。"


def test_a_line_is_measured_with_and_without_it(tok, monkeypatch):
    def stories(model, tokenizer, prompts, *_):
        return [["小猫在小河边。" if "词汇" in p else "小猫在河边。" if "特点" in p else "哞。"] for p in prompts], None
    monkeypatch.setattr(asked, "write_stories", stories)
    rows = [{"constraints": {"词汇": ["小猫", "小河"], other: value}, "story": STORY, "rivals": []}
            for other, value in (("特点", ["对话"]), ("随机句子", "河水哗啦啦地流着，真好听。"))]
    model = random_model(tiny_config(tok.vocab_size))
    measured = asked.measure(model, tok, rows, "词汇")
    # without it 小猫 is in one of the stories, 小河 in none
    assert measured["n"] == 2 and measured["with"] == 1 and measured["without"] == pytest.approx(0.25)
    assert measured["change"]["rate"] == pytest.approx(0.75)
    assert len(measured["nats"]) == 2 and measured["nats"][0] != measured["nats"][1]
    with_line = [loss for row in rows for loss in asked.first_pieces(model, tok, row, row["constraints"], "词汇")]
    assert measured["nats"][0] == pytest.approx(sum(with_line) / 4)
    assert asked.measure(model, tok, rows[1:], "随机句子")["with"] == 0
    assert "100.0%     25.0%" in asked.line("词汇", measured)
    twist = [{"constraints": {"特点": ["转折"], "词汇": ["小猫"]}, "story": STORY, "rivals": []}]
    assert asked.line("特点", asked.measure(model, tok, twist, "特点")) == "特点: nothing that a rule can tell"
