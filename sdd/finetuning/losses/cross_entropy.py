"""Cross-entropy on the targets: -log q(target), in nats."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from sdd.finetuning.losses.tokens import TokenLoss
from sdd.forward.losses import target_loss_sum


@dataclass
class CrossEntropy(TokenLoss):
    needs_teacher = False

    def per_token(self, logits: Tensor, teacher_logits: Tensor | None, targets: Tensor) -> Tensor:
        return functional.cross_entropy(logits.float(), targets, reduction="none")

    def total(self, logits: Tensor, teacher_logits: Tensor | None, targets: Tensor) -> Tensor:
        return target_loss_sum(logits, targets)
