"""Which stories are nearly the same? MinHash in bands (Broder 1997), so that not every pair has to be compared."""
import zlib
from functools import cache

import numpy as np
from tqdm import tqdm

SHINGLE, BANDS, BAND = 8, 32, 8  # characters of a shingle; 32 bands of 8 minima find 99.7% of pairs of Jaccard 0.8
NEAR = 0.8                       # Jaccard similarity of near-duplicates


def shingles(text):
    """Hashes (32 bits) of every SHINGLE characters in a row, sorted; of the whole text if it is shorter."""
    starts = range(max(1, len(text) - SHINGLE + 1))
    return np.unique(np.array([zlib.crc32(text[i:i + SHINGLE].encode()) for i in starts], np.uint32))


def near_duplicates(texts):
    """Folded texts -> (N,) the number of the cluster that each is in. MinHash finds the pairs to
    compare; they are near-duplicates if the Jaccard similarity of their shingles is at least NEAR."""
    rng = np.random.default_rng(0)
    multipliers = rng.integers(1 << 31, size=(BANDS * BAND, 1), dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    mixers = rng.integers(1 << 62, size=BAND, dtype=np.uint64)
    sets = [shingles(text) for text in tqdm(texts, desc="near-duplicates", unit="story", disable=None)]
    # each minimum is the first shingle in another random order of all
    bands = np.stack([((s * multipliers).min(1).reshape(BANDS, BAND) * mixers).sum(1) for s in sets])
    parent = list(range(len(sets)))

    def root(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    @cache
    def alike(i, j):
        common = len(np.intersect1d(sets[i], sets[j], assume_unique=True))
        return common >= NEAR * (len(sets[i]) + len(sets[j]) - common)

    for band in bands.T:
        order = np.argsort(band, kind="stable")
        for same in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
            leaders = []  # one text of each cluster, so that a thousand copies take a thousand comparisons
            for i in same.tolist() if len(same) > 1 else ():
                leader = next((j for j in leaders if root(i) == root(j) or alike(j, i)), None)
                if leader is None:
                    leaders.append(i)
                else:
                    parent[root(i)] = root(leader)
    return np.array([root(i) for i in parent])
