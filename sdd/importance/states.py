"""Which blocks are redundant: criteria as pure functions of hidden states, and what each keeps of a pass over texts.

Angular distance (Gromov et al. 2024, arXiv 2403.17887, as in arXiv 2410.09982): d(l, n) is the mean over texts of
arccos(cos(h_l, h_{l+n})) / pi at the last real token, h_l entering block l, h_L leaving the last block before the final
norm. Block Influence (ShortGPT, arXiv 2403.03853): BI_l = 1 - mean over real tokens of cos(h_l, h_{l+1}).
The controls look at nothing. Batching and hooks live in `sdd.forward`; knows nothing of Hydra or the store.
Criteria that look at weights are in `weights`, those that remove blocks and measure again in `removal`.
A criterion's name and parameters are known without torch, which only computing imports: a dry run has no need of it.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any

from sdd.importance.criteria import Blind, BlockCriterion, StateCriterion

if TYPE_CHECKING:
    from torch import Tensor


def angular_distance(x: Tensor, y: Tensor) -> Tensor:
    """Angle between rows over pi, in [0, 1]: (B, D), (B, D) -> (B,).

    Computed in float64 as 2 atan2(|u - v|, |u + v|) of the unit vectors, which equals arccos(cos) and stays exact near
    zero, where arccos loses half of the digits (Kahan 2006). A zero row is at a right angle to everything.
    """
    import torch

    u, v = (torch.nn.functional.normalize(t.double(), dim=-1, eps=1e-300) for t in (x, y))
    return 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1)) / math.pi


def block_influence(x: Tensor, y: Tensor) -> Tensor:
    """1 - cosine over the feature axis, in [0, 2]: (..., D), (..., D) -> (...), in float64."""
    import torch

    u, v = (torch.nn.functional.normalize(t.double(), dim=-1, eps=1e-300) for t in (x, y))
    return 1 - (u * v).sum(-1)


def window_sums(values: list[float]) -> dict[str, list[float]]:
    """Sums over n neighbouring blocks for every n: the table form of a criterion that scores single blocks."""
    blocks = len(values)
    return {str(n): [math.fsum(values[start : start + n]) for start in range(blocks - n + 1)] for n in range(1, blocks)}


def last_real(hidden: Tensor, mask: Tensor) -> Tensor:
    """The state of each row's last real token, padding on either side: (B, T, D), (B, T) -> (B, D)."""
    import torch

    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask.bool(), positions, -1).max(dim=1).values
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


class Angular(StateCriterion):
    """Angular distance for every block size and start from one pass; keeps last-token states of one batch."""

    name = "angular"
    splits = True

    def start(self, num_blocks: int) -> None:
        import torch

        self.num_blocks = num_blocks
        self.states: list[Tensor] = []
        sizes = {str(n): num_blocks - n + 1 for n in range(1, num_blocks)} | {"texts": 1}
        self.sums = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}

    def observe(self, block: int, entering: Tensor, leaving: Tensor, mask: Tensor) -> None:
        if block == 0:
            self.states = []  # what a pass that memory did not last for has left
        assert block == len(self.states), f"block {block} seen after {len(self.states)} states"
        self.states.append(last_real(entering, mask).double().cpu())
        if block == self.num_blocks - 1:
            self.states.append(last_real(leaving, mask).double().cpu())

    def finish_batch(self) -> None:
        import torch

        states = torch.stack(self.states)
        for n in range(1, self.num_blocks):
            self.sums[str(n)] += angular_distance(states[:-n], states[n:]).sum(dim=1)
        self.sums["texts"] += states.shape[1]
        self.states = []

    def scores(self) -> dict[str, Any]:
        sizes, texts = map(str, range(1, self.num_blocks)), self.sums["texts"]
        return {"distance": {size: (self.sums[size] / texts).tolist() for size in sizes}}


class BlockInfluence(StateCriterion):
    """Block Influence over all real tokens; `contiguous` takes the cheapest window instead of the lowest blocks."""

    name = "block_influence"
    splits = True

    def __init__(self, contiguous: bool = False) -> None:
        self.contiguous = contiguous

    def start(self, num_blocks: int) -> None:
        import torch

        self.sums = {name: torch.zeros(num_blocks, dtype=torch.float64) for name in ("influence", "tokens")}

    def observe(self, block: int, entering: Tensor, leaving: Tensor, mask: Tensor) -> None:
        real = mask.bool()
        self.sums["influence"][block] += float(block_influence(entering[real], leaving[real]).sum())
        self.sums["tokens"][block] += int(real.sum())

    def finish_batch(self) -> None:
        """Running sums need nothing here."""

    def scores(self) -> dict[str, Any]:
        values: list[float] = (self.sums["influence"] / self.sums["tokens"]).tolist()
        table = {"distance": window_sums(values)}
        if self.contiguous:
            return table
        return table | {"order": sorted(range(len(values)), key=lambda block: (values[block], block))}


class _Control(BlockCriterion, Blind):
    """A control: it looks at nothing."""

    def start(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks


class Random(_Control):
    """Blocks in a random order: the control that every criterion has to beat."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def scores(self) -> dict[str, Any]:
        order = list(range(self.num_blocks))
        random.Random(self.seed).shuffle(order)
        rank = [float(order.index(block)) for block in range(self.num_blocks)]
        return {"distance": window_sums(rank), "order": order}


class Last(_Control):
    """The last blocks first; with `keep_final`, those before the last one, which goes only when no other is left."""

    def __init__(self, keep_final: bool = False) -> None:
        self.keep_final = keep_final
        self.name = "last_keep_final" if keep_final else "last"

    def scores(self) -> dict[str, Any]:
        order = list(range(self.num_blocks - 1, -1, -1))
        if self.keep_final:
            order = [*order[1:], order[0]]
        rank = [float(order.index(block)) for block in range(self.num_blocks)]
        return {"distance": window_sums(rank), "order": order}


def chosen_blocks(scores: dict[str, Any], size: int) -> tuple[list[int], float]:
    """The blocks to remove and their score: the first of the order, or the span with the least distance.

    The score of blocks that were removed one by one is the sum of what each was measured at when it went.
    """
    if "order" in scores:
        removed = sorted(scores["order"][:size])
        if "steps" in scores:
            return removed, math.fsum(step["scores"][step["removed"]] for step in scores["steps"][:size])
        return removed, math.fsum(scores["distance"]["1"][block] for block in removed)
    row = scores["distance"][str(size)]
    start = min(range(len(row)), key=lambda index: (row[index], index))
    return list(range(start, start + size)), row[start]
