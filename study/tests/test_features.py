"""features.py: the classifier of story features, its AUC, and that it is judged on plots it has not seen."""
import json
import random

import features
import numpy as np
import pytest
import torch
from features import NAMES, Detector, auc, balanced_threshold, buckets, fit, gram_hashes, held_out_scores


def test_auc_against_counting_pairs():
    rng = random.Random(0)
    scores = [rng.choice([0, 1, 2, 3]) for _ in range(40)]
    labels = [rng.random() < 0.4 for _ in range(40)]
    pairs = [(a, b) for a, x in zip(scores, labels) if x for b, y in zip(scores, labels) if not y]
    assert auc(scores, labels) == pytest.approx(sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs))
    assert auc([1, 2, 3], [0, 0, 1]) == 1 and np.isnan(auc([1, 2], [1, 1]))


def test_the_threshold_parts_what_can_be_parted():
    assert 2 < balanced_threshold([1.0, 5.0, 2.0, 4.0], [0, 1, 0, 1]) < 4


def test_ngrams():
    assert len(gram_hashes(["河"], 2)[0]) == 0
    assert len(buckets("")) == 0 and len(buckets("河")) == 2  # as a part of the story and of its ending
    assert int(buckets("小猫在河边" * 50).max()) < features.BUCKETS


def planted(rng, plot):
    """A story that is mostly its plot's own words; 坏结局 is said in words that all plots share, 伏笔 is its plot's."""
    own = "".join(chr(0x4E00 + 50 * plot + rng.randrange(40)) for _ in range(80))
    sad = rng.random() < 0.5
    labels = [float({"坏结局": sad, "伏笔": plot % 2 == 0}.get(name, False)) for name in NAMES]
    return own + ("他伤心地哭了。" if sad else "他开心地笑了。"), labels, f"plot{plot}"


def test_a_plot_is_not_recognised_but_what_plots_share_is():
    rng = random.Random(1)
    texts, labels, plots = zip(*(planted(rng, plot) for plot in range(20) for _ in range(30)))
    grams, labels = [buckets(t) for t in texts], torch.tensor(labels)
    scores = held_out_scores(grams, labels, plots, 1)
    found = {name: auc(scores[:, i], labels[:, i]) for i, name in enumerate(NAMES)}
    assert found["坏结局"] > 0.95 and found["伏笔"] < 0.8
    known = fit(grams, labels, 1)  # with the plot in training, the label of its plot is easy
    with torch.no_grad():
        assert auc(known(grams)[:, NAMES.index("伏笔")], labels[:, NAMES.index("伏笔")]) > 0.95


def test_only_what_is_good_enough_is_told():
    state = {"auc": dict.fromkeys(NAMES, 0.89) | {"坏结局": 0.9}, "thresholds": dict.fromkeys(NAMES, 0.0),
             "weights": fit([buckets("他哭了。"), buckets("他笑了。")] * 40, torch.tensor([[1.0] * 5, [0.0] * 5] * 40),
                            1).state_dict()}
    detect = Detector(state)
    assert detect.checkable() == ["坏结局"]
    assert detect("他哭了。") == {"坏结局": True} and detect("他笑了。") == detect("") == {"坏结局": False}


def test_the_cache_is_used_and_made_anew_for_another_corpus(tmp_path, monkeypatch, capsys, refused):
    trained = []

    def train(progress):
        trained.append(1)
        return {"seed": 1, "auc": dict.fromkeys(NAMES, 1.0), "thresholds": dict.fromkeys(NAMES, 0.0),
                "weights": features.Classifier().state_dict()}
    monkeypatch.setattr(features, "train", train)
    path = tmp_path / "new" / "features.pt"
    monkeypatch.setattr(features, "CACHE", path)
    for _ in range(2):
        features.detector()
    assert len(trained) == 1
    torch.save(torch.load(path, weights_only=True) | {"corpus": "another"}, path)
    features.detector()
    assert len(trained) == 2
    features.main([])
    assert "坏结局   AUC 1.000" in capsys.readouterr().out
    path.write_bytes(b"not a cache")
    refused(features.main, [], path)


def test_trained_on_the_built_in_stories_it_judges_unseen_plots_and_says_how_well():
    state = features.train()
    assert set(state["auc"]) == set(NAMES) and state["auc"]["坏结局"] > 0.9
    json.dumps(state["auc"])
    again = features.train()
    assert again["auc"] == state["auc"] and torch.equal(again["weights"]["bias"], state["weights"]["bias"])
