"""Losses as functions of tensors. Sums, not means: the caller divides by the token count of the whole global batch."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def target_loss_sum(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Summed cross-entropy in nats, in float32, each token's counted `weights` times: (N, V), (N,), (N,) -> ().

    Zero for N = 0.
    """
    if weights is None:
        return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    return (torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none") * weights).sum()


def softened(logits: Tensor, t: float) -> Tensor:
    """Probabilities at temperature t: (N, V) -> (N, V), float32."""
    return torch.softmax(logits.float() / t, dim=-1)


def distillation_slope(student: Tensor, soft: Tensor | None, targets: Tensor, alpha: float) -> Tensor:
    """The gradient of each token's loss with respect to the student's logits: (N, V), (N, V), (N,) -> (N, V), float32.

    The loss is (1 - alpha) CE(targets || student) + alpha KL(soft || softmax(student)), where `soft` are the teacher's
    probabilities at a temperature that is on its side only (SDMPrune, arXiv 2506.11120); its slope is p - (1 - alpha)
    onehot - alpha q. Without a teacher, that of cross-entropy.
    """
    slope = torch.softmax(student.float(), dim=-1)
    hard = torch.full_like(slope[:, :1], -1.0)
    if soft is not None:
        slope.sub_(soft, alpha=alpha)
        hard.fill_(alpha - 1)
    return slope.scatter_add_(1, targets[:, None], hard)


def _divergence(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """The terms of KL(teacher || student), both softened: (N, V), (N, V) -> (N, V), float32."""
    assert logits.shape == teacher_logits.shape, f"student {logits.shape}, teacher {teacher_logits.shape}"
    student, teacher = ((x.float() / temperature).log_softmax(-1) for x in (logits, teacher_logits))
    return torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True)


def forward_kl(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) of each token in nats, in float32, at least 0: (N, V), (N, V) -> (N,)."""
    return _divergence(logits, teacher_logits, 1.0).sum(-1).clamp_min(0.0)


def forward_kl_sum(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Summed KL(teacher || student) in nats, in float32: (N, V), (N, V) -> (). Zero at equality and for N = 0.

    Both are softened by `temperature`, and the sum is multiplied by its square, so that gradients keep their size
    (Hinton et al. 2015, arXiv 1503.02531, section 2).
    """
    # One sum over all terms, not of `forward_kl`: by tokens first it is rounded otherwise, and so is what is trained.
    return _divergence(logits, teacher_logits, temperature).sum() * temperature**2


def summed_in_chunks(loss: Callable[..., Tensor], *tensors: Tensor, chunk: int) -> Tensor:
    """Sum of `loss(*tensors)` over chunks of at most `chunk` of their first axis, all of one length N >= 0: -> ().

    What `loss` makes on the way, such as logits, is dropped after each chunk and made again in the backward pass.
    """
    pieces = zip(*(tensor.split(chunk) for tensor in tensors), strict=True)
    losses = [checkpoint(loss, *piece, use_reentrant=False) for piece in pieces]
    return torch.stack(losses).sum()
