"""average.py: the mean of models, and what has none."""
import pytest
import torch
from conftest import STORIES, random_model, tiny_config

import pretrain
from checkpoint import load_model, save_model
from study import average


def test_average(tok, tmp_path, capsys, refused):
    models = [random_model(tiny_config(tok.vocab_size), seed) for seed in range(3)]
    models[2].bfloat16()
    a, b, c = (tmp_path / name for name in "abc")
    for path, model in zip((a, b, c), models):
        save_model(path, model, tok)
    average.main([str(a), str(b), str(c), "--out", str(tmp_path / "mean")])
    assert "3 models" in capsys.readouterr().out
    mean, _ = load_model(tmp_path / "mean")
    for p, *others in zip(mean.parameters(), *(model.parameters() for model in models)):
        assert p.dtype == torch.float32 and torch.allclose(p, sum(o.float() for o in others) / 3, atol=1e-6)

    refused(average.main, [a, "--out", tmp_path / "one"], "two or more")
    refused(average.main, [a, b, "--out", c], c, "already")
    refused(average.main, [a, tmp_path / "none", "--out", tmp_path / "two"], "none", "config.json")
    save_model(tmp_path / "wide", random_model(tiny_config(tok.vocab_size, n_layer=3)), tok)
    refused(average.main, [a, tmp_path / "wide", "--out", tmp_path / "two"], "wide", "another model")
    other = pretrain.train_tokenizer(STORIES[:20] * 8, tok.vocab_size)
    save_model(tmp_path / "other", random_model(tiny_config(tok.vocab_size)), other)
    refused(average.main, [a, tmp_path / "other", "--out", tmp_path / "two"], "other", "tokenizer")
    assert not (tmp_path / "one").exists() and not (tmp_path / "two").exists()


def test_what_cannot_be_written_leaves_nothing(tok, tmp_path, monkeypatch, refused):
    for name in "ab":
        save_model(tmp_path / name, random_model(tiny_config(tok.vocab_size)), tok)

    def disk_full(directory, *_):
        (directory / "config.json").touch()
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(average, "save_model", disk_full)
    refused(average.main, [tmp_path / "a", tmp_path / "b", "--out", tmp_path / "mean"], "No space left")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_interpolate(tok, share):
    a, b = (random_model(tiny_config(tok.vocab_size), seed).bfloat16() for seed in (0, 1))
    expected = [(p + share * (q - p)).detach() for p, q in zip(a.float().parameters(), b.float().parameters())]
    average.interpolate(a, b.bfloat16(), share)
    for p, wanted in zip(a.parameters(), expected):
        torch.testing.assert_close(p.data, wanted)
