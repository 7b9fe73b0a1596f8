"""Rare pieces of a model are told apart, and the others stay."""
import torch
from conftest import random_model, tiny_config

from checkpoint import load_model, save_model
from study import spread


def test_a_collapsed_piece_gets_a_rest_as_long_as_most(tok, tmp_path, capsys, refused):
    model = random_model(tiny_config(tok.vocab_size))
    torch.manual_seed(0)
    common = torch.randn(model.config.n_embd)
    with torch.no_grad():
        weight = model.lm_head.weight
        weight.copy_(torch.randn_like(weight) + common)
        weight[:40] = common + 0.05 * torch.randn_like(weight[:40])  # collapsed: all but the same
        weight[40:50] = weight[60] * 2  # pieces that never came: one and the same, and not short
    before = weight.detach().clone()
    save_model(tmp_path / "old", model, tok)
    spread.main([str(tmp_path / "old"), str(tmp_path / "new")])
    assert capsys.readouterr().out.count("cosine") == 2
    after = load_model(tmp_path / "new")[0].lm_head.weight.detach()
    assert spread.nearest(before)[:50].min() > 0.9 and spread.nearest(after)[:50].max() < 0.95
    mean = torch.nn.functional.normalize(before.mean(0), dim=0)
    assert torch.allclose(after @ mean, before @ mean, atol=1e-4)  # as rare as they were
    same = (after - before).norm(dim=1) < 1e-4
    assert 0.2 < same.float().mean() < 0.3 and not same[:50].any()
    assert torch.equal(spread.spread(before), spread.spread(before))
    refused(spread.main, [tmp_path / "old", tmp_path / "new"], tmp_path / "new", "already")
    save_model(tmp_path / "untied", random_model(tiny_config(tok.vocab_size, tie_embeddings=False)), tok)
    refused(spread.main, [tmp_path / "untied", tmp_path / "x"], "not tied")
