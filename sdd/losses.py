"""Losses as functions of tensors. Sums, not means: the caller divides by the token count of the whole global batch."""

import torch
from torch import Tensor


def target_loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy in nats, in float32: (N, V), (N,) -> (). Zero for N = 0."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


def distillation_slope(student: Tensor, teacher: Tensor | None, targets: Tensor, alpha: float, t: float) -> Tensor:
    """The gradient of each token's loss with respect to the student's logits: (N, V), (N, V), (N,) -> (N, V), float32.

    The loss is (1 - alpha) CE(targets || student) + alpha KL(softmax(teacher / t) || softmax(student)) (SDMPrune, arXiv
    2506.11120), the temperature on the teacher's side only; its slope is p - (1 - alpha) onehot - alpha q. Without a
    teacher, that of cross-entropy.
    """
    soft = None if teacher is None else torch.softmax(teacher.float() / t, dim=-1)  # first: one matrix less at a time
    slope = torch.softmax(student.float(), dim=-1)
    hard = torch.full_like(slope[:, :1], -1.0)
    if soft is not None:
        slope.sub_(soft, alpha=alpha)
        hard.fill_(alpha - 1)
    return slope.scatter_add_(1, targets[:, None], hard)
