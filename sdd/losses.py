"""Losses as functions of tensors. Sums, not means: the caller divides by the token count of the whole global batch."""

import torch
from torch import Tensor


def target_loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy in nats, in float32: (N, V), (N,) -> (). Zero for N = 0."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
