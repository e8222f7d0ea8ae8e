"""A criterion of blocks: those near a place go first."""

from typing import Any

from sdd.importance.criteria import Blind, BlockCriterion
from sdd.importance.states import window_sums


class Middle(BlockCriterion, Blind):
    """A block's distance from `centre`, a share of the depth, in blocks; the nearest span goes."""

    name = "middle"

    def __init__(self, centre: float = 0.5) -> None:
        self.centre = centre

    def start(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks

    def scores(self) -> dict[str, Any]:
        place = self.centre * (self.num_blocks - 1)
        return {"distance": window_sums([abs(block - place) for block in range(self.num_blocks)])}
