"""Which features does a story have? A small classifier, for those that no rule can tell: python study/features.py

Logistic regression on character n-grams, trained on built-in stories, whose labels are true by construction. Its
quality is measured on plots that it has not seen: with other stories of the same plot in training it would recognise
the plot, and the number would say nothing about a story that somebody else wrote. A feature counts as checkable where
its AUC on unseen plots is at least 0.9.
"""
import functools
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import command_line  # noqa: E402

import numpy as np  # noqa: E402
from scipy import sparse  # noqa: E402
from sklearn.feature_extraction.text import HashingVectorizer  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.metrics import roc_auc_score, roc_curve  # noqa: E402
from sklearn.model_selection import GroupKFold, cross_val_predict  # noqa: E402

from constraints import FEATURES  # noqa: E402
from data import generate, language  # noqa: E402
from data.builtin import SEEDS  # noqa: E402

NAMES = [name for name in FEATURES if name != "对话"]  # constraints.py has a rule for 对话
CHECKABLE = 0.9
STORIES = 4_000
ENDING = 60  # characters: how a story ends is told apart from what it says on the way
FOLDS = 5
NGRAMS = HashingVectorizer(analyzer="char", ngram_range=(1, 4), n_features=1 << 17, binary=True, alternate_sign=False,
                           lowercase=False)


def labelled(n, seed):
    """-> texts, labels (n, len(NAMES)) of bool, the name of each story's plot."""
    world = language.load()
    stories = [generate.compose(world, random.Random(f"{seed}-{i}")) for i in range(n)]
    labels = np.array([[name in record["features"] for name in NAMES] for record, _ in stories])
    return [record["text"] for record, _ in stories], labels, [source["plot"]["name"] for _, source in stories]


def vectors(texts):
    """-> sparse (len(texts), 2 x 2^17): which n-grams a story has, and which its ending has."""
    return sparse.hstack([NGRAMS.transform(texts), NGRAMS.transform([text[-ENDING:] for text in texts])]).tocsr()


class Detector:
    """Which features has this story? auc: {feature: AUC on stories of plots that were not trained on}.

    A threshold is where the two classes' rates of correct answers, on such stories, have the highest mean."""

    def __init__(self, texts, labels, plots):
        x = vectors(texts)
        folds = GroupKFold(FOLDS, shuffle=True, random_state=0)
        self.auc, self.thresholds, self.models = {}, {}, {}
        for name, y in zip(NAMES, labels.T):
            model = LogisticRegression(solver="liblinear", class_weight="balanced")
            scores = cross_val_predict(model, x, y, groups=plots, cv=folds, method="decision_function")
            false_positives, true_positives, thresholds = roc_curve(y, scores)
            self.auc[name] = float(roc_auc_score(y, scores))
            self.thresholds[name] = thresholds[np.argmax(true_positives - false_positives)]
            self.models[name] = model.fit(x, y)

    def checkable(self):
        return [name for name in NAMES if self.auc[name] >= CHECKABLE]

    def __call__(self, story):
        """-> {feature: True or False}, the checkable ones; all False for an empty story."""
        x = vectors([story])
        return {name: bool(story) and bool(self.models[name].decision_function(x)[0] >= self.thresholds[name])
                for name in self.checkable()}


@functools.cache
def detector():
    """The classifier of the built-in stories; half a minute."""
    return Detector(*labelled(STORIES, SEEDS["features"]))


def main(argv=None):
    command_line("Train the classifier of story features and print its AUC on unseen plots.").parse_args(argv)
    detect = detector()
    for name in NAMES:
        print(f"{name:<6}AUC {detect.auc[name]:.3f}" + ("" if name in detect.checkable() else "  (not checkable)"))


if __name__ == "__main__":
    from study.features import main
    main()
