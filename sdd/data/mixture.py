"""Several datasets as one: rows by weight, in a fixed order, each under its part's name."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from sdd.config.parts import id_of
from sdd.data import Example
from sdd.errors import UserError
from sdd.store import digest_of


class Mixture:
    """`num_rows` rows of the parts in proportion to their weights; ids are "part/id".

    Every turn goes to the part that is furthest behind its share, so that a smaller mixture is a prefix of a larger
    one. `parts` make a source with the number of rows asked for, drawn as that source draws them.
    """

    has_gold = False

    def __init__(
        self, parts: Mapping[str, Callable[[int], Any]], weights: Mapping[str, float], num_rows: int | None = None
    ) -> None:
        if num_rows is None:
            raise UserError("dataset.num_rows is not set; a mixture needs the number of rows to draw")
        if len(parts) < 2:
            raise UserError("dataset.parts: a mixture needs two parts or more; add +dataset@dataset.parts.NAME=OPTION")
        self.parts = {name: parts[name] for name in sorted(parts)}  # the order in which they were named counts nothing
        self.weights, self.num_rows = {name: weights[name] for name in self.parts}, num_rows

    def _turns(self) -> Iterator[str]:
        total, taken = sum(self.weights.values()), dict.fromkeys(self.parts, 0)
        for turn in range(1, self.num_rows + 1):
            behind = {part: self.weights[part] / total * turn - taken[part] for part in self.parts}
            name = max(behind, key=behind.__getitem__)
            taken[name] += 1
            yield name

    @cached_property
    def _sources(self) -> dict[str, Any]:
        rows_per_part = Counter(self._turns())
        return {
            name: self._call(name, self.parts[name], rows_per_part[name]) for name in self.parts if rows_per_part[name]
        }

    def _call(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except UserError as error:
            raise UserError(f"dataset.parts.{name}: {error}") from None

    @cached_property
    def _selected(self) -> list[Example]:
        rows = {name: iter(self._call(name, source.examples)) for name, source in self._sources.items()}
        drawn = ((name, next(rows[name])) for name in self._turns())
        return [
            dataclasses.replace(
                example, id=f"{name}/{example.id}", group=name if example.group is None else f"{name}/{example.group}"
            )
            for name, example in drawn
        ]

    def examples(self) -> list[Example]:
        return list(self._selected)

    def known_rows(self) -> int:
        return self.num_rows

    def sources(self) -> dict[str, Path]:
        return {digest: path for source in self._sources.values() for digest, path in source.sources().items()}

    def spec(self) -> dict[str, Any]:
        """What recipes say of these rows: every part's own spec and weight."""
        parts = {
            name: {
                "_target_": id_of(source),
                "weight": self.weights[name],
                **self._call(name, source.spec),
            }
            for name, source in self._sources.items()
        }
        return {"digest": digest_of(parts), "parts": parts, "num_rows": self.num_rows}


def part_of(id: str) -> str:
    """The name of the part that a mixture's row belongs to."""
    return id.split("/", 1)[0]
