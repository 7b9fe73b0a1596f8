"""Which features does a story have? A small classifier, for those that no rule can tell.

    python features.py        # trains it on built-in stories and prints how well it judges plots that it has not seen

Logistic regression on character n-grams. It is held out by whole plots, not by story: with a story's siblings in
training it would recognise the plot, and say nothing of a story that somebody else has told. A feature counts as
checkable where its AUC on unseen plots is at least 0.9.
"""
import argparse
import hashlib
import pickle
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import write_atomic
from common import fail
from constraints import FEATURES

NAMES = [name for name in FEATURES if name != "对话"]  # 对话 is seen by a rule, see constraints.py
CHECKABLE = 0.9
STORIES, SEED = 8_000, 97  # the labelled stories: of a seed that nothing else is trained on
LENGTHS = (1, 2, 3, 4)      # of the n-grams
ENDING = 60                 # characters: how a story ends is told apart from what it says on the way
BITS = 16                   # of a bucket's number
BUCKETS = 1 << BITS
FOLDS = 5
CACHE = Path("out/features.pt")


def gram_hashes(texts, n):
    """The hashes of all character n-grams of the texts (uint64), and the text that each is from."""
    codes = [np.frombuffer(t.encode("utf-32-le"), np.uint32).astype(np.uint64) for t in texts]
    power = np.uint64(0x9E3779B97F4A7C15) ** np.arange(n, dtype=np.uint64)  # wraps around, as hashes do
    hashes = [np.convolve(c, power, "valid") if len(c) >= n else c[:0] for c in codes]
    return np.concatenate(hashes), np.repeat(np.arange(len(texts)), [len(h) for h in hashes])


def buckets(text):
    """The distinct n-grams of a story, and once more those of its ending, as bucket numbers (int64)."""
    found = []
    for part, salt in ((text, 0), (text[-ENDING:], 1)):
        for n in LENGTHS:
            mixed = (gram_hashes([part], n)[0] + np.uint64(2 * n + salt)) * np.uint64(0xD6E8FEB86659FD93)
            found.append(mixed >> np.uint64(64 - BITS))
    return torch.from_numpy(np.unique(np.concatenate(found)).astype(np.int64))


class Classifier(nn.Module):
    """A list of bucket arrays -> logits (B, len(NAMES)): the sum of the weights of a story's n-grams, over the root
    of their number, plus a bias."""

    def __init__(self):
        super().__init__()
        self.weights = nn.EmbeddingBag(BUCKETS, len(NAMES), mode="sum")
        self.bias = nn.Parameter(torch.zeros(len(NAMES)))
        nn.init.zeros_(self.weights.weight)

    def forward(self, grams):
        lengths = torch.tensor([len(g) for g in grams])
        offsets = lengths.cumsum(0) - lengths
        return self.weights(torch.cat(grams), offsets) / lengths[:, None].clamp(min=1).sqrt() + self.bias


