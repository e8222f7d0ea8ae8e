"""Token ids that lie in a file without a name: of a million rows some 40 MB are held, however long they are.

They are read where they are asked for, some microseconds beside what a pass takes. The file is read and not mapped, so
that what was read counts as the machine's cache and not as memory of this process.
"""

import os
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import overload

from sdd.forward.teacher_forcing import Row

WIDTH = array("i").itemsize


class TokenFile:
    """Token ids one after another, in a file in `folder`, or where the machine keeps temporary ones."""

    def __init__(self, folder: Path | None = None) -> None:
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self.end = 0

    def append(self, ids: list[int]) -> int:
        """Where they start."""
        array("i", ids).tofile(self.file)
        start, self.end = self.end, self.end + len(ids)
        return start

    def read(self, start: int, number: int) -> list[int]:
        self.file.flush()
        ids = array("i")
        ids.frombytes(os.pread(self.file.fileno(), WIDTH * number, WIDTH * start))
        assert len(ids) == number, f"{len(ids)} tokens of {number} are there"
        return ids.tolist()


class Given(Sequence[Row]):
    """Prompts and the answers that are given to them, to be passed in another order than they come in."""

    def __init__(self, folder: Path) -> None:
        self.file = TokenFile(folder)
        self.starts, self.prompts, self.answers = array("q"), array("i"), array("i")

    def append(self, ids: list[int], prompt: int) -> None:
        """The ids of both, the first `prompt` of them the prompt's."""
        self.starts.append(self.file.append(ids))
        self.prompts.append(prompt)
        self.answers.append(len(ids) - prompt)

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, at: int) -> Row: ...

    @overload
    def __getitem__(self, at: slice) -> list[Row]: ...

    def __getitem__(self, at: int | slice) -> Row | list[Row]:
        if isinstance(at, slice):
            return [self[number] for number in range(len(self))[at]]
        prompt = self.prompts[at]
        ids = self.file.read(self.starts[at], prompt + self.answers[at])
        return ids[:prompt], ids[prompt:]
