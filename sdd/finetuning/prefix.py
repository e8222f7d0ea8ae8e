"""The states that enter the lowest trained block, computed once: below it all is frozen, and epochs show the same rows.

They are kept by row, without padding, in a file without a name. It is gone with the process, so that no run reads what
another one, a kill or a stranger left. A resumed run computes the states again, in batches that depend on the rows
alone, and so reads the same bits. Against a pass of the whole student they differ as those of micro-batches of another
size do: not at all in the same shape, else by rounding. Knows nothing of what is trained above.
"""

import logging
import mmap
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sdd.forward import chunks
from sdd.forward.batches import length_batches, padded
from sdd.forward.bypass import Bypass
from sdd.forward.memory import Halving
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
    """The states of rows as they enter a block, one behind the other: (all tokens, hidden); where each row's begin, by
    its number, and how many they are."""

    def __init__(
        self, bypass: Bypass, first: int, states: Tensor, starts: Sequence[int], lengths: Sequence[int]
    ) -> None:
        self.bypass, self.first, self.states, self.starts, self.lengths = bypass, first, states, starts, lengths

    @contextmanager
    def standing_in(self, numbers: Sequence[int], device: Any) -> Iterator[None]:
        """While open, the model that is shown just the rows of these numbers, padded on the right, begins at that
        block.

        The states of pads are zeros: no token sees them.
        """
        of_rows = [self.states[self.starts[n] : self.starts[n] + self.lengths[n]] for n in numbers]
        states = torch.nn.utils.rnn.pad_sequence(of_rows, batch_first=True)
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
    starts, end, tokens = array("q", lengths), 0, sum(lengths)
    with tempfile.TemporaryFile(dir=folder) as file, tqdm(total=len(lengths), desc="frozen", unit="row") as progress:

        def passed(batch: Sequence[int]) -> Tensor:
            ids, mask = padded([ids_of(number) for number in batch], device)
            with torch.no_grad(), bypass.letting_through(above), bypass.catching([first]) as caught:
                decoder(model)(input_ids=ids, attention_mask=mask, use_cache=False)
            return caught[first].cpu()

        drawn = _random_state(model.device)
        halving = Halving("rows below what is trained", lambda batch: len(batch) * lengths[batch[0]])
        batches = length_batches(lengths, len(lengths), max_tokens)
        for some, states in chain.from_iterable(halving(passed, batch) for batch in batches):
            size = tokens * states.shape[-1] * states.element_size()
            if size > chunks.KEPT_STATES or not torch.equal(drawn, _random_state(model.device)):
                return None
            for number, state in zip(some, states, strict=True):
                file.write(state[: lengths[number]].contiguous().view(torch.uint8).numpy())
                starts[number], end = end, end + lengths[number]
            progress.update(len(some))
        file.flush()
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    whole = torch.frombuffer(mapped, dtype=states.dtype).view(tokens, -1)
    return FrozenStates(bypass, first, whole, starts, lengths)


def _random_state(device: torch.device) -> Tensor:
    """Of the generator that dropout draws from there."""
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)  # type: ignore[no-any-return]
