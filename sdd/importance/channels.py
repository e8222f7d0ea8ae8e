"""Which MLP channels are redundant: criteria as pure functions, and what each asks for. Higher is more important.

A channel is one coordinate of the MLP's inner state: a row of gate and up, a column of down. `taylor_width` and `sdm`
are SDMPrune (arXiv 2506.11120), without and with its second stage; `activation_width` is Minitron's (arXiv 2407.14679);
magnitude and random are the controls. The passes over texts live in `sample_gradients`; knows nothing of Hydra or the
store. A criterion's name and parameters are known without torch, which only computing imports.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sdd.importance.criteria import BlindChannels, ChannelCriterion, OfTexts, TextChannels, WeightChannels

if TYPE_CHECKING:
    from torch import Tensor

    from sdd.forward.row_states import RowStates
    from sdd.models.checkpoints import Checkpoint

PAPER = ((0.2, 0.307, 0.4, 0.2), (0.3, 0.46, 0.42, 0.5), (0.4, 0.61, 0.1, 0.2))
"""SDMPrune's own settings: share of all parameters removed, of the MLPs', alpha, temperature."""


def glu_magnitude(into: Sequence[Tensor], out: Tensor) -> Tensor:
    """The product of a channel's norms in all matrices it has a part in: list of (I, H), (H, I) -> (I,), float64.

    With gate, up and down taken together, what up gives and down takes away changes nothing, as it does not change the
    model (a scale moved between them); single norms would be fooled by it.
    """
    product: Tensor = out.double().norm(dim=0)
    for matrix in into:
        product = product * matrix.double().norm(dim=1)
    return product


def activation_norm(means: Tensor) -> Tensor:
    """Minitron's aggregation, mean over tokens and L2 over texts: mean |activation| (N, I) -> (I,)."""
    norms: Tensor = means.norm(dim=0)
    return norms


def kept_channels(importance: Sequence[float], width: int) -> list[int]:
    """The `width` most important channels, sorted; of equals the first."""
    order = sorted(range(len(importance)), key=lambda channel: (-importance[channel], channel))
    return sorted(order[:width])


class RandomWidth(BlindChannels):
    """Channels in a random order, another one in every block: the control."""

    name = "random_width"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def draw(self, num_blocks: int, width: int) -> list[list[float]]:
        importance = []
        for block in range(num_blocks):
            ranks = list(range(width))
            random.Random(f"channels {self.seed} {block}").shuffle(ranks)
            importance.append([float(rank) for rank in ranks])
        return importance


class MagnitudeWidth(WeightChannels):
    """Weight magnitude of gate, up and down together."""

    name = "magnitude_width"

    def read(self, checkpoint: Checkpoint) -> list[Tensor]:
        """The importance of every block's channels, from stored weights; one block in memory at a time."""
        from sdd.pruning.width import sizes_of

        sizes, stored = sizes_of(checkpoint), checkpoint.block_tensors
        mlp = sizes.mlp

        def tensor(block: int, layer: str) -> Tensor:
            return stored[block][f"{layer}.weight"].read()

        return [
            glu_magnitude(
                [matrix for layer in mlp.into for matrix in tensor(block, layer).chunk(mlp.stacks)],
                tensor(block, mlp.out),
            )
            for block in range(sizes.num_blocks)
        ]


class ActivationWidth(TextChannels):
    """What the channels carry: the L2 norm over texts of their mean absolute activation over tokens."""

    name = "activation_width"
    splits = True

    def measure(self, model: Any, rows: list[list[int]], max_tokens: int) -> list[Tensor]:
        from sdd.importance.sample_gradients import activation_norms

        return activation_norms(model, rows, max_tokens, self.kept("activations"))


class TaylorWidth(TextChannels):
    """Stage 1 of SDMPrune alone: first-order importance under cross-entropy."""

    name = "taylor_width"
    splits = True
    final_states: RowStates | None = None
    """Where the model's final states are left."""

    def measure(self, model: Any, rows: list[list[int]], max_tokens: int) -> list[Tensor]:
        from sdd.importance.sample_gradients import channel_importance

        return channel_importance(model, rows, max_tokens, kept=self.kept("importance"), final_states=self.final_states)


class SDM(ChannelCriterion, OfTexts):
    """Both stages: a small cut by stage 1, then the importance under the loss that holds to the uncut model.

    `first_cut` is that cut's share of the channels: 4.0 to 3.9 times the hidden size in the paper. `alpha` and
    `temperature` null stand for the paper's at the ratio nearest to `pruning.ratio`.
    """

    name = "sdm"
    splits = True
    final_states: RowStates | None = None
    """Where the uncut model's final states are left, and read if they are there: the first stage passed it too."""

    def __init__(self, first_cut: float = 0.025, alpha: float | None = None, temperature: float | None = None) -> None:
        self.first_cut, self.alpha, self.temperature = first_cut, alpha, temperature

    def resolved(self, ratio: float, of: str) -> dict[str, float]:
        """The settings as numbers."""
        column = 0 if of == "all" else 1
        nearest = min(PAPER, key=lambda row: abs(row[column] - ratio))
        alpha = nearest[2] if self.alpha is None else self.alpha
        temperature = nearest[3] if self.temperature is None else self.temperature
        return {"first_cut": float(self.first_cut), "alpha": float(alpha), "temperature": float(temperature)}

    def masked(self, first: Sequence[Tensor]) -> list[Tensor]:
        """The channels of the small cut, at least one a block, as boolean vectors."""
        import torch

        masks = []
        for importance in first:
            width = len(importance)
            removed = min(width - 1, max(1, round(self.first_cut * width)))
            mask = torch.ones(width, dtype=torch.bool)
            mask[kept_channels(importance.tolist(), width - removed)] = False
            masks.append(mask)
        return masks

    def measure(
        self, model: Any, rows: list[list[int]], max_tokens: int, first: Sequence[Tensor], teacher: Any = None
    ) -> list[Tensor]:
        """`first` is stage 1's importance; `teacher` the uncut model, where `model` itself is not."""
        from sdd.importance.sample_gradients import Distillation, channel_importance

        assert self.alpha is not None and self.temperature is not None, "resolved before the work begins"
        distillation = Distillation(self.alpha, self.temperature, self.masked(first), teacher)
        return channel_importance(model, rows, max_tokens, distillation, self.kept("importance"), self.final_states)
