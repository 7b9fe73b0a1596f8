
import random

import numpy as np
import pytest
import torch
from conftest import STORIES, random_model, tiny_config

from dataset import (
    PairBatches,
    Replay,
    TokenBatches,
    by_length,
    collate,
    encode_pair,
    encode_pairs,
    encode_prompt,
    encode_stories,
    in_batches,
    varied_prompts,
)
from model import IGNORE


def test_the_supervised_ids_of_one_example_spelled_out(tok):
    ids, labels = encode_pair(tok, "词汇：铲子", "小猫捡到铲子。", 128)
    pieces = [tok.sp.id_to_piece(i) for i in ids]
    assert pieces == PIECES
    prompt = len(pieces) - 5
    assert tok.decode(ids[:prompt]) == "Instruct: 词汇：铲子\nOutput:"
    assert labels == [IGNORE] * prompt + ids[prompt:]
    x, y = collate([(ids, labels)])
    supervised = [(tok.sp.id_to_piece(a), tok.sp.id_to_piece(b)) for a, b in zip(x[0].tolist(), y[0].tolist())
                  if b != IGNORE]
    assert supervised == [(":", "小猫"), ("小猫", "捡到"), ("捡到", "铲子"), ("铲子", "。"), ("。", "</s>")]


PIECES = ["Inst", "ruct", ":", "▁", "词汇", "：", "铲子", "\n", "Out", "put", ":", "小猫", "捡到", "铲子", "。", "</s>"]


def test_prompts_are_normalized_and_the_same_with_and_without_a_story(tok):
    ids, labels = encode_pair(tok, "关键词: 铲子、草地", "小猫捡到铲子。", 128)
    prompt = encode_prompt(tok, "词汇：铲子，草地")
    assert ids[:len(prompt)] == prompt and labels[len(prompt) - 1] == IGNORE != labels[len(prompt)]


def test_long_stories_are_cut_without_an_eos_and_long_prompts_skipped(tok, capsys):
    prompt = len(encode_prompt(tok, "词汇：铲子"))
    story = "小猫捡到铲子。" * 20
    ids, labels = encode_pair(tok, "词汇：铲子", story, 50)
    assert len(ids) == 50 and tok.eos_id not in ids and labels[prompt:] == ids[prompt:]
    assert encode_pair(tok, "词汇：铲子", story, prompt) is None
    assert len(encode_pair(tok, "词汇：铲子", story, prompt + 1)[0]) == prompt + 1
    rows = encode_pairs(tok, [("词汇：铲子", story), ("词汇：铲子", "好。"), ("长" * 99, "好。")], 50, "rows")
    assert len(rows) == 2
    assert "1 stories cut" in (out := capsys.readouterr().out) and "1 skipped" in out
    with pytest.raises(ValueError, match="all 1 prompts"):
        encode_pairs(tok, [("长" * 99, "好。")], 50, "rows")


@pytest.fixture(scope="module")
def rows(tok, pairs):
    return encode_pairs(tok, [(r["instruction"], r["output"]) for r in pairs], 128, "rows")


def test_every_epoch_has_every_row_once(rows):
    batches = PairBatches(rows, 4, 2, seed=1)
    assert batches.steps_per_epoch == 8  # 60 rows, 8 a step; the last step is smaller, not dropped

    def texts(epoch):
        steps = [batches(epoch * 8 + i) for i in range(8)]
        assert all(len(micro) <= 2 and all(len(x) <= 4 for x, _ in micro) for micro in steps)
        return [tuple(y[y != IGNORE].tolist()) for micro in steps for xs, ys in micro for y in ys]

    expected = sorted(tuple(i for i in labels if i != IGNORE) for _, labels in rows)
    first, second = texts(0), texts(1)
    assert sorted(first) == sorted(second) == expected and first != second
    assert texts(0) == first  # a pure function of the step
    assert PairBatches(rows, 4, 2, seed=2)(0)[0][0].tolist() != batches(0)[0][0].tolist()


def test_bucketed_equals_unbucketed_with_less_padding(rows, tok):
    model = random_model(tiny_config(tok.vocab_size))

    def epoch(batches):
        model.zero_grad()
        loss, size = 0.0, 0
        for x, y in batches:
            part = model(x, y)
            part.backward()
            loss, size = loss + part.item(), size + x.numel()
        return loss, size, model.lm_head.weight.grad.clone()

    steps = PairBatches(rows, 8, 1, seed=1)
    bucketed = epoch([xy for step in range(steps.steps_per_epoch) for xy in steps(step)])
    plain = epoch(in_batches(random.Random(1).sample(rows, len(rows)), 8))
    assert bucketed[0] == pytest.approx(plain[0], rel=1e-5)
    torch.testing.assert_close(bucketed[2], plain[2], atol=1e-3, rtol=1e-4)
    assert bucketed[1] < 0.9 * plain[1]
    one_by_one = sum(model(x, y).item() for row in rows for x, y in [collate([row])])
    assert sum(model(x, y).item() for x, y in by_length(rows, 7)) == pytest.approx(one_by_one, rel=1e-5)


