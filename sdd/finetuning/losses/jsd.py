"""Generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649, eq. 1), times T^2.

JSD_b(p || q) = b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q; symmetric at b = 1/2. Divided by b it tends
to forward KL as b -> 0, divided by 1 - b to reverse KL as b -> 1.
"""

from dataclasses import dataclass

from torch import Tensor

from sdd.finetuning.losses.skew_kl import mixed
from sdd.finetuning.losses.tokens import TokenLoss, divergence, log_probabilities


@dataclass
class JSD(TokenLoss):
    """`jsd_beta`, b above, lies in (0, 1)."""

    temperature: float = 1.0
    jsd_beta: float = 0.5

    def per_token(self, logits: Tensor, teacher_logits: Tensor | None, targets: Tensor) -> Tensor:
        p, q = log_probabilities(logits, teacher_logits, self.temperature)
        mixture, b = mixed(p, q, self.jsd_beta), self.jsd_beta
        return (b * divergence(p, mixture) + (1 - b) * divergence(q, mixture)) * self.temperature**2
