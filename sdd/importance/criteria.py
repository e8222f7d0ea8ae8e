"""What a criterion is: of blocks or of MLP channels, and by its type, what it looks at.

    looks at      of blocks                         of channels
    Blind         BlockCriterion                    BlindChannels
    OfWeights     WeightCriterion                   WeightChannels
    OfTexts       StateCriterion, ModelCriterion    TextChannels, SDM
    OfRows        ModelCriterion                    -

What a criterion looks at decides its key and what is opened for it, so that each is of exactly one of the four kinds.
Knows nothing of what any of them computes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from sdd.forward.bypass import Row
    from sdd.models.checkpoints import Checkpoint


class Criterion(ABC):
    """What scores blocks or MLP channels.

    In the folder `scratch` it may keep what it has summed up, to go on from after a kill (`sdd.forward.sums`). One that
    `splits` does nothing with texts but add up, so that several ranks share them.
    """

    name: str
    scratch: Path | None = None
    splits = False

    def kept(self, name: str) -> Path | None:
        """A file in the folder, where there is one."""
        return self.scratch / f"{name}.safetensors" if self.scratch else None


# ---- what it looks at -----------------------------------------------------------------------------------------------


class Blind(Criterion):
    """Looks at nothing but sizes."""


class OfWeights(Criterion):
    """Looks at the checkpoint's tensors; no model is made."""


class OfTexts(Criterion):
    """Looks at the model while it reads the calibration texts."""


class OfRows(Criterion):
    """Looks at the model while it reads the first of the fine-tuning rows."""


# ---- of blocks ------------------------------------------------------------------------------------------------------


class BlockCriterion(Criterion):
    """Starts anew with a model of so many blocks, looks, and says the content of `scores.json`."""

    @abstractmethod
    def start(self, num_blocks: int) -> None: ...

    @abstractmethod
    def scores(self) -> dict[str, Any]: ...


class WeightCriterion(BlockCriterion, OfWeights):
    """One that reads the checkpoint's tensors."""

    @abstractmethod
    def read(self, checkpoint: Checkpoint) -> None: ...


class StateCriterion(BlockCriterion, OfTexts):
    """One that is told of each block's states as texts pass: see `sdd.forward.batches.Observer`, also for `sums`."""

    @abstractmethod
    def observe(self, block: int, entering: Tensor, leaving: Tensor, mask: Tensor) -> None: ...

    @abstractmethod
    def finish_batch(self) -> None: ...


class ModelCriterion(BlockCriterion):
    """One that runs the model itself, on texts or on rows."""

    @abstractmethod
    def measure(self, model: Any, rows: Sequence[Row], batch_size: int) -> None: ...

    @abstractmethod
    def runs(self, num_blocks: int) -> tuple[float, float]:
        """How often a text passes through a block, and through the head."""


# ---- of channels ----------------------------------------------------------------------------------------------------


class ChannelCriterion(Criterion):
    """Says the importance of every block's channels: a vector of length intermediate_size a block."""


class BlindChannels(ChannelCriterion, Blind):
    """One that draws it."""

    @abstractmethod
    def draw(self, num_blocks: int, width: int) -> list[list[float]]: ...


class WeightChannels(ChannelCriterion, OfWeights):
    """One that reads the checkpoint's tensors."""

    @abstractmethod
    def read(self, checkpoint: Checkpoint) -> list[Tensor]: ...


class TextChannels(ChannelCriterion, OfTexts):
    """One that runs the model, in passes of at most `max_tokens` padded tokens."""

    @abstractmethod
    def measure(self, model: Any, rows: list[list[int]], max_tokens: int) -> list[Tensor]: ...
