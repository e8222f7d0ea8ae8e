"""Texts that say again what an earlier one says: in the same words, or in nearly the same.

    similarity     Jaccard index of the sets of word 5-grams, in [0, 1]: common / all of both (arXiv 2107.06499, which
                   estimates it; here it is exact)

Two sets that are similar by t share one of their rarest grams: of n, one of the n - ceil(t n) + 1 rarest (prefix
filtering, Bayardo et al. 2007), so that only texts with one of these in common are compared.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from tqdm import tqdm

WORDS = 5
"""Of a gram; a shorter text is one gram."""


def grams(text: str) -> frozenset[str]:
    words = text.casefold().split()
    return frozenset(" ".join(words[at : at + WORDS]) for at in range(max(1, len(words) - WORDS + 1)))


def similarity(a: frozenset[str], b: frozenset[str]) -> float:
    common = len(a & b)
    return common / (len(a) + len(b) - common)


def distinct(texts: Sequence[str], threshold: float) -> list[int]:
    """Indices of the texts that are similar by `threshold`, in (0, 1], to no earlier one of these."""
    sets = [grams(text) for text in texts]
    counts = Counter(gram for one in sets for gram in one)
    rare: dict[str, list[int]] = defaultdict(list)
    kept = []
    for index in tqdm(range(len(texts)), desc="deduplicate", unit="row"):
        own = sets[index]
        enough = len(own) - math.ceil(threshold * len(own) - 1e-9) + 1  # 0.7 * 10 is a little over 7
        rarest = sorted(own, key=lambda gram: (counts[gram], gram))[:enough]
        others = {other for gram in rarest for other in rare.get(gram, ())}
        if any(similarity(own, sets[other]) >= threshold for other in others):
            continue
        kept.append(index)
        for gram in rarest:
            rare[gram].append(index)
    return kept
