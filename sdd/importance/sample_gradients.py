"""Taylor importance of MLP channels, sample by sample: sum over samples of |g*w|, the matrices of a channel coupled.

For channel i: the mean over the hidden axis h of the sum over samples of |(g*w)_down[h, i] + (g*w)_up[i, h] +
(g*w)_gate[i, h]|, with the gradient g of the sample's own loss, its mean over tokens; the signed terms are added before
the absolute value (SDMPrune, arXiv 2506.11120). A plain MLP has the two terms that exist; biases are left out.

What makes it cheap: no parameter asks for a gradient. Hooks catch what enters a linear layer and the gradient of what
leaves it; a sample's gradient of a matrix is their product, formed for several samples of one pass, block by block as
the backward pass gets there, used and freed. Nothing flows below the first MLP. Logits exist for a few tokens at a
time: their gradient is known in closed form, so that only the states below the head are kept. The teacher of the second
stage is the model of the first: what its pass left there is not computed again.

Knows nothing of Hydra or the store.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sdd.architectures import MLP, mlp_layers, mlp_of
from sdd.forward import sums
from sdd.forward.batches import length_batches, padded
from sdd.forward.losses import distillation_slope, softened
from sdd.forward.row_states import RowStates
from sdd.importance.channels import activation_norm
from sdd.models.checkpoints import blocks, decoder, head_logits

HEAD_ELEMENTS = 1 << 22
"""Logits held at a time."""


@dataclass(frozen=True)
class Distillation:
    """The loss (1 - alpha) CE + alpha KL to `teacher` at temperature t. The student is the model with channels masked.

    `masked` holds a boolean vector a block, of length width. Without a teacher of its own, the unmasked model is it.
    """

    alpha: float
    t: float
    masked: Sequence[Tensor]
    teacher: Any = None


def coupled_saliency(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Mean over h of |sum over matrices of g*w|, for one sample: lists of (I, H) -> (I,), float32.

    Rows are channels: down is transposed, and what a fused matrix stacks is taken apart.
    """
    total = gradients[0].float() * weights[0].float()
    for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
        total.addcmul_(gradient.float(), weight.float())
    summed: Tensor = torch.linalg.vector_norm(total, ord=1, dim=1)
    return summed.div_(total.shape[1])


def channel_importance(
    model: Any,
    rows: Sequence[list[int]],
    max_tokens: int,
    distillation: Distillation | None = None,
    kept: Path | None = None,
    final_states: RowStates | None = None,
) -> list[Tensor]:
    """Importance of every channel, a float64 vector of length width a block; higher is more important.

    `rows` are token ids; a pass has at most `max_tokens` padded tokens, or one row. Cross-entropy without
    `distillation`. What is summed up is kept in the file `kept`. The uncut model's are left in `final_states`, and
    taken from there where it is the teacher.
    """
    model.requires_grad_(False)
    layout = mlp_of(model)
    recorders = [_Recorder(block, layout) for block in blocks(model)]
    teacher = None if distillation is None else distillation.teacher or model

    def of(batch: Sequence[int]) -> sums.Sums:
        ids, _ = padded([rows[index] for index in batch], model.device)
        lengths = [len(rows[index]) for index in batch]
        for recorder in recorders:
            recorder.rest()  # of a pass that memory did not last for
        teacher_states = None if teacher is None else _teacher_states(teacher, ids, batch, final_states)
        for index, recorder in enumerate(recorders):
            recorder.begin(lengths, None if distillation is None else distillation.masked[index])
        with torch.enable_grad():
            states = _forward(model, ids)
        if teacher is None and final_states is not None:
            _leave(final_states, batch, states)
        slope = _slope_of_states(model, teacher, states.detach(), teacher_states, ids, lengths, distillation)
        del teacher_states
        states.backward(slope)
        del states, slope
        progress.update(len(batch))
        return {"importance": torch.stack([recorder.end() for recorder in recorders])}

    batches = length_batches([len(row) for row in rows], len(rows), max_tokens)
    try:
        with tqdm(total=len(rows), desc="importance", unit="text") as progress:
            return list(sums.over(batches, of, progress, kept)["importance"])
    finally:
        for recorder in recorders:
            recorder.remove()


def _forward(model: Any, ids: Tensor) -> Tensor:
    """Final states of rows padded on the right, whose real tokens do not see what comes after them: no mask."""
    states: Tensor = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
    return states


@torch.no_grad()
def _states(model: Any, ids: Tensor) -> Tensor:
    return _forward(model, ids)


def _teacher_states(teacher: Any, ids: Tensor, batch: Sequence[int], final_states: RowStates | None) -> Tensor:
    """Those that a pass left, or left now by this one."""
    if final_states is not None and (left := final_states.of(batch)) is not None:
        return left.to(teacher.device)
    states = _states(teacher, ids)
    if final_states is not None:
        _leave(final_states, batch, states)
    return states


def _leave(final_states: RowStates, batch: Sequence[int], states: Tensor) -> None:
    """For a later pass; where the disk has no room, that one has to compute them."""
    with contextlib.suppress(OSError):
        final_states.keep(batch, states)


