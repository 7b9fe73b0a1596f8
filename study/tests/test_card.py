"""card.py and ship.py: what is said of the base that ships, and how it is made."""
import json
import re
from itertools import islice

import numpy as np
import pytest
from conftest import random_model, tiny_config

from checkpoint import load_model, save_model
from constraints import parse
from data import books, builtin
from data.judged import HANDWRITTEN, read_rows
from sample import CASES
from study import card, ship


def test_the_card_prints_losses_and_samples(capsys, monkeypatch):
    monkeypatch.setattr(card, "texts", lambda: {"ours": builtin.plain_stories(45)[:20]})
    monkeypatch.setattr(books, "EXERCISED", 20)
    card.main([])
    out = capsys.readouterr().out
    loss, tokens, bits = (float(cell) for cell in out.split("ours (20 fit into the context) |")[1].split("|")[:3])
    assert loss < 2 and bits == pytest.approx(loss * tokens / 0.6931, abs=2e-3) and out.count("\n> ") >= 10
    first, again = (float(x) for x in re.findall(r"([\d.]+) where they", out))
    assert again < 1 < 3 < first  # it copies
    by_kind = dict(re.findall(r"(sentences|words|characters) (\d+\.\d+)", out))
    assert len(by_kind) == 3 and all(float(loss) < 1 for loss in by_kind.values())  # word for word


def test_a_run_becomes_a_base(tok, tmp_path, refused):
    run, base = tmp_path / "run", tmp_path / "base"
    refused(ship.main, [run], "run", "config.json")
    save_model(run, random_model(tiny_config(tok.vocab_size)), tok)
    refused(ship.main, [run, "--out", base], "train.bin")
    assert not base.exists()
    (run / "tokens").mkdir()
    np.arange(1000, dtype=np.uint16).tofile(run / "tokens" / "train.bin")
    (run / "args.json").write_text(json.dumps({"batch_size": 2, "grad_accum": 1, "block_size": 100}))
    (run / "log.jsonl").write_text(json.dumps({"step": 0}) + "\n" + json.dumps({"step": 15}) + "\n")
    (run / "loss.png").write_bytes(b"png")
    ship.main([str(run), "--out", str(base)])
    corpus = json.loads((base / "corpus.json").read_text(encoding="utf-8"))
    assert (corpus["tokens"], corpus["epochs"]) == (1000, 3.0)
    shipped = json.loads((ship.ROOT / "base" / "corpus.json").read_text(encoding="utf-8"))
    # fields that do not depend on the run: they are those of the base that ships
    same = {"texts", "exercises", "seed", "sha256_of_heldout_stories"}
    if corpus["version"] == shipped["version"]:
        same |= {"sha256_of_first_1000_texts", "sha256_of_first_1000_exercises"}
    assert {name: corpus[name] for name in same} == {name: shipped[name] for name in same}
    assert set(corpus) == set(shipped)
    model, _ = load_model(base)
    assert str(model.lm_head.weight.dtype) == "torch.bfloat16" and (base / "loss.png").read_bytes() == b"png"


def test_no_text_of_pretraining_has_a_handwritten_sentence_or_summary():
    """What evaluate.py asks for by hand, and the study's test cases, in all exercises and 20,000 books."""
    asked = [v for r in read_rows(HANDWRITTEN) for k, v in r["constraints"].items() if k in ("摘要", "随机句子")]
    asked += [v for _, text, _ in CASES for v in parse(text)[0].values() if isinstance(v, str)]
    asked = [text.rstrip("。！？") for text in asked]
    assert len(asked) > 100
    for text in islice(builtin.pretraining(), builtin.EXERCISES + 20_000):
        assert not [a for a in asked if a in text]
