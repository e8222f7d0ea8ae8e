"""Fine-tuning rows from a local file or folder, or from the hub: selection, order and what recipes say of them.

A dataset is a class with the columns that it reads and a mapping from one row to one `Example`; everything else is
shared here.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from sdd.data import Example, own_settings
from sdd.data.files import data_files, files_digest, read_rows
from sdd.data.hub import Repository, fetched_rows, stream
from sdd.errors import UserError
from sdd.store import digest_of
from sdd.untrusted import expanded


class Rows(ABC):
    """Rows of `path` (JSONL, JSONL.gz, Parquet, or a folder that holds one), else of the hub's repository.

    `num_rows` takes a seeded sample: prefixes of one permutation, so that a larger sample holds the smaller one. Of a
    repository that is streamed, it is the first rows of a shuffled stream.
    """

    columns: ClassVar[tuple[str, ...]] = ()
    has_gold = False

    def __init__(
        self,
        path: str | None = None,
        num_rows: int | None = None,
        seed: int = 0,
        families: list[str] | None = None,
        hub: dict[str, Any] | None = None,
    ) -> None:
        if families:
            raise UserError("dataset.families belongs to the embedded datasets; leave it out")
        self.path = None if path is None else expanded(path)
        self.repository = None
        if path is None:
            if not hub:
                raise UserError(f"dataset.path is not set; name a file whose rows have {', '.join(self._needed())}")
            self.repository = Repository.of(hub, "dataset")
            if self.repository.stream and num_rows is None:
                raise UserError(f"dataset.num_rows is not set; {self.repository.repository} is large and is streamed")
        self.num_rows, self.seed = num_rows, seed

    def _needed(self) -> tuple[str, ...]:
        """Columns that a file must have."""
        return self.columns

    def _instead(self) -> str | None:
        """One column that stands for all of these in a file that has it."""
        return None

    @abstractmethod
    def example(self, row: dict[str, Any], id: str, place: str) -> Example | None:
        """The row as an example; None for one that the dataset is better off without."""

    def _all(self) -> Iterator[Example]:
        """Every usable row, in the order of its source; ids must be unique."""
        seen: set[str] = set()
        for place, example in self._placed():
            if example.id in seen:
                first = next(first for first, other in self._placed() if other.id == example.id).rsplit(": ", 1)[1]
                raise UserError(f"{place} repeats the id {example.id!r} of {first}; ids must be unique")
            seen.add(example.id)
            yield example

    def _placed(self) -> Iterator[tuple[str, Example]]:
        """Every usable row, and the words that name its place."""
        if self.path is not None:
            rows: Any = read_rows(
                data_files(self.path, "dataset.path"), "dataset.path", self._needed(), self._instead()
            )
        else:
            assert self.repository is not None
            rows = fetched_rows(self.repository, "dataset", self._needed(), self._instead())
        for number, (place, row) in enumerate(rows):
            if (example := self.example(row, str(number), place)) is not None:
                yield place, example

    def _streamed(self, count: int) -> list[Example]:
        """The first usable rows of the stream, repeated ones left out; their ids are digests of their words."""
        assert self.repository is not None
        examples: dict[str, Example] = {}
        with closing(stream(self.repository, "dataset", self.seed)) as rows:
            for place, row in rows:
                example = self.example(row, digest_of(row)[:16], place)
                if example is not None:
                    examples.setdefault(example.id, example)
                if len(examples) == count:
                    break
        return list(examples.values())

    @cached_property
    def _selected(self) -> list[Example]:
        if self.repository is not None and self.repository.stream:
            assert self.num_rows is not None
            examples = self._streamed(self.num_rows)
        else:
            examples = list(self._all())
        name = self.path if self.path is not None else self.repository.repository  # type: ignore[union-attr]
        if not examples:
            raise UserError(f"dataset.path={name} is empty; it needs rows with {', '.join(map(repr, self._needed()))}")
        if self.num_rows is None:
            return examples
        if self.num_rows > len(examples):
            raise UserError(f"dataset.num_rows={self.num_rows}, but {name} has {len(examples)} rows")
        if self.repository is not None and self.repository.stream:
            return examples
        order = list(range(len(examples)))
        random.Random(self.seed).shuffle(order)
        return [examples[index] for index in order[: self.num_rows]]

    def examples(self) -> list[Example]:
        return list(self._selected)

    def known_rows(self) -> int | None:
        """How many rows there are, as far as it can be said without the hub."""
        return len(self._selected) if self.path is not None else self.num_rows

    def sources(self) -> dict[str, Path]:
        """Digests of `spec` -> the local path that they stand for: the file itself where there is one."""
        if self.path is None:
            return {}
        files = data_files(self.path, "dataset.path")
        return {self.spec()["digest"]: files[0] if len(files) == 1 else self.path}

    def spec(self) -> dict[str, Any]:
        """What recipes say of these rows; the seed counts only if there is a sample, a subclass's settings if given.

        `digest` is the file's sha256, or stands for the repository's files at a commit.
        """
        seed = None if self.num_rows is None else self.seed
        drawn = {"num_rows": self.num_rows, "seed": seed, **own_settings(self, Rows)}
        if self.repository is not None:
            return {"digest": self.repository.digest, "hub": self.repository.spec(), **drawn}
        assert self.path is not None
        assert self._selected  # a broken row is the user's to mend before anything is addressed
        return {"digest": files_digest(data_files(self.path, "dataset.path")), **drawn}
