"""A model with another tokenizer: what both tokenizers know stays as it was."""
import torch
from conftest import random_model, tiny_config

from checkpoint import WEIGHTS, load_model, save_model
from pretrain import train_tokenizer
from study import revocabulary

TEXTS = ["小猫在河边捡到一把铲子。", "山坡上飘来一阵香味。"] * 200


def test_known_pieces_keep_their_embeddings(tok):
    model = random_model(tiny_config(tok.vocab_size))
    new = train_tokenizer(TEXTS, 340)
    widened = revocabulary.revocabulary(model, tok, new)
    before, after = model.lm_head.weight, widened.lm_head.weight
    assert after is widened.model.embed_tokens.weight and len(after) == new.vocab_size
    same = [(i, tok.sp.piece_to_id(piece)) for i in range(new.vocab_size)
            if (piece := new.sp.id_to_piece(i)) in {tok.sp.id_to_piece(j) for j in range(tok.vocab_size)}]
    assert len(same) > 260 and all(torch.equal(after[i], before[j]) for i, j in same)
    char = new.sp.piece_to_id("坡")  # the other one spells it in three bytes
    assert torch.allclose(after[char], before[tok.encode("坡")].mean(0)) and len(tok.encode("坡")) == 3
    for name, tensor in model.model.layers.state_dict().items():
        assert torch.equal(widened.model.layers.state_dict()[name], tensor)


def test_the_command_writes_a_model_that_loads(tok, tmp_path, refused):
    save_model(tmp_path / "old", random_model(tiny_config(tok.vocab_size)), tok)
    new = train_tokenizer(TEXTS, 340)
    save_model(tmp_path / "with", random_model(tiny_config(new.vocab_size)), new)
    argv = [tmp_path / "old", tmp_path / "with" / "tokenizer.model", tmp_path / "out"]
    revocabulary.main(list(map(str, argv)))
    model, tokenizer = load_model(tmp_path / "out")
    assert model.config.vocab_size == tokenizer.vocab_size == new.vocab_size
    refused(revocabulary.main, [tmp_path / "none", argv[1], tmp_path / "x"], "none")
    before = (tmp_path / "out" / WEIGHTS).read_bytes()
    refused(revocabulary.main, argv, tmp_path / "out", "already")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == before
    save_model(tmp_path / "untied", random_model(tiny_config(tok.vocab_size, tie_embeddings=False)), tok)
    refused(revocabulary.main, [tmp_path / "untied", argv[1], tmp_path / "x"], "not tied")
    assert not (tmp_path / "x").exists()
