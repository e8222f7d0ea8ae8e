"""States of rows that one pass leaves for later ones, which would compute the same again.

They are kept by row, without padding, in a file without a name. It is gone with the process, so that no run reads what
another one, a kill or a stranger left.
"""

import contextlib
import mmap
import tempfile
import weakref
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sdd.forward import chunks


class RowStates:
    """States (tokens, hidden) of rows of these lengths, in the order in which they came; on the disk of `folder`."""

    def __init__(self, lengths: Sequence[int], folder: Path) -> None:
        self.lengths, self.tokens = array("q", lengths), sum(lengths)
        self.starts, self.end = array("q", [-1]) * len(lengths), 0
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # open as long as this object is there
        weakref.finalize(self, self.file.close)
        self.like: Tensor | None = None
        self.mapped: Tensor | None = None

    def keep(self, numbers: Sequence[int], states: Tensor) -> bool:
        """Keep the states (B, T, H) of the rows of these numbers, padded on the right.

        False, and nothing is kept, where those of all rows would take more than `chunks.KEPT_STATES`. Where the disk
        has no room, raises OSError and lets go of what it had; nothing is kept from then on.
        """
        size = self.tokens * states.shape[-1] * states.element_size()
        if self.file.closed or size > chunks.KEPT_STATES:
            return False
        self.like, self.mapped = states.new_empty(0, states.shape[-1], device="cpu"), None
        try:
            for number, state in zip(numbers, states.detach().cpu(), strict=True):
                if self.starts[number] >= 0:
                    continue  # kept before memory ran out in the rest of that pass
                self.file.write(state[: self.lengths[number]].contiguous().view(torch.uint8).numpy())
                self.starts[number], self.end = self.end, self.end + self.lengths[number]
            self.file.flush()
        except OSError:
            self.like = None
            with contextlib.suppress(OSError):
                self.file.close()
            raise
        return True

    def of(self, numbers: Sequence[int]) -> Tensor | None:
        """The states of the rows of these numbers, padded on the right with zeros: (B, T, H), on the CPU; None where
        those of one are not kept."""
        if self.like is None or any(self.starts[number] < 0 for number in numbers):
            return None
        if self.mapped is None:
            mapped = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_COPY)
            self.mapped = torch.frombuffer(mapped, dtype=self.like.dtype).view(-1, self.like.shape[1])
        of_rows = [self.mapped[self.starts[n] : self.starts[n] + self.lengths[n]] for n in numbers]
        return torch.nn.utils.rnn.pad_sequence(of_rows, batch_first=True)
