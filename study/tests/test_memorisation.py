"""study/memorisation.py against brute force."""
import random

import numpy as np
import pytest

from study.memorisation import highest_rouge2, longest_common, measure


def test_longest_common_substring_and_rouge2_against_brute_force():
    rng = random.Random(0)
    training = ["".join(rng.choices("猫狗兔河山", k=rng.randint(1, 60))) for _ in range(30)]
    stories = ["".join(rng.choices("猫狗兔河山鸟", k=rng.randint(0, 50))) for _ in range(30)] + [training[3], "鸟", ""]

    def longest(story):
        return max((j - i for i in range(len(story)) for j in range(i + 1, len(story) + 1)
                    if any(story[i:j] in t for t in training)), default=0)
    assert longest_common(stories, training) == [longest(s) for s in stories]

    def rouge2(story):
        grams = [story[i:i + 2] for i in range(len(story) - 1)]
        counts = [[t[i:i + 2] for i in range(len(t) - 1)] for t in training]
        return max((sum(min(grams.count(g), c.count(g)) for g in set(grams)) / len(grams) for c in counts),
                   default=0) if grams else 0
    assert highest_rouge2(stories, training) == pytest.approx([rouge2(s) for s in stories])


def test_measure_gives_the_means():
    training = ["小猫在河边。", "小狗在树下。"]
    numbers = measure(training)
    assert numbers(["小猫在树下。", training[0]]) == {
        "lcs": np.mean([4, 6]), "rouge2": pytest.approx(np.mean([3 / 5, 1]))}
