"""Which blocks are redundant by their weights: how large they are, and how much the loss would feel their loss.

Both are the per-block sums of Shortened LLaMA (arXiv 2402.02834, section 3). Its habit of never removing the first
four and the last two blocks is not part of the scores. Reading and running are streamed: one tensor, or the gradients
of one block, at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sdd.architectures import BLOCK_NAME, STORED_BUFFERS
from sdd.forward.batches import length_batches, padded
from sdd.forward.bypass import LOGITS, Row, forwards
from sdd.importance.criteria import BlockCriterion, ModelCriterion, OfTexts, WeightCriterion
from sdd.importance.states import window_sums
from sdd.models import checkpoints
from sdd.models.checkpoints import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

MAX_TOKENS = 16_384
"""Padded tokens of a batch."""


def magnitude(weight: Tensor) -> float:
    """Sum of |w| over a tensor of any shape, added in float64."""
    import torch

    return float(weight.abs().sum(dtype=torch.float64))


def taylor(weight: Tensor, gradient: Tensor) -> float:
    """Sum of |g * w| over two tensors of one shape: what zeroing each element does to the loss, to first order."""
    import torch

    return float((gradient.float() * weight.float()).abs().sum(dtype=torch.float64))


class _Summed(BlockCriterion):
    """A criterion that adds up a number per block over its weights; the smallest goes first."""

    def start(self, num_blocks: int) -> None:
        self.sums = [0.0] * num_blocks

    def scores(self) -> dict[str, Any]:
        order = sorted(range(len(self.sums)), key=lambda block: (self.sums[block], block))
        return {"distance": window_sums(self.sums), "order": order}


class Magnitude(_Summed, WeightCriterion):
    """Sum of |w| over all parameters of a block, norms and biases included, as the checkpoint stores them."""

    name = "magnitude"

    def read(self, checkpoint: Checkpoint) -> None:
        """Add up the checkpoint's tensors, one in memory at a time; no model is made."""
        from safetensors import safe_open
        from tqdm import tqdm

        for path in checkpoint.weight_files:
            with safe_open(path, "pt") as file:
                for name in tqdm(file.keys(), desc=path.name, unit="tensor"):
                    match = BLOCK_NAME.match(name)
                    if match and not STORED_BUFFERS.search(name):
                        self.sums[int(match["index"])] += magnitude(file.get_tensor(name))


class Taylor(_Summed, ModelCriterion, OfTexts):
    """Sum over all parameters of a block of |g * w|, g being the gradient of one loss: that of all texts together.

    The loss is cross-entropy in nats, averaged over all predicted tokens of the `num_texts` texts (10 in the paper; a
    recipe takes no more than that). So gradients of batches are added first and the absolute value is taken of each
    element after the last one: |sum over batches of g * w|. Texts that fit one batch, as ten do, need no memory for
    that: a block's gradients are used and freed as the backward pass reaches it. More batches keep one gradient a
    weight, in the weights' own dtype. Embeddings and head get no gradient; a block's activations are computed again in
    the backward pass, so that one state a block is kept.
    """

    name = "taylor"

    def __init__(self, num_texts: int = 10) -> None:
        self.num_texts = num_texts

    def runs(self, num_blocks: int) -> tuple[float, float]:
        return 4.0 * num_blocks, 3.0  # forward once more in the backward pass, which costs two

    def measure(self, model: Any, rows: Sequence[Row], batch_size: int, max_tokens: int = MAX_TOKENS) -> None:
        from torch.utils.checkpoint import checkpoint
        from tqdm import tqdm

        layers, body = checkpoints.blocks(model), checkpoints.decoder(model)
        device = next(model.parameters()).device
        batches = length_batches([len(row.ids) for row in rows], batch_size, max_tokens)
        tokens = sum(len(row.ids) - 1 for row in rows)
        block_weights = [(block, weight) for block, layer in enumerate(layers) for weight in layer.parameters()]
        model.requires_grad_(False)
        adding = [True]

        def spend(block: int, weight: Tensor) -> None:
            if weight.grad is not None and not adding[0]:
                self.sums[block] += taylor(weight.detach(), weight.grad)
                weight.grad = None

        handles = []
        for block, weight in block_weights:
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(partial(spend, block)))
        checkpointed = {b: partial(checkpoint, layer.forward, use_reentrant=False) for b, layer in enumerate(layers)}
        try:
            with forwards(layers, checkpointed), tqdm(total=len(rows), desc="gradients", unit="text") as progress:
                for number, batch in enumerate(batches, 1):
                    adding[0] = number < len(batches)
                    ids, mask = padded([rows[index].ids for index in batch], device)
                    hidden = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                    hidden.backward(_state_gradients(model, hidden.detach(), ids, mask, tokens))
                    progress.update(len(batch))
        finally:
            for handle in handles:
                handle.remove()
            model.requires_grad_(False)
        for block, weight in block_weights:
            spend(block, weight)  # what an earlier batch reached and the last one did not, such as an expert


def _state_gradients(model: Any, hidden: Tensor, ids: Tensor, mask: Tensor, tokens: int) -> Tensor:
    """The gradient of summed cross-entropy / `tokens` in the final states (B, T, D), logits made some at a time."""
    import torch

    from sdd.forward.losses import target_loss_sum

    rows, positions = mask[:, 1:].nonzero(as_tuple=True)
    gradient = torch.zeros_like(hidden)
    step = max(1, LOGITS // model.config.vocab_size)
    for start in range(0, len(rows), step):
        row, token = rows[start : start + step], positions[start : start + step]
        states = hidden[row, token].requires_grad_(True)
        loss = target_loss_sum(checkpoints.head_logits(model, states), ids[row, token + 1]) / tokens
        (gradient[row, token],) = torch.autograd.grad(loss, states)
    return gradient
