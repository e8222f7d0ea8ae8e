"""Reverse KL, as MiniLLM (arXiv 2306.08543) argues for: KL(q || p) of both softened, times T^2.

At every token of the targets; its source takes it on what the student itself says.
"""

from dataclasses import dataclass

from torch import Tensor

from sdd.finetuning.losses.tokens import TokenLoss, divergence, log_probabilities


@dataclass
class ReverseKL(TokenLoss):
    temperature: float = 1.0

    def per_token(self, logits: Tensor, teacher_logits: Tensor | None, targets: Tensor) -> Tensor:
        p, q = log_probabilities(logits, teacher_logits, self.temperature)
        return divergence(q, p) * self.temperature**2
