"""REDI, reinforcement distillation (arXiv 2505.24850): also away from answers that were rejected.

-log q(y_w) / |y_w| + w log q(y_l) / |y_l|, the mean over rows, with y_w the target, y_l the rewrite that the selection
refused, if one was, and w = 0.8. The second term has no bound from below; w < 1 and a low rate keep it in place. The
source takes 1e-6, on a student that has been tuned on the targets alone before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdd.finetuning.losses.cross_entropy import CrossEntropy
from sdd.finetuning.module import TrainingRow, labelled, target_states
from sdd.forward import chunks
from sdd.forward.losses import summed_in_chunks
from sdd.models.checkpoints import head_logits


@dataclass
class REDI(CrossEntropy):
    """On the targets it is cross-entropy; `rejected` is the second term."""

    rejected_weight: float = 0.8

    def rejected(self, model: Any, rows: Sequence[TrainingRow], device: Any = "cpu") -> Tensor:
        """Summed over rows: w log q(y_l) / |y_l|."""
        refused = [TrainingRow(row.rejected, row.prompt_length) for row in rows if row.rejected]
        if not refused:
            return torch.zeros((), device=device)
        ids, mask, labels = labelled(refused, device)
        at = labels[:, 1:] != -100

        def loss(hidden: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
            return (self.per_token(head_logits(model, hidden), None, targets) * shares).sum()

        tensors = target_states(model, ids, mask, at), labels[:, 1:][at], shares_of(at)
        return -self.rejected_weight * summed_in_chunks(loss, *tensors, chunk=chunks.CHUNK_TOKENS)


def shares_of(at: Tensor) -> Tensor:
    """The share of its row's tokens that each chosen one is: (B, T) -> (N,)."""
    return (1 / at.sum(1).clamp_min(1))[:, None].expand(at.shape)[at]
