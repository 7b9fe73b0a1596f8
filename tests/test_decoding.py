"""Decoding writes what the plain model would write, and keeps to its limits."""
import pytest
import torch
from conftest import GEOMETRIES, random_model, tiny_config

import lora
from decoding import Decoder, generate, sample_next, stream


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.08)])
@pytest.mark.parametrize("targets", [[], ["lm_head", "q_proj", "gate_proj", "down_proj"]])
def test_logits_are_those_of_the_model(name, targets, dtype, tolerance):
    model = random_model(tiny_config(300, **GEOMETRIES[name]))
    if targets:
        lora.add(model, targets, 4, 8)
        for module in lora.adapters(model).values():
            torch.nn.init.normal_(module.lora_B.weight, std=0.1)
    model.to(dtype)
    idx, pos = torch.randint(300, (3, 40)), torch.arange(40).expand(3, -1)
    with torch.no_grad():
        expected = model(idx).float()
        decoder = Decoder(model, 3, 40)
        for start, end in ((0, 20), (20, 21), (21, 22), (22, 40)):
            causal = pos[0, :end] <= pos[0, start:end, None]
            mask = None if start == 0 or end == start + 1 else causal[None, None]
            logits = decoder(idx[:, start:end], pos[:, start:end], mask).float()
            assert (logits - expected[:, end - 1]).norm() <= tolerance * expected[:, end - 1].norm()
            if end == 21:
                decoder.keep([0, 2])
                idx, pos, expected = idx[[0, 2]], pos[[0, 2]], expected[[0, 2]]


@pytest.mark.parametrize("name", GEOMETRIES)
def test_cached_and_batched_generation_equal_the_plain_one(name):
    model = random_model(tiny_config(300, **GEOMETRIES[name]))
    rng = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, 300, (n,), generator=rng).tolist() for n in (5, 31, 1, 17)]

    def plain(prompt):  # the whole text again for every token
        ids = list(prompt)
        for _ in range(30):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        return ids[len(prompt):]

    with torch.no_grad():
        expected = [plain(p) for p in prompts]
    assert len({i for row in expected for i in row}) > 4  # it does not just repeat one token
    assert generate(model, prompts, 30, temperature=0) == expected
    assert [generate(model, [p], 30, temperature=0)[0] for p in prompts] == expected


def test_several_samples_of_a_prompt_are_those_of_the_prompt_several_times():
    model = random_model(tiny_config(300))
    prompts = [[7, 8, 9, 4, 5], [1, 2]]
    eos = generate(model, [[1, 2]], 30, temperature=0)[0][9]
    settings = {"temperature": 1.0, "top_k": 5, "eos_id": eos, "seed": 3}
    repeated = generate(model, [prompt for prompt in prompts for _ in range(3)], 30, **settings)
    assert generate(model, prompts, 30, samples=3, **settings) == repeated
    assert len({tuple(ids) for ids in repeated}) > 3
    assert generate(model, [[1, 2]], 30, samples=2, temperature=0) == generate(model, [[1, 2]], 30, temperature=0) * 2


def test_golden_greedy_string(tok):
    model = random_model(tiny_config(tok.vocab_size, tie_embeddings=False), seed=23, scale=0.3)
    [ids] = generate(model, [tok.encode("小猫在河边")], 9, temperature=0)
    assert tok.decode(ids) == GOLDEN


GOLDEN = "!你的苹你不是果还{你的苹在树小猫在"


def test_rows_end_at_eos_and_at_block_size():
    model = random_model(tiny_config(300, block_size=40))
    [free] = generate(model, [[7, 8, 9]], 30, temperature=0)
    eos = free[10]
    first = free.index(eos)
    rows = generate(model, [[7, 8, 9], [1, 2], [5] * 39, [5] * 40], 60, temperature=0, eos_id=eos)
    assert rows[0] == free[:first]  # EOS itself is not part of the text
    assert [len(rows[2]), len(rows[3])] == [1, 0]
    assert len(rows[1]) <= 38
    steps = list(stream(model, [[7, 8, 9], [5] * 39], 60, temperature=0, eos_id=eos))
    assert all(row[1] is None for row in steps[1:])  # an ended row stays ended


def test_sampling_is_seeded_and_its_filters_hold():
    model = random_model(tiny_config(300))
    same = [generate(model, [[1, 2], [3]], 20, temperature=1.0, seed=5) for _ in range(2)]
    assert same[0] == same[1] != generate(model, [[1, 2], [3]], 20, temperature=1.0, seed=6)

    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    rng = torch.Generator().manual_seed(0)

    def drawn(**changes):
        settings = {"temperature": 1.0, "top_k": None, "top_p": 1.0, **changes}
        ids = sample_next(logits.expand(4000, -1), settings["temperature"], settings["top_k"], settings["top_p"], rng)
        return torch.bincount(ids, minlength=4) / 4000

    torch.testing.assert_close(drawn(), logits.exp(), atol=0.03, rtol=0)
    assert drawn(top_k=2)[2:].sum() == 0 and drawn(top_k=2)[1] > 0.3
    assert drawn(top_p=0.6)[2:].sum() == 0 and drawn(top_p=0.6)[1] > 0.3  # the fewest that reach 0.6: two
    assert drawn(top_p=0.5)[1:].sum() == 0  # the likeliest alone reaches 0.5
    assert drawn(top_p=1e-9)[0] == 1 == drawn(temperature=0)[0] == drawn(temperature=1e-30)[0]
    assert drawn(top_p=1e-300)[0] == 1 == drawn(temperature=1e-300)[0]  # 0 in float32
    assert drawn(temperature=100)[3] > 0.2 and drawn(top_k=1000)[3] > 0.02


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1},
                                 {"top_k": 0}])
def test_sampling_values_out_of_range_are_refused(bad):
    with pytest.raises(ValueError):
        generate(random_model(tiny_config(300)), [[1]], 3, **bad)


def test_prompts_without_room_are_refused():
    model = random_model(tiny_config(300))
    for prompts in ([], [[]], [[1] * 129]):
        with pytest.raises(ValueError):
            generate(model, prompts, 3)