def test_token_windows_cover_the_text_without_repeats():
    tokens = np.arange(1000, dtype=np.uint16)
    batches = TokenBatches(tokens, 16, 4, 2, seed=1)
    assert batches.windows == 62 and batches.steps_per_epoch == 8
    epoch = [xy for step in range(8) for xy in batches(step)]
    x = torch.cat([x for x, _ in epoch]).flatten()
    assert len(x) == len(x.unique()) == 62 * 16
    assert all((y == x + 1).all() for x, y in epoch)
    assert [x.tolist() for x, _ in batches(3)] == [x.tolist() for x, _ in TokenBatches(tokens, 16, 4, 2, seed=1)(3)]
    assert batches(8)[0][0].tolist() != batches(0)[0][0].tolist()
    assert sum(len(x) for x, _ in batches.validation(10)) == 10
    with pytest.raises(ValueError, match="block-size"):
        TokenBatches(tokens[:16], 16, 4, 1, seed=1)


def test_fingerprints_change_with_the_data(rows):
    assert PairBatches(rows, 4, 1, 0).fingerprint() == PairBatches(list(rows), 8, 2, 1).fingerprint()
    assert PairBatches(rows, 4, 1, 0).fingerprint() != PairBatches(rows[:-1], 4, 1, 0).fingerprint()


def test_prompts_are_drawn_anew_in_every_epoch_and_the_stories_stay(tok):
    instruction = "词汇：铲子\n特点：对话\n摘要：小猫捡到铲子。\n随机句子：小猫在河边。"
    pairs = [(instruction, f"小猫在河边捡到{what}。") for what in ("铲子", "皮球", "帽子", "苹果") * 4]
    rows = encode_pairs(tok, pairs, 128, "rows")
    prompt = varied_prompts(tok, [i for i, _ in pairs], 128, True, 0.3)

    def epoch(n, **options):
        batches = PairBatches(rows, 4, 1, seed=1, **options)
        return [(x.tolist(), y.tolist()) for step in range(n * 4, n * 4 + 4) for x, y in batches(step)]

    first, second = epoch(0, prompt=prompt), epoch(1, prompt=prompt)
    assert first == epoch(0, prompt=prompt) != second  # a pure function of seed and step
    prompts = [tok.decode(x[:y.index(next(i for i in y if i != IGNORE)) + 1]) for xs, ys in first + second
               for x, y in zip(xs, ys)]
    assert len(set(prompts)) > 16 and all(p.startswith("Instruct: ") and p.endswith("\nOutput:") for p in prompts)
    lines = {line for p in prompts for line in p.removeprefix("Instruct: ").removesuffix("\nOutput:").split("\n")}
    assert lines == set(instruction.split("\n"))

    def stories(batches):
        return sorted([i for i in y if i != IGNORE] for _, ys in batches for y in ys)
    assert stories(first) == stories(second) == stories(epoch(0))
    varied = PairBatches(rows, 4, 1, seed=1, prompt=prompt)
    before = varied.fingerprint()
    varied(0)
    assert varied.fingerprint() == before == PairBatches(rows, 4, 1, seed=1).fingerprint()  # of the data, not the draw


def test_replay_adds_whole_stories_until_they_have_their_share(rows, tok, capsys):
    long = STORIES[0] * 9
    stories = encode_stories(tok, [*STORIES[:40], long], 128, "replay")
    assert "40 plain stories; 1 do not fit" in capsys.readouterr().out
    assert len(stories) == 40
    ids, labels = stories[0]
    assert ids == labels == [tok.eos_id, *tok.encode(STORIES[0]), tok.eos_id]
    own = PairBatches(rows, 4, 2, 1)
    for share in (0.1, 0.5):
        both, again = Replay(own, stories, share), Replay(PairBatches(rows, 4, 2, 1), stories, share)
        told = {tuple(ids) for ids, _ in stories}
        supervised = replayed = 0
        for step in range(300):
            given, expected = both(step), own(step)
            assert all(torch.equal(a, b) for pair in zip(given, expected) for a, b in zip(*pair))  # its own rows stay
            for (x, y), (x2, y2) in zip(given, again(step), strict=True):
                assert torch.equal(x, x2) and torch.equal(y, y2)
            supervised += sum((y != IGNORE).sum().item() for _, y in expected)
            for x, y in given[len(expected):]:
                assert len(x) <= 4
                for ids, labels in zip(x, y):
                    n = (labels != IGNORE).sum().item()
                    whole = [*ids[:n].tolist(), tok.eos_id]
                    assert tuple(whole) in told and labels[:n].tolist() == whole[1:]
                    replayed += n
        assert replayed / (supervised + replayed) == pytest.approx(share, abs=0.01)
        assert both.steps_per_epoch == own.steps_per_epoch
    assert len({Replay(own, stories[:n], 0.5).fingerprint() for n in (39, 40)} | {own.fingerprint()}) == 3
    with pytest.raises(ValueError, match="no plain story fits"):
        encode_stories(tok, [long], 128, "replay")
