"""Has a model learnt its training stories by heart? What `evaluate` takes as `measure`.

    known = stories that the model was trained on
    evaluate(model, tokenizer, rows, measure=memorisation.measure(known))      # adds "lcs" and "rouge2" to the result
"""
from collections import Counter, defaultdict

import numpy as np


def measure(training):
    """-> a function of stories: {"lcs": mean length of the longest substring that some training story has too, in
    characters, "rouge2": mean of the highest ROUGE-2 precision against one training story}."""
    def numbers(stories):
        return {"lcs": float(np.mean(longest_common(stories, training))),
                "rouge2": float(np.mean(highest_rouge2(stories, training)))}
    return numbers


class Grams:
    """Hashes of n-grams of texts, for any n: with S(k) = sum over j < k of c(j) B^j modulo 2^64, where c are the
    characters of all texts, the hash of the gram at i is (S(i + n) - S(i)) / B^i (Karp and Rabin 1987)."""

    BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse

    def __init__(self, texts):
        codes = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32).astype(np.uint64)
        lengths = np.array([len(text) for text in texts], np.int64)
        self.owner = np.repeat(np.arange(len(texts)), lengths)
        self.end = np.repeat(np.cumsum(lengths), lengths)  # of the text that a character belongs to
        powers, self.inverse = (np.cumprod(np.r_[np.uint64(1), np.full(len(codes), base, np.uint64)])
                                for base in (self.BASE, pow(self.BASE, -1, 1 << 64)))
        self.sums = np.r_[np.uint64(0), np.cumsum(codes * powers[:-1])]

    def at(self, start, n):
        """-> (those of the positions `start` at which n characters are left, the hashes of their n-grams)."""
        start = start[start + n <= self.end[start]]
        return start, (self.sums[start + n] - self.sums[start]) * self.inverse[start]


def isin(values, others):
    """np.isin, by bisection: the few are sorted, the many are not."""
    others = np.sort(others)
    found = np.searchsorted(others, values)
    return (found < len(others)) & (others[np.minimum(found, len(others) - 1)] == values) if len(others) else found < 0


def longest_common(stories, training):
    """For each story the length of its longest substring that some training story has too, found by bisection over n:
    are any of its n-grams among theirs? Where no n-gram is shared, no longer one need be looked for."""
    ours, theirs = Grams(stories), Grams(training)
    longest = np.zeros(len(stories), int)

    def bisect(which, lo, hi, start, theirs_start):  # their longest is at least lo and below hi; starts of shared grams
        if hi - lo == 1 or not len(which):
            longest[which] = lo
            return
        middle = (lo + hi) // 2
        a, a_hashes = ours.at(start[np.isin(ours.owner[start], which)], middle)
        b, b_hashes = theirs.at(theirs_start, middle)
        b_shared = isin(b_hashes, a_hashes)
        a_shared = isin(a_hashes, b_hashes[b_shared])
        has = np.isin(which, ours.owner[a[a_shared]])
        bisect(which[~has], lo, middle, start, theirs_start)
        bisect(which[has], middle, hi, a[a_shared], b[b_shared])

    bisect(np.arange(len(stories)), 0, max(map(len, stories), default=0) + 1, np.arange(len(ours.owner)),
           np.arange(len(theirs.owner)))
    return longest.tolist()


def highest_rouge2(stories, training):
    """For each story the highest ROUGE-2 precision against one training story: the share of its character 2-grams
    (each as often as both have it) that one of them has. By an index 2-gram -> training stories."""
    index = defaultdict(Counter)
    for i, text in enumerate(training):
        for j in range(len(text) - 1):
            index[text[j:j + 2]][i] += 1
    arrays = {gram: (np.array(list(c)), np.array(list(c.values()))) for gram, c in index.items()}
    highest = []
    for story in stories:
        shared = np.zeros(len(training))
        grams = Counter(story[j:j + 2] for j in range(len(story) - 1))
        for gram, count in grams.items():
            if gram in arrays:
                who, often = arrays[gram]
                shared[who] += np.minimum(often, count)
        highest.append(float(shared.max() / grams.total()) if grams and len(training) else 0.0)
    return highest
