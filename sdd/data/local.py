"""A user's own rows: `prompt` and `reference` under names of the user's choice, each row checked."""

from typing import Any

from sdd.data import Example
from sdd.data.files import text_of
from sdd.data.rows import Rows
from sdd.errors import UserError

FIELDS = ("prompt", "reference", "id", "answer")


class LocalRows(Rows):
    """Rows with `prompt`, `reference` and, if there, `id` and `answer`; `fields` maps these to the file's own names."""

    def __init__(
        self,
        path: str | None = None,
        num_rows: int | None = None,
        seed: int = 0,
        families: list[str] | None = None,
        fields: dict[str, str] | None = None,
    ) -> None:
        unknown = sorted(set(fields or ()) - set(FIELDS))
        if unknown:
            raise UserError(f"dataset.fields.{unknown[0]} is no field of a row; choose from {', '.join(FIELDS)}")
        self.fields = dict(fields) if fields else None
        self.names = {name: name for name in FIELDS} | (fields or {})
        super().__init__(path, num_rows, seed, families)

    def _needed(self) -> tuple[str, ...]:
        """The two that a row is made of, and every field that was named."""
        return tuple(dict.fromkeys([self.names["prompt"], self.names["reference"], *(self.fields or {}).values()]))

    def example(self, row: dict[str, Any], id: str, place: str) -> Example:
        row_id, answer = row.get(self.names["id"]), row.get(self.names["answer"])
        if not isinstance(row_id, str | int | float | None):
            raise UserError(f"{place}: the field {self.names['id']!r} is neither a text nor a number")
        return Example(
            id=str(id if row_id is None else row_id),
            prompt=text_of(row, self.names["prompt"], place),
            reference=text_of(row, self.names["reference"], place),
            answer=None if answer is None else str(answer),
        )
