"""The files of artifacts: rows and facts, written whole, and read as what may be a stranger's."""

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from itertools import chain, groupby
from pathlib import Path
from typing import Any, overload

from sdd.errors import UserError
from sdd.store.digests import write_atomically
from sdd.untrusted import (
    ANY,
    check_inside,
    check_shape,
    cleaned,
    cleaned_rows,
    read_json,
    read_lines,
    read_rows,
    read_text,
    row_of,
    strict_json,
)

AGAIN = "build its artifact again"


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Atomically, one object a line."""
    write_atomically(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of an artifact, which may be a stranger's."""
    yield from read_rows(path, f"{path}")


class Lines(Iterable[dict[str, Any]]):
    """The objects of such files, one after another, read as they are gone through: of a million, 24 MB are held.

    With `placed`, each has its place among all as `place`.
    """

    def __init__(self, *paths: Path, placed: bool = False) -> None:
        self.paths = paths
        self.files, self.starts, self.firsts = array("q"), array("q"), array("q")
        for number, path in enumerate(paths):
            self.firsts.append(len(self.starts))
            self.starts.extend(start for start, _, _ in read_lines(path, f"{path}"))
            self.files.extend([number] * (len(self.starts) - len(self.files)))
        self.order: Sequence[int] = range(len(self.starts))
        self.beside: dict[str, Sequence[Any]] = {"place": self.order} if placed else {}

    def at(self, places: Iterable[int]) -> "Lines":
        """Those at these places, in this order."""
        chosen = copy(self)
        chosen.order = array("q", (self.order[place] for place in places))
        return chosen

    def having(self, name: str, values: Mapping[int, float]) -> "Lines":
        """The same, each of those at the places of `values` with its value under a name."""
        more = copy(self)
        more.beside = self.beside | {name: array("d", (values.get(place, 0.0) for place in range(len(self.starts))))}
        return more

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, at: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, at: slice) -> "Lines": ...

    def __getitem__(self, at: int | slice) -> "dict[str, Any] | Lines":
        if isinstance(at, slice):
            return self.at(range(len(self))[at])
        return next(iter(self.at([at])))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, places in groupby(self.order, self.files.__getitem__):
            with self.paths[number].open("rb") as file:
                for place in places:
                    file.seek(self.starts[place])
                    where = f"{self.paths[number]}, row {place - self.firsts[number] + 1}"
                    row = row_of(file.readline().decode(), where)
                    yield row | {name: values[place] for name, values in self.beside.items()}


def read_facts(path: Path, shape: Any = ANY) -> dict[str, Any]:
    """A JSON object of an artifact, in a shape (see `sdd.untrusted.check_shape`)."""
    facts = read_json(path, f"{path}")
    check_shape(facts, shape, f"{path}")
    return facts


def write_json(path: Path, value: Any) -> None:
    pieces = json.JSONEncoder(indent=1, ensure_ascii=False).iterencode(value)
    write_atomically(path, chain(pieces, ["\n"]))


def shown_json(path: Path, shape: Any = ANY) -> Any:
    """JSON of an artifact in a shape (see `check_shape`), finite numbers only, cleaned for showing."""
    check_file(path, path.parent)
    value = strict_json(read_text(path, f"{path}"), f"{path}", f"; {AGAIN}")
    check_shape(value, shape, f"{path}")
    return cleaned(value)


def shown_rows(path: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of an artifact, cleaned for showing."""
    check_file(path, folder)
    yield from cleaned_rows(path, f"{path}")


def check_file(path: Path, folder: Path) -> None:
    """Refuse what is not there, or is a link out of the artifact's folder."""
    if not path.exists() and not path.is_symlink():
        raise UserError(f"{path} is missing; {AGAIN}")
    check_inside(path, folder, f"{path}")
