from dataclasses import dataclass, fields

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model, tiny_config

import checkpoint
import model as model_file
from checkpoint import load_model, save_model, save_tokenizer
from model import GPT, IGNORE, PRESETS, GPTConfig, sample_next

# the study's shape (heads * head_size != n_embd), grouped-query attention, an untied head
GEOMETRIES = {
    "microstories": {"n_head": 6, "n_kv_head": 6, "head_size": 48, "n_embd": 512, "n_layer": 2},
    "grouped": {"n_head": 4, "n_kv_head": 2, "rope_base": 5e5},
    "untied": {"n_head": 4, "n_kv_head": 1, "tie_embeddings": False, "norm_eps": 1e-6},
}


def test_presets_have_the_stated_size(capsys):
    with torch.device("meta"):
        sizes = {name: GPT(config).num_params() for name, config in PRESETS.items()}
    assert sizes == {"small": 6_163_712, "microstories": 43_915_776}
    assert PRESETS["small"] == GPTConfig()
    model_file.main([])
    printed = capsys.readouterr().out
    assert "43,915,776" in printed and "6,163,712" in printed


@pytest.mark.parametrize("name", GEOMETRIES)
def test_logits_equal_transformers_both_ways(name, tok, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = random_model(tiny_config(tok.vocab_size, **GEOMETRIES[name]))
    save_model(tmp_path / "ours", ours, tok)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    idx = torch.randint(0, tok.vocab_size, (3, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(idx).logits
        assert expected.abs().max() > 1  # not two models that are both silent
        torch.testing.assert_close(ours(idx), expected, atol=1e-4, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()  # several shards
    save_tokenizer(tmp_path / "theirs", tok)
    back, _ = load_model(tmp_path / "theirs")
    assert back.config == ours.config
    with torch.no_grad():
        torch.testing.assert_close(back(idx), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes", [{"window": 64, "soft_cap": 30.0}, {"window": None}, {}])
def test_every_field_of_the_config_survives_also_one_that_adds_no_weight(changes, tok, tmp_path, monkeypatch):
    @dataclass
    class Forked(GPTConfig):
        window: int | None = 512
        soft_cap: float | None = None

    different = {"block_size": 96, "n_layer": 1, "n_head": 4, "n_kv_head": 2, "head_size": 10, "n_embd": 24,
                 "intermediate_size": 40, "rope_base": 5e4, "norm_eps": 1e-4, "tie_embeddings": False}
    assert different.keys() | {"vocab_size"} == {field.name for field in fields(GPTConfig)}
    config = Forked(vocab_size=tok.vocab_size, **different, **changes)
    monkeypatch.setattr(checkpoint, "GPTConfig", Forked)
    save_model(tmp_path, random_model(config), tok)
    assert load_model(tmp_path)[0].config == config


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
    assert model.generate(prompts, 30, temperature=0) == expected
    assert [model.generate([p], 30, temperature=0)[0] for p in prompts] == expected


def test_golden_greedy_string(tok):
    model = random_model(tiny_config(tok.vocab_size, tie_embeddings=False), seed=23, scale=0.3)
    [ids] = model.generate([tok.encode("小猫在河边")], 9, temperature=0)
    assert tok.decode(ids) == GOLDEN


GOLDEN = "!你的苹你不是果还{你的苹在树小猫在"


def test_rows_end_at_eos_and_at_block_size():
    model = random_model(tiny_config(300, block_size=40))
    [free] = model.generate([[7, 8, 9]], 30, temperature=0)
    eos = free[10]
    first = free.index(eos)
    rows = model.generate([[7, 8, 9], [1, 2], [5] * 39, [5] * 40], 60, temperature=0, eos_id=eos)
    assert rows[0] == free[:first]  # EOS itself is not part of the text
    assert [len(rows[2]), len(rows[3])] == [1, 0]
    assert len(rows[1]) <= 38
    steps = list(model.stream([[7, 8, 9], [5] * 39], 60, temperature=0, eos_id=eos))
    assert all(row[1] is None for row in steps[1:])  # an ended row stays ended


def test_sampling_is_seeded_and_its_filters_hold():
    model = random_model(tiny_config(300))
    same = [model.generate([[1, 2], [3]], 20, temperature=1.0, seed=5) for _ in range(2)]
    assert same[0] == same[1] != model.generate([[1, 2], [3]], 20, temperature=1.0, seed=6)

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
    assert drawn(temperature=100)[3] > 0.2 and drawn(top_k=1000)[3] > 0.02


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1},
                                 {"top_k": 0}])
def test_sampling_values_out_of_range_are_refused(bad):
    with pytest.raises(ValueError):
        random_model(tiny_config(300)).generate([[1]], 3, **bad)


def test_prompts_without_room_are_refused():
    model = random_model(tiny_config(300))
    for prompts in ([], [[]], [[1] * 129]):
        with pytest.raises(ValueError):
            model.generate(prompts, 3)
    with pytest.raises(ValueError):
        model(torch.zeros(1, 129, dtype=torch.long))


def test_the_head_at_supervised_positions_gives_the_full_loss_and_gradients():
    model = random_model(tiny_config(300, tie_embeddings=False))
    rng = torch.Generator().manual_seed(4)
    idx = torch.randint(0, 300, (12, 120), generator=rng)  # over 512 supervised positions: more than one piece
    targets = torch.where(torch.rand(12, 120, generator=rng) < 0.6, torch.randint(0, 300, (12, 120)), IGNORE)
    model(idx, targets).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    full = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(model(idx, targets), full)
    full.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=1e-4, rtol=1e-4)
    assert model(idx, torch.full_like(targets, IGNORE)) == 0  # nothing supervised


def test_positions_are_exact_in_bfloat16():
    """A table of angles that .to(bfloat16) rounds would make neighbours at position 400 look alike."""
    model = random_model(tiny_config(300, block_size=512)).to(torch.bfloat16)
    cos, _ = model_file.rope_angles(torch.arange(512), 16, 10000.0)
    assert cos.dtype == torch.float32
    assert not any(b.dtype == torch.bfloat16 for b in model.buffers())


def test_attention_starts_as_what_it_has_to_become():
    model = GPT(tiny_config(40, n_head=4, n_kv_head=2))
    attn = model.model.layers[0].self_attn
    q, k = attn.q_proj.weight.view(4, 16, -1), attn.k_proj.weight.view(2, 16, -1)
    v, o = attn.v_proj.weight.view(2, 16, -1), attn.o_proj.weight.T.view(4, 16, -1)
    assert torch.equal(k[0], q[0]) and torch.equal(k[1], q[2])  # a token looks at tokens like itself
    assert all(torch.equal(o[head], v[head // 2]) for head in range(4))  # and passes on what it sees
    q, k, v, o = (model.model.layers[1].self_attn.get_submodule(name).weight for name in
                  ("q_proj", "k_proj", "v_proj", "o_proj"))
    assert not torch.equal(q, attn.q_proj.weight) and abs(q.std().item() - 32 ** -0.5) < 0.02
    assert q.data_ptr() != k.data_ptr() and v.data_ptr() != o.data_ptr()  # alike, not the same parameter


def test_rows_of_unlike_length_cost_no_padding(monkeypatch):
    """Laid one behind the other they give the loss and gradients of the padded ones."""
    model = random_model(tiny_config(300))
    idx, targets = torch.randint(300, (4, 100)), torch.randint(300, (4, 100))
    for row, (prompt, end) in enumerate([(10, 100), (5, 20), (0, 0), (30, 33)]):
        targets[row, :prompt] = targets[row, end:] = IGNORE
    sizes, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda *args, **named: sizes.append(args[0].shape) or hidden(*args, **named))
    model(idx, targets).backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    full = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(model(idx, targets), full)
    full.backward()
    for a, p in zip(ours, model.parameters()):
        torch.testing.assert_close(a, p.grad, atol=1e-4, rtol=1e-4)
    assert sizes[0] == (1, 100 + 32 + 48)  # lengths are rounded up to multiples of 16
