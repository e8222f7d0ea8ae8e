"""Training rows whose token ids lie in a file (`sdd.forward.given`)."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

from sdd.finetuning.module import TrainingRow
from sdd.forward.given import TokenFile


class KeptRows(Sequence[TrainingRow]):
    """Rows in the order in which they came, in a file in `folder`, or where the machine keeps temporary ones."""

    def __init__(self, rows: Iterable[TrainingRow] = (), folder: Path | None = None) -> None:
        self.file = TokenFile(folder)
        self.starts, self.tokens, self.rejected = array("q"), array("i"), array("i")
        self.prompts, self.places, self.weights = array("i"), array("q"), array("d")
        for row in rows:
            self.append(row)

    def append(self, row: TrainingRow) -> None:
        rejected = row.rejected or []
        self.starts.append(self.file.append(row.ids + rejected))
        self.tokens.append(len(row.ids))
        self.rejected.append(len(rejected))
        self.prompts.append(row.prompt_length)
        self.places.append(-1 if row.place is None else row.place)
        self.weights.append(row.weight)

    @property
    def targets(self) -> Iterator[int]:
        """Target tokens of every row."""
        return (tokens - prompt for tokens, prompt in zip(self.tokens, self.prompts, strict=True))

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, at: int) -> TrainingRow: ...

    @overload
    def __getitem__(self, at: slice) -> list[TrainingRow]: ...

    def __getitem__(self, at: int | slice) -> TrainingRow | list[TrainingRow]:
        if isinstance(at, slice):
            return [self[number] for number in range(len(self))[at]]
        tokens = self.tokens[at]
        ids = self.file.read(self.starts[at], tokens + self.rejected[at])
        place = None if self.places[at] < 0 else self.places[at]
        return TrainingRow(ids[:tokens], self.prompts[at], ids[tokens:] or None, self.weights[at], place)
