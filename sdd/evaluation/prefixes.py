"""Rows of tokens as a tree of their common prefixes, so that what is equal token by token is computed once.

A node is computed after its parent, whose keys and values it attends to; siblings can be one batch. What makes a shared
prefix does not matter: a context before its choices, examples before all items of a task, the sentence before two
words. A prefix that is not long is shortened to a multiple of `STEP`, and its end repeated in the nodes after it: then
many have the same length, and a batch of them needs no padding in the middle of a row. Knows nothing of models.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

SHORTEST = 16
"""Tokens that are worth a pass of their own."""
STEP, LONG = 8, 256
"""Prefixes shorter than `LONG` have a multiple of `STEP` tokens; longer ones fill a pass alone."""
DEEPEST = 4
"""Nodes above a leaf at most, each of whose keys and values are held while those below it are computed."""


@dataclass(frozen=True)
class Node:
    """`tokens` after `start` others. `scored`: (place in `tokens`, number of the target that its logits predict)."""

    start: int
    tokens: list[int]
    scored: list[tuple[int, int]]
    children: list["Node"]


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two rows begin with in common."""
    lengths = range(1, min(len(first), len(second)) + 1)
    return bisect_left(lengths, True, key=lambda length: first[:length] != second[:length])


def prefix_tree(rows: Sequence[tuple[int, ...]], num_targets: Sequence[int]) -> list[Node]:
    """The tree's topmost nodes. The last `num_targets[i]` places of row i predict its targets, which are numbered
    through, row after row."""
    firsts = [0, *accumulate(num_targets)]
    places: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for row, first, count in zip(rows, firsts, num_targets, strict=False):
        places.setdefault(row, []).extend((len(row) - count + n, first + n) for n in range(count))
    distinct = sorted(places)
    shared = [0, *(common_length(*pair) for pair in pairwise(distinct))]

    def node(low: int, high: int, start: int, stop: int, depth: int) -> Node:
        scored = [
            (place - start, target)
            for row in distinct[low:high]
            for place, target in places[row]
            if start <= place < stop
        ]
        below = nodes(low, high, stop, depth + 1) if high - low > 1 else []
        return Node(start, list(distinct[low][start:stop]), scored, below)

    def nodes(low: int, high: int, start: int, depth: int) -> list[Node]:
        siblings = []
        while low < high:
            after = low + 1
            while depth < DEEPEST and after < high and shared[after] >= start + SHORTEST:
                after += 1
            stop = len(distinct[low])
            if after - low > 1:
                stop = min(shared[low + 1 : after])
                stop -= (stop - start) % STEP if stop - start < LONG else 0
            if stop > start:
                siblings.append(node(low, after, start, stop, depth))
            low = after
        return siblings

    return nodes(0, len(distinct), 0, 0)
