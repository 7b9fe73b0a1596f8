"""study/copying.py: the loss of each piece, by the character at which it begins."""
import pytest
import torch
from conftest import random_model, tiny_config

from study.copying import piece_losses


def test_piece_losses_stand_at_the_characters_where_pieces_begin(tok):
    model, text = random_model(tiny_config(tok.vocab_size)), "小猫😀在河边。"
    ids, end = tok.encode(text), text.index("在")
    assert sum(len(tok.decode([i])) for i in ids) > len(text)  # the smiley is bytes, each no character alone
    found = piece_losses(model, tok, [tok.eos_id], text)
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(torch.tensor([[tok.eos_id, *ids[:-1]]]))[0], torch.tensor(ids),
                                                   reduction="none").tolist()
    piece = next(i for i in range(len(ids)) if tok.decode(ids[:i]) == text[:end])
    assert found[0] == pytest.approx(losses[0]) and found[end] == pytest.approx(losses[piece])
    assert max(found) < len(text)
    size = model.config.block_size
    assert len(piece_losses(model, tok, [tok.eos_id], "小猫在河边。" * size)) <= size - 1
