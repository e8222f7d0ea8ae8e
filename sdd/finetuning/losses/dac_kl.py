"""KL from the dense part of the teacher's distribution (after DAC-KL, arXiv 2407.10068), times T^2.

p is clipped to its likeliest tokens, the fewest that hold `clip_mass`, and to the target, and made to sum to 1 again:
KL(clip(p) || q). The source learns where to clip by a network of its own, for which a fixed mass stands in here. q is
not clipped: what the student gives other tokens is taken from these.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sdd.finetuning.losses.tokens import TokenLoss, divergence, log_probabilities


@dataclass
class ClippedKL(TokenLoss):
    temperature: float = 1.0
    clip_mass: float = 0.95

    def per_token(self, logits: Tensor, teacher_logits: Tensor | None, targets: Tensor) -> Tensor:
        p, q = log_probabilities(logits, teacher_logits, self.temperature)
        return divergence(clipped(p, targets, self.clip_mass), q) * self.temperature**2


def clipped(p: Tensor, targets: Tensor, mass: float) -> Tensor:
    """Log probabilities of the tokens kept, -inf elsewhere: (N, V), (N,) -> (N, V)."""
    ordered, tokens = p.exp().sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, tokens, before < mass)
    kept = kept.scatter_(-1, targets[:, None], True)
    return p.masked_fill(~kept, -torch.inf).log_softmax(-1)
