"""features.py: the classifier of story features, and that it is judged on plots it has not seen."""
import random

import numpy as np
from sklearn.metrics import roc_auc_score

from study import features
from study.features import NAMES, Detector, detector, vectors


def planted(rng, plot):
    """A story that is mostly its plot's own words; 坏结局 is said in words that all plots share, 伏笔 is its plot's."""
    own = "".join(chr(0x4E00 + 50 * plot + rng.randrange(40)) for _ in range(80))
    sad = rng.random() < 0.5
    labels = [{"坏结局": sad, "伏笔": plot % 2 == 0}.get(name, rng.random() < 0.5) for name in NAMES]
    return own + ("他伤心地哭了。" if sad else "他开心地笑了。"), labels, f"plot{plot}"


def test_ngrams():
    x = vectors(["", "河", "小猫在河边" * 50])
    assert x.shape == (3, 2 * features.NGRAMS.n_features)
    assert x.getnnz(axis=1)[:2].tolist() == [0, 2]  # as a part of the story and of its ending


def test_a_plot_is_not_recognised_but_what_plots_share_is():
    rng = random.Random(1)
    texts, labels, plots = zip(*(planted(rng, plot) for _ in range(30) for plot in range(20)))
    labels = np.array(labels)
    detect = Detector(texts, labels, plots)
    assert detect.auc["坏结局"] > 0.95 and detect.auc["伏笔"] < 0.8
    assert detect.checkable() == ["坏结局"]
    assert detect("他伤心地哭了。") == {"坏结局": True}
    assert detect("他开心地笑了。") == detect("") == {"坏结局": False}
    # with the plot in training, the label of its plot is easy
    scores = detect.models["伏笔"].decision_function(vectors(texts))
    assert roc_auc_score(labels[:, NAMES.index("伏笔")], scores) > 0.95


def test_trained_on_the_built_in_stories_it_judges_unseen_plots_and_says_how_well(capsys):
    detect = detector()
    assert set(detect.auc) == set(NAMES) and detect.auc["坏结局"] > 0.85
    texts, labels, plots = features.labelled(200, 5)
    assert len(set(plots)) > 50
    sad = detect.models["坏结局"].decision_function(vectors(texts)) >= detect.thresholds["坏结局"]
    assert np.mean(sad == labels[:, NAMES.index("坏结局")]) > 0.85
    again = Detector(*features.labelled(300, 5)), Detector(*features.labelled(300, 5))
    assert again[0].auc == again[1].auc and again[0].thresholds == again[1].thresholds
    features.main([])
    known = "" if "坏结局" in detect.checkable() else "  (not checkable)"
    assert f"坏结局   AUC {detect.auc['坏结局']:.3f}{known}\n" in capsys.readouterr().out