def _slope_of_states(
    model: Any,
    teacher: Any,
    states: Tensor,
    teacher_states: Tensor | None,
    ids: Tensor,
    lengths: list[int],
    distillation: Distillation | None,
) -> Tensor:
    """The gradient of the sum of the samples' losses with respect to `states`, (B, T, H); a few tokens at a time."""
    slope = torch.zeros_like(states)
    positions = [(row, token) for row, length in enumerate(lengths) for token in range(length - 1)]
    most = max(1, HEAD_ELEMENTS // model.get_output_embeddings().weight.shape[0])
    # Equal chunks: a short last one would multiply matrices less well.
    step = ceil(len(positions) / ceil(len(positions) / most))
    for start in range(0, len(positions), step):
        row, token = torch.tensor(positions[start : start + step], device=states.device).unbind(1)
        teacher_hidden = None if teacher_states is None else teacher_states[row, token]
        chosen = states[row, token], teacher_hidden, ids[row, token + 1]
        slope[row, token] = _slope_of_chunk(model, teacher, *chosen, distillation)
    num_targets = torch.tensor(lengths, device=states.device) - 1  # a sample's loss is its mean over tokens
    return slope.div_(num_targets[:, None, None])


def _slope_of_chunk(
    model: Any,
    teacher: Any,
    hidden: Tensor,
    teacher_hidden: Tensor | None,
    targets: Tensor,
    distillation: Distillation | None,
) -> Tensor:
    """The gradient of the summed losses of N tokens with respect to their states: (N, H), (N, H), (N,) -> (N, H).

    At most three matrices of the size of the logits are there at once, and none of them outlives the call.
    """
    q, alpha = None, 0.0
    if distillation is not None:
        with torch.no_grad():
            q, alpha = softened(head_logits(teacher, teacher_hidden), distillation.t), distillation.alpha
    hidden.requires_grad_(True)
    with torch.enable_grad():
        logits = head_logits(model, hidden)
    with torch.no_grad():
        logits_slope = distillation_slope(logits.detach(), q, targets, alpha).to(logits.dtype)
    return torch.autograd.grad(logits, hidden, logits_slope)[0]


class _Recorder:
    """What one block's MLP lets pass, until its samples' gradients can be formed."""

    def __init__(self, block: Any, layout: MLP) -> None:
        self.into, self.out = mlp_layers(block, layout)
        self.stacks = layout.stacks
        self.width = layout.width
        self.keep: Tensor | None = None
        self.rest()
        self.handles = [self.out.register_forward_pre_hook(self._mask)]
        for index, layer in enumerate([*self.into, self.out]):
            self.handles.append(layer.register_forward_hook(self._saw(index)))

    def begin(self, lengths: list[int], masked: Tensor | None) -> None:
        """What follows is the student's forward pass on rows of these lengths."""
        self.lengths, self.recording = lengths, True
        self.total = torch.zeros(self.width, dtype=torch.float64, device=self.out.weight.device)
        self.keep = None if masked is None else (~masked).to(self.out.weight)

    def end(self) -> Tensor:
        """The pass is over: its total is given, and nothing else of it is left here."""
        assert not self.slopes, "gradients arrived that were not used"
        self.rest()
        return self.total

    def rest(self) -> None:
        """Look at nothing, and keep nothing of what was seen."""
        self.entering: dict[int, Tensor] = {}
        self.slopes: dict[int, Tensor] = {}
        self.keep, self.recording = None, False

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _mask(self, module: Any, arguments: tuple[Any, ...]) -> Any:
        return (arguments[0] * self.keep, *arguments[1:]) if self.keep is not None else None

    def _saw(self, index: int) -> Any:
        def hook(module: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
            if not self.recording:
                return
            self.entering[index] = arguments[0].detach()
            if not output.requires_grad:
                output.requires_grad_(True)  # the first MLP: nothing below it asks for a gradient
            output.register_hook(lambda slope: self._arrived(index, slope))

        return hook

    def _arrived(self, index: int, slope: Tensor) -> None:
        """Keep the gradient of a layer's output; with the last of them, add the samples to the total."""
        self.slopes[index] = slope.detach()
        if len(self.slopes) <= len(self.into):
            return
        weights = [part for layer in self.into for part in layer.weight.chunk(self.stacks)]
        weights.append(self.out.weight.t().contiguous())
        for row, length in enumerate(self.lengths):
            gradients: list[Tensor] = []
            for layer in range(len(self.into)):
                product = self.slopes[layer][row, :length].t() @ self.entering[layer][row, :length]
                gradients += product.chunk(self.stacks)
            out = len(self.into)
            gradients.append(self.entering[out][row, :length].t() @ self.slopes[out][row, :length])
            self.total += coupled_saliency(gradients, weights)
        self.slopes, self.entering = {}, {}


@torch.no_grad()
def activation_norms(model: Any, rows: Sequence[list[int]], max_tokens: int, kept: Path | None = None) -> list[Tensor]:
    """`activation_norm` of what enters each down projection: a (width,) float64 tensor a block.

    Its square is a sum over texts, which is kept in the file `kept`.
    """
    layout = mlp_of(model)
    lengths: list[int] = []
    squares: list[Tensor] = []

    def saw(module: Any, arguments: tuple[Any, ...]) -> None:
        (states, *_) = arguments
        means = [row[:length].abs().double().mean(dim=0) for row, length in zip(states, lengths, strict=True)]
        squares.append(activation_norm(torch.stack(means)).square())

    def of(batch: Sequence[int]) -> sums.Sums:
        lengths[:], squares[:] = [len(rows[index]) for index in batch], []
        ids, _ = padded([rows[index] for index in batch], model.device)
        _states(model, ids)
        progress.update(len(batch))
        return {"squares": torch.stack(squares)}

    batches = length_batches([len(row) for row in rows], len(rows), max_tokens)
    handles = [mlp_layers(block, layout)[1].register_forward_pre_hook(saw) for block in blocks(model)]
    try:
        with tqdm(total=len(rows), desc="activations", unit="text") as progress:
            return list(sums.over(batches, of, progress, kept)["squares"].sqrt())
    finally:
        for handle in handles:
            handle.remove()
