"""Forward KL, logit distillation (Hinton et al. 2015, arXiv 1503.02531): KL(p || q) of both softened, times T^2."""

from dataclasses import dataclass

from torch import Tensor

from sdd.finetuning.losses.tokens import TokenLoss, divergence, log_probabilities
from sdd.forward.losses import forward_kl_sum


@dataclass
class ForwardKL(TokenLoss):
    temperature: float = 1.0

    def per_token(self, logits: Tensor, teacher_logits: Tensor | None, targets: Tensor) -> Tensor:
        p, q = log_probabilities(logits, teacher_logits, self.temperature)
        return divergence(p, q) * self.temperature**2

    def total(self, logits: Tensor, teacher_logits: Tensor | None, targets: Tensor) -> Tensor:
        assert teacher_logits is not None, "the teacher is beside the student"
        return forward_kl_sum(logits, teacher_logits, self.temperature)
