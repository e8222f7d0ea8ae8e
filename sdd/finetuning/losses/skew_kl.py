"""Skew KL (DistiLLM, arXiv 2402.03898): KL(p || a p + (1 - a) q), times T^2; at a = 0 forward KL.

The mixture is never far below p, so that a token which the student deems impossible has a bounded gradient.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sdd.finetuning.losses.tokens import TokenLoss, divergence, log_probabilities


@dataclass
class SkewKL(TokenLoss):
    """`skew` is the teacher's share of the mixture, in [0, 1)."""

    temperature: float = 1.0
    skew: float = 0.1

    def per_token(self, logits: Tensor, teacher_logits: Tensor | None, targets: Tensor) -> Tensor:
        p, q = log_probabilities(logits, teacher_logits, self.temperature)
        return divergence(p, mixed(p, q, self.skew)) * self.temperature**2


def mixed(p: Tensor, q: Tensor, share: float) -> Tensor:
    """log(share e^p + (1 - share) e^q), of log probabilities: (N, V), (N, V) -> (N, V)."""
    if share <= 0 or share >= 1:
        return q if share <= 0 else p
    return torch.logaddexp(p + math.log(share), q + math.log1p(-share))
