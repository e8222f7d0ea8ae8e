"""How tensors of several students become one; every tensor is taken as one flat vector.

SLERP (Shoemake 1985): for the angle theta between a and b, [sin((1-t) theta) a + sin(t theta) b] / sin theta, with the
original norms. Linear: the weighted mean. Task arithmetic (Ilharco et al. 2022, arXiv 2212.04089): base + sum of
w_i (a_i - base). TIES (Yadav et al. 2023, arXiv 2306.01708): trim what fine-tuning added to its largest entries, elect
a sign per entry, take the mean of those that agree. Knows nothing of files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

NEARLY_PARALLEL = 0.9995
"""Absolute cosine above which SLERP is computed as linear interpolation; below 0.032 rad they differ by 0.013%."""


def norm(x: Tensor) -> float:
    """Euclidean norm of all entries, summed in float64: the angle of light adapters is a small difference of norms."""
    return math.sqrt(sum(float(part.double().square().sum()) for part in x.flatten().split(1 << 18)))


def angle(norm_a: float, norm_b: float, distance: float) -> float | None:
    """The angle in [0, pi] between vectors of these norms at this distance; None where one of them is zero.

    The chord between the unit vectors is exact for small angles, where arccos of a cosine loses half of the digits.
    """
    if not norm_a or not norm_b:
        return None
    chord = min(4.0, max(0.0, (distance**2 - (norm_a - norm_b) ** 2) / (norm_a * norm_b)))
    return 2 * math.atan2(math.sqrt(chord), math.sqrt(4 - chord))


def is_nearly_parallel(theta: float | None) -> bool:
    return theta is None or abs(math.cos(theta)) > NEARLY_PARALLEL


def slerp(a: Tensor, b: Tensor, t: float, theta: float | None = None) -> Tensor:
    """Spherical interpolation from a (t = 0) to b (t = 1); linear where they are nearly parallel, or one is zero.

    Any shape, the same for both; computed in float32 or better and returned in the dtype of `a`. `theta` is their angle
    in radians, where it is known already.
    """
    x, y = _computable(a), _computable(b)
    if theta is None:
        theta = angle(norm(x), norm(y), norm(x - y))
    if theta is None or is_nearly_parallel(theta):
        return ((1 - t) * x + t * y).to(a.dtype)
    share_a, share_b = (math.sin(share * theta) / math.sin(theta) for share in (1 - t, t))
    return (share_a * x).add_(y, alpha=share_b).to(a.dtype)


def _computable(x: Tensor) -> Tensor:
    import torch

    return x if x.dtype == torch.float64 else x.float()


def _weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = weights[0] * _computable(tensors[0])
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(_computable(tensor), alpha=weight)
    return total


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean with these weights, which are divided by their sum; in the dtype of the first tensor."""
    total = sum(weights)
    return _weighted_sum(tensors, [weight / total for weight in weights]).to(tensors[0].dtype)


def task_arithmetic(base: Tensor, task_vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """base + sum of weight * task vector, a task vector being what fine-tuning added; in the dtype of `base`."""
    return (_computable(base) + _weighted_sum(task_vectors, weights)).to(base.dtype)


def trimmed(task_vector: Tensor, density: float) -> Tensor:
    """All but the largest entries set to zero: the share `density` in (0, 1] is kept, at least one, with its equals."""
    if density >= 1:
        return task_vector
    magnitudes = task_vector.abs()
    num_kept = max(1, int(density * magnitudes.numel()))
    threshold = magnitudes.flatten().kthvalue(magnitudes.numel() - num_kept + 1).values
    return task_vector * (magnitudes >= threshold)


def ties(base: Tensor, task_vectors: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """base + the disjoint mean of the trimmed task vectors; in the dtype of `base`.

    The sign of an entry is that of the weighted sum, and the mean is over the vectors that are not zero there and have
    this sign. The trim is by tensor; the paper's is over the whole vector at once, which does not stream.
    """
    import torch

    vectors = [trimmed(_computable(vector), density) for vector in task_vectors]
    positive = _weighted_sum(vectors, weights) >= 0
    total, divisor = torch.zeros_like(vectors[0]), torch.zeros_like(vectors[0])
    for vector, weight in zip(vectors, weights, strict=True):
        signed = weight * vector
        agrees = torch.where(positive, signed > 0, signed < 0)
        total.add_(signed * agrees)
        divisor.add_(agrees, alpha=weight)
    divisor[divisor == 0] = 1
    return (_computable(base) + total.div_(divisor)).to(base.dtype)


# ---- how far, by tensor ---------------------------------------------------------------------------------------------


def share_at(t: Any, name: str, place: float) -> float:
    """What the setting `t` says for the tensor `name` of the block at `place`, from 0 (first) to 1 (last).

    A number holds everywhere. A list is a gradient over the blocks: its values stand at equal distances, linear between
    them. A mapping gives either by the kind of tensor: a part of its name (`self_attn`, `q_proj`), of which the one
    furthest right decides; `default` is for all others, 0.5 if it is not given.
    """
    if isinstance(t, dict):
        kind = kind_of(t, name)
        return share_at(t.get("default", 0.5) if kind is None else t[kind], name, place)
    if not isinstance(t, list | tuple):
        return float(t)
    position = place * (len(t) - 1)
    left = min(int(position), max(0, len(t) - 2))
    right = min(left + 1, len(t) - 1)
    return float(t[left] + (position - left) * (t[right] - t[left]))


def kind_of(kinds: dict[str, Any], name: str) -> str | None:
    """The key of `kinds` that is the part furthest right of a dotted tensor name."""
    return next((part for part in reversed(name.split(".")) if part in kinds), None)