def fit(grams, labels, seed, epochs=3):
    """grams: bucket arrays; labels (N, len(NAMES)), 0 or 1. -> a Classifier, trained by AdamW on cross-entropy."""
    torch.manual_seed(seed)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(epochs):
        for rows in torch.randperm(len(grams)).split(64):
            logits = model([grams[i] for i in rows])
            loss = F.binary_cross_entropy_with_logits(logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def auc(scores, labels):
    """Area under the ROC curve: the probability that a story with the feature scores above one without (ties count
    half; Mann and Whitney 1947). nan if all stories are alike."""
    scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (count.cumsum() - (count - 1) / 2)[place]
    yes, no = labels.sum(), (~labels).sum()
    return float((ranks[labels].sum() - yes * (yes + 1) / 2) / (yes * no)) if yes and no else float("nan")


def balanced_threshold(scores, labels):
    """The score that tells best, judged by the mean of the two classes' rates of correct answers."""
    order = np.argsort(scores)
    labels, scores = np.asarray(labels, bool)[order], np.asarray(scores)[order]
    below = np.cumsum(~labels) / max(1, (~labels).sum()) - np.cumsum(labels) / max(1, labels.sum())
    i = int(np.argmax(below[:-1])) if len(below) > 1 else 0
    return float((scores[i] + scores[min(i + 1, len(scores) - 1)]) / 2)


def held_out_scores(grams, labels, plots, seed, progress=False):
    """Scores (N, len(NAMES)) of every story by a classifier that has seen no story of its plot."""
    names = sorted(set(plots))
    random.Random(seed).shuffle(names)
    fold = {name: i % FOLDS for i, name in enumerate(names)}
    fold = torch.tensor([fold[name] for name in plots])
    scores = torch.zeros(len(grams), len(NAMES))
    for k in tqdm(range(FOLDS), unit="fold", disable=None if progress else True):  # None: on a terminal only
        known, unseen = (fold != k).nonzero()[:, 0], (fold == k).nonzero()[:, 0]
        model = fit([grams[i] for i in known], labels[known], seed)
        with torch.no_grad():
            for rows in unseen.split(512):
                scores[rows] = model([grams[i] for i in rows])
    return scores


class Detector:
    """What evaluate.py asks: which features has this story? auc: {feature: AUC on unseen plots}."""

    def __init__(self, state):
        self.auc, self.thresholds = state["auc"], state["thresholds"]
        self.model = Classifier()
        self.model.load_state_dict(state["weights"])

    def checkable(self):
        return [name for name in NAMES if self.auc[name] >= CHECKABLE]

    @torch.no_grad()
    def __call__(self, story):
        """-> {feature: True or False}, the checkable ones; all False for an empty story."""
        scores = self.model([buckets(story)])[0].tolist() if story else [-np.inf] * len(NAMES)
        return {name: scores[NAMES.index(name)] > self.thresholds[name] for name in self.checkable()}


def labelled(n, seed):
    """-> texts, labels (n, len(NAMES)), the name of each story's plot."""
    from data.generate import compose, load
    _, plots = load()
    made = [compose(plots, random.Random(f"{seed}-{i}")) for i in range(n)]
    labels = torch.tensor([[float(name in record["features"]) for name in NAMES] for record, _ in made])
    return [record["text"] for record, _ in made], labels, [what["plot"]["name"] for _, what in made]


def train(progress=False):
    """Train on built-in stories -> the state of a `Detector`: plain dicts, tensors and numbers."""
    n, seed = STORIES, SEED
    texts, labels, plots = labelled(n, seed)
    grams = [buckets(text) for text in texts]
    scores = held_out_scores(grams, labels, plots, seed, progress)
    return {"seed": seed, "stories": n, "plots": len(set(plots)), "weights": fit(grams, labels, seed).state_dict(),
            "auc": {name: auc(scores[:, i], labels[:, i]) for i, name in enumerate(NAMES)},
            "thresholds": {name: balanced_threshold(scores[:, i].numpy(), labels[:, i])
                           for i, name in enumerate(NAMES)}}


def detector(progress=False):
    """The cached classifier, trained now if there is none for this corpus yet. Raises ValueError for a broken file."""
    from data.generate import LANGUAGE
    path = CACHE
    files = [LANGUAGE / "lexicon.toml", *sorted((LANGUAGE / "plots").glob("*.toml"))]
    corpus = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    if path.is_file():
        try:
            state = torch.load(path, weights_only=True)
            if state.get("corpus") == corpus:
                return Detector(state)
        except (RuntimeError, pickle.UnpicklingError, AttributeError, KeyError, EOFError):
            raise ValueError(f"{path}: not a cached classifier; delete it, and it is trained anew") from None
    state = train(progress=progress) | {"corpus": corpus}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda p: torch.save(state, p))
    return Detector(state)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train the classifier of story features and print its AUC on plots "
                                                 f"that it has not seen; it is kept in {CACHE}.")
    parser.error = fail
    parser.parse_args(argv)
    try:
        found = detector(progress=True)
    except (ValueError, OSError) as e:
        fail(e)
    for name in NAMES:
        print(f"{name:<6}AUC {found.auc[name]:.3f}" + ("" if name in found.checkable() else "  (not checkable)"))


if __name__ == "__main__":
    from features import main
    main()
