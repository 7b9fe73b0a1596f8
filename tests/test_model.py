from dataclasses import dataclass, fields

import pytest
import torch
import torch.nn.functional as F
from conftest import GEOMETRIES, random_model, tiny_config

import checkpoint
import model as model_file
from checkpoint import load_model, save_model, save_tokenizer
from model import GPT, IGNORE, PRESETS, GPTConfig


def test_presets_have_the_stated_size(capsys):
    with torch.device("meta"):
        sizes = {name: GPT(config).num_params() for name, config in PRESETS.items()}
    assert sizes == {"small": 6_688_000, "microstories": 43_915_776}
    assert PRESETS["small"] == GPTConfig()
    model_file.main([])
    printed = capsys.readouterr().out
    assert "43,915,776" in printed and "6,688,000" in printed


@pytest.mark.parametrize("name", GEOMETRIES)
def test_logits_equal_transformers_both_ways(name, tok, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = random_model(tiny_config(tok.vocab_size, **GEOMETRIES[name]))
    save_model(tmp_path / "ours", ours, tok)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64).eval()
    idx = torch.randint(0, tok.vocab_size, (3, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(idx).logits
        assert expected.abs().max() > 1  # not two models that are both silent
        # in float64: float32 sums differ by processor, and one logit in 150,000 by more than that
        torch.testing.assert_close(ours.double()(idx), expected, atol=1e-4, rtol=0)
    theirs.float().save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()  # several shards
    save_tokenizer(tmp_path / "theirs", tok)
    back, _ = load_model(tmp_path / "theirs")
    assert back.config == ours.config
    with torch.no_grad():
        torch.testing.assert_close(back.double()(idx), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes", [{"window": 64, "soft_cap": 30.0}, {"window": None}, {}])
def test_every_field_of_the_config_survives_also_one_that_adds_no_weight(changes, tok, tmp_path, monkeypatch):
    @dataclass
    class Forked(GPTConfig):
        window: int | None = 512
        soft_cap: float | None = None

    different = {"block_size": 96, "n_layer": 1, "n_head": 4, "n_kv_head": 2, "head_size": 10, "n_embd": 24,
                 "intermediate_size": 40, "rope_base": 5e4, "norm_eps": 1e-4, "tie_embeddings": False,
                 "rope_scaling": GEOMETRIES["llama3"]["rope_scaling"], "qkv_bias": True, "qk_norm": True}
    assert different.keys() | {"vocab_size"} == {field.name for field in fields(GPTConfig)}
    config = Forked(vocab_size=tok.vocab_size, **different, **changes)
    monkeypatch.setattr(checkpoint, "GPTConfig", Forked)
    save_model(tmp_path, random_model(config), tok)
    assert load_model(tmp_path)[0].config == config


def test_a_text_longer_than_the_context_is_refused():
    with pytest.raises(ValueError):
        random_model(tiny_config(300))(torch.zeros(1, 129, dtype=torch.long))


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
    cos, _ = model_file.rope_angles(torch.arange(512), tiny_config(300))
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
