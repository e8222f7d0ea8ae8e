"""SquareHead (arXiv 2310.06927): the squared error of every kept block's states, over the teacher's own square.

For the state h of a token after a block, sum over blocks of mean((h_s - h_t)^2) / mean(h_t^2). The source takes both
means over all tokens of a batch; here each token has its own, so that no cut into micro-batches changes a loss. A depth
cut leaves the width of states as it was: there is no projection.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdd.models.checkpoints import blocks

LEAST = 1e-6
"""Added to the teacher's mean square."""


@dataclass
class HiddenStates:
    def watched(self, model: Any, places: Sequence[int]) -> dict[str, Any]:
        layers = blocks(model)
        return {f"block {number}": layers[place] for number, place in enumerate(places)}

    def per_token(self, own: Mapping[str, Tensor], taught: Mapping[str, Tensor], mask: Tensor, at: Tensor) -> Tensor:
        losses = [squared(state[:, :-1][at], taught[name][:, :-1][at]) for name, state in own.items()]
        return torch.stack(losses).sum(0)


def squared(student: Tensor, teacher: Tensor) -> Tensor:
    """(N, D), (N, D) -> (N,), float32; 0 at equality, and about 1 for a student that says nothing."""
    student, teacher = student.float(), teacher.float()
    return (student - teacher).square().mean(-1) / (teacher.square().mean(-1) + LEAST)
