"""Combined constraints against single ones."""
import pytest

from data.judged import builtin_rows
from study import combined

ROWS = [{"constraints": {"词汇": ["小猫"], "随机句子": "天黑了。"}, "story": None, "rivals": []},
        {"constraints": {"词汇": ["小狗"], "随机句子": "天亮了。", "特点": ["对话"]}, "story": None, "rivals": []}]


@pytest.fixture
def stories(monkeypatch):
    """A model that forgets the sentence where a word is asked for as well, in one of two stories."""
    def write(model, tokenizer, prompts, samples, *_):
        def tell(prompt):
            text = "“好！”" * ("特点" in prompt) + "小猫和小狗。" * ("词汇" in prompt)
            sentence = "天黑了。天亮了。" if "随机句子" in prompt else ""
            return [text + sentence, text + sentence * ("词汇" not in prompt)]
        return [tell(prompt)[:samples] for prompt in prompts], 1.0, None
    monkeypatch.setattr(combined, "write_stories", write)
    monkeypatch.setattr(combined, "SAMPLES", 2)


def test_each_constraint_is_asked_for_alone_and_together(stories):
    pairs = combined.measure([(None, None)] * 2, ROWS)
    assert pairs[2] == [(0.5, 1.0)] and pairs[3] == [(0.5, 1.0)]
    assert pairs["随机句子"] == [(0.5, 1.0)] * 2 and pairs["词汇"] == [(1.0, 1.0)] * 2 and pairs["特点"] == [(1.0, 1.0)]
    table = list(combined.lines(pairs))
    assert table[-1].split() == ["all", "of", "3", "1", "50.0%", "100.0%", "-50.0", "[-50.0,", "-50.0]"]


def test_only_what_a_rule_can_tell_of_counts():
    twist = {"constraints": {"词汇": ["小猫"], "特点": ["转折"]}, "rivals": []}
    single = {"constraints": {"词汇": ["小猫"]}, "rivals": []}
    assert [combined.is_checked_whole(row) for row in (*ROWS, twist, single)] == [True, True, False, False]
    assert sum(combined.is_checked_whole(row | {"rivals": []}) for row in builtin_rows()) > 300


def test_bad_input_is_one_line(tmp_path, model_dir, refused):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"instruction": "词汇：小猫"}\n', encoding="utf-8")
    refused(combined.main, [model_dir, "--data", data], "no instruction with two constraints")
    refused(combined.main, [tmp_path], str(tmp_path))
