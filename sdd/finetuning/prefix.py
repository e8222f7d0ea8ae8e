"""The states that enter the lowest trained block, computed once: below it all is frozen, and epochs show the same rows.

A resumed run computes the states again, in batches that depend on the rows alone, and so reads the same bits. Against a
pass of the whole student they differ as those of micro-batches of another size do: not at all in the same shape, else
by rounding. Knows nothing of what is trained above.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sdd.forward.batches import length_batches, padded
from sdd.forward.bypass import Bypass
from sdd.forward.memory import Halving
from sdd.forward.row_states import RowStates
from sdd.models.checkpoints import blocks, decoder

log = logging.getLogger(__name__)


def frozen_blocks(model: Any) -> int:
    """How many blocks lie below the lowest one that is trained; 0 where anything outside of the blocks is trained."""
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    by_block = [trained.intersection(block.parameters()) for block in blocks(model)]
    if not trained or set().union(*by_block) != trained:
        return 0
    return next(number for number, of_block in enumerate(by_block) if of_block)


class FrozenStates:
    """The states of rows as they enter a block."""

    def __init__(self, bypass: Bypass, first: int, states: RowStates) -> None:
        self.bypass, self.first, self.states = bypass, first, states

    @contextmanager
    def standing_in(self, numbers: Sequence[int], device: Any) -> Iterator[None]:
        """While open, the model that is shown just the rows of these numbers, padded on the right, begins at that
        block.

        The states of pads are zeros: no token sees them.
        """
        states = self.states.of(numbers)
        assert states is not None, "all rows were passed"
        below: dict[int, Tensor | None] = dict.fromkeys(range(self.first))
        with self.bypass.letting_through(below | {self.first - 1: states.to(device)}):
            yield


def frozen_states(
    model: Any,
    lengths: Sequence[int],
    ids_of: Callable[[int], list[int]],
    folder: Path,
    max_tokens: int,
    device: Any = "cpu",
) -> FrozenStates | None:
    """The states that enter the lowest trained block, made in passes of at most `max_tokens` padded tokens; of rows of
    these lengths, whose token ids are read by their numbers.

    None where that is the first block, where something below it draws random numbers in training, as dropout does, and
    where the states would take more than `chunks.KEPT_STATES` or more than the disk of `folder` has left.
    """
    first = frozen_blocks(model)
    if first == 0:
        return None
    bypass = Bypass(model)
    try:
        return _kept(bypass, first, model, lengths, ids_of, folder, max_tokens, device)
    except OSError as error:
        log.warning("%s: %s; what is frozen is passed in every step", folder, error.strerror)
        return None


def _kept(
    bypass: Bypass,
    first: int,
    model: Any,
    lengths: Sequence[int],
    ids_of: Callable[[int], list[int]],
    folder: Path,
    max_tokens: int,
    device: Any,
) -> FrozenStates | None:
    above: dict[int, Tensor | None] = dict.fromkeys(range(first, len(bypass.layers)))
    kept, drawn = RowStates(lengths, folder), _random_state(model.device)

    def passed(batch: Sequence[int]) -> Tensor:
        ids, mask = padded([ids_of(number) for number in batch], device)
        with torch.no_grad(), bypass.letting_through(above), bypass.catching([first]) as caught:
            decoder(model)(input_ids=ids, attention_mask=mask, use_cache=False)
        return caught[first]

    with tqdm(total=len(lengths), desc="frozen", unit="row") as progress:
        halving = Halving("rows below what is trained", lambda batch: len(batch) * lengths[batch[0]])
        batches = length_batches(lengths, len(lengths), max_tokens)
        for some, states in chain.from_iterable(halving(passed, batch) for batch in batches):
            if not torch.equal(drawn, _random_state(model.device)) or not kept.keep(some, states):
                return None
            progress.update(len(some))
    return FrozenStates(bypass, first, kept)


def _random_state(device: torch.device) -> Tensor:
    """Of the generator that dropout draws from there."""
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)  # type: ignore[no-any-return]
