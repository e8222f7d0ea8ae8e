"""Texts that say again what an earlier one says: in the same words, or in nearly the same.

    similarity     Jaccard index of the sets of word 5-grams, in [0, 1]: common / all of both (arXiv 2107.06499, which
                   estimates it; here it is exact)

Two sets that are similar by t share one of their rarest grams: of n, one of the n - ceil(t n) + 1 rarest (prefix
filtering, Bayardo et al. 2007), so that only texts with one of these in common are compared.

Grams are held as hashes of 8 bytes, in unnamed files: in memory are how often they come, by hash modulo `COUNTED`, the
rarest ones that several texts have, and which kept texts have these. Any order of the grams that is the same for all
texts will do, and hashes that collide only let more texts be compared; what is alike by hashes is compared by words.
"""

import os
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from tempfile import TemporaryFile
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

WORDS = 5
"""Of a gram; a shorter text is one gram."""
AT_ONCE = 1 << 20
"""Hashes that are looked at together."""
SORTED = 1 << 23
"""Hashes that are sorted together."""
COUNTED = 1 << 24


def grams(text: str) -> frozenset[str]:
    words = text.casefold().split()
    return frozenset(" ".join(words[at : at + WORDS]) for at in range(max(1, len(words) - WORDS + 1)))


def similarity(a: frozenset[str], b: frozenset[str]) -> float:
    return _jaccard(len(a & b), len(a), len(b))


def _jaccard(common: int, a: int, b: int) -> float:
    return common / (a + b - common)


class Texts(Protocol):
    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[str]: ...

    def __getitem__(self, at: int, /) -> str: ...


def distinct(texts: Texts, threshold: float) -> list[int]:
    """Indices of the texts that are similar by `threshold`, in (0, 1], to no earlier one of these.

    Texts are gone through once; those that are alike by hashes are asked for again.
    """
    with TemporaryFile() as all_of_them, TemporaryFile() as rarest_of_them:
        hashes, rarest = Hashes(all_of_them), Hashes(rarest_of_them)
        for text in tqdm(texts, desc="grams", unit="row"):
            own = grams(text)
            hashes.add(array("q", map(hash, own)), [len(own)])
        _choose(hashes, rarest, threshold)
        return _kept(texts, hashes, rarest, threshold)


class Hashes:
    """Lists of hashes in a file, one a text."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.starts = file, array("q", [0])

    def add(self, hashes: Any, lengths: Iterable[int]) -> None:
        """The lists of some more texts, one behind the other."""
        self.file.write(hashes.tobytes())
        for length in lengths:
            self.starts.append(self.starts[-1] + length)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        return self._read(index, index + 1)

    def batches(self) -> Iterator[tuple[range, NDArray[np.int64]]]:
        """(texts, their lists, one behind the other)."""
        self.file.flush()
        first = 0
        while first < len(self.starts) - 1:
            end = max(first + 1, bisect_right(self.starts, self.starts[first] + AT_ONCE) - 1)
            yield range(first, end), self._read(first, end)
            first = end

    def _read(self, first: int, end: int) -> NDArray[np.int64]:
        start, stop = self.starts[first], self.starts[end]
        return np.frombuffer(os.pread(self.file.fileno(), 8 * (stop - start), 8 * start), np.int64)


def _choose(hashes: Hashes, rarest: Hashes, threshold: float) -> None:
    """The rarest of every text."""
    counts = np.zeros(COUNTED, np.uint32)
    for _, some in hashes.batches():
        places, numbers = np.unique(some % COUNTED, return_counts=True)
        counts[places] += numbers.astype(np.uint32)
    for texts, some in hashes.batches():
        lengths = np.diff(hashes.starts[texts.start : texts.stop + 1])
        enough = lengths - np.ceil(threshold * lengths - 1e-9).astype(int) + 1  # 0.7 * 10 is a little over 7
        order = np.lexsort((some, counts[some % COUNTED], np.repeat(np.arange(len(texts)), lengths)))
        place = np.arange(len(some)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        rarest.add(some[order][place < np.repeat(enough, lengths)], enough.tolist())


def _shared(rarest: Hashes) -> NDArray[np.int64]:
    """The hashes that come more than once, sorted; and the largest number, so that there is one."""
    parts = 1 + rarest.starts[-1] // SORTED
    found = []
    for part in range(parts):
        some = np.concatenate([np.zeros(0, np.int64), *(one[one % parts == part] for _, one in rarest.batches())])
        some.sort()
        found.append(np.unique(some[1:][some[1:] == some[:-1]]))
    return np.sort(np.concatenate([*found, np.full(1, np.iinfo(np.int64).max)]))


def _kept(texts: Texts, hashes: Hashes, rarest: Hashes, threshold: float) -> list[int]:
    """Kept texts hang together by each hash that they share: `last` is the last one's link, `before` the one before."""
    shared = _shared(rarest)
    last, holders, before = array("i", [-1]) * len(shared), array("i"), array("i")
    kept = []
    with tqdm(total=len(texts), desc="deduplicate", unit="row") as progress:
        for some, own_ones in rarest.batches():
            places = np.searchsorted(shared[:-1], own_ones)
            places[shared[places] != own_ones] = -1
            for index in some:
                begin = rarest.starts[some.start]
                own = places[rarest.starts[index] - begin : rarest.starts[index + 1] - begin]
                links = own[own >= 0].tolist()
                others = set()
                for link in map(last.__getitem__, links):
                    while link >= 0:
                        others.add(holders[link])
                        link = before[link]
                if not _is_like(texts, hashes, index, others, threshold):
                    kept.append(index)
                    for place in links:
                        before.append(last[place])
                        last[place] = len(holders)
                        holders.append(index)
            progress.update(len(some))
    return kept


def _is_like(texts: Texts, hashes: Hashes, index: int, others: set[int], threshold: float) -> bool:
    """Whether a text is similar to one of the others; no more is common to them than seems so by hashes."""
    if not others:
        return False
    listed = hashes[index].tolist()
    own = set(listed)
    for other in others:
        theirs = hashes[other].tolist()
        common = min(len(own.intersection(theirs)) + len(listed) - len(own), len(listed), len(theirs))
        if (
            _jaccard(common, len(listed), len(theirs)) >= threshold
            and similarity(grams(texts[index]), grams(texts[other])) >= threshold
        ):
            return True
    return False
