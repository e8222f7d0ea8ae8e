"""A user's own rows: tasks and answers, or conversations, under names of the user's choice, each row checked."""

from typing import Any

from sdd.data import Example
from sdd.data.files import text_of
from sdd.data.rows import Rows
from sdd.data.turns import Turns, taken_apart
from sdd.errors import UserError

FIELDS = ("prompt", "reference", "id", "answer", "messages", "system")


class LocalRows(Rows):
    """Rows with `prompt`, `reference` and, if there, `id` and `answer`; `fields` maps these to the file's own names.

    Rows without a prompt may have `messages`, a conversation whose last answer is the reference. `system` is looked at
    only where `fields` names it: a system prompt of the row's own, unless its conversation begins with one.
    """

    def __init__(
        self,
        path: str | None = None,
        num_rows: int | None = None,
        seed: int = 0,
        families: list[str] | None = None,
        fields: dict[str, str] | None = None,
        hub: dict[str, Any] | None = None,
    ) -> None:
        unknown = sorted(set(fields or ()) - set(FIELDS))
        if unknown:
            raise UserError(f"dataset.fields.{unknown[0]} is no field of a row; choose from {', '.join(FIELDS)}")
        self.fields = dict(fields) if fields else None
        self.names = {name: name for name in FIELDS} | (fields or {})
        super().__init__(path, num_rows, seed, families, hub)

    def _needed(self) -> tuple[str, ...]:
        """What a row is made of, and every field that was named."""
        named = self.fields or {}
        made_of = () if "messages" in named else (self.names["prompt"], self.names["reference"])
        return tuple(dict.fromkeys([*made_of, *named.values()]))

    def _instead(self) -> str | None:
        """The one column that a file may have instead."""
        return None if self.fields and {"prompt", "reference", "messages"} & set(self.fields) else "messages"

    def example(self, row: dict[str, Any], id: str, place: str) -> Example:
        row_id, answer = row.get(self.names["id"]), row.get(self.names["answer"])
        if not isinstance(row_id, str | int | float | None):
            raise UserError(f"{place}: the field {self.names['id']!r} is neither a text nor a number")
        before, prompt, reference = self._turns(row, place)
        return Example(
            id=str(id if row_id is None else row_id),
            prompt=prompt,
            reference=reference,
            answer=None if answer is None else str(answer),
            before=before,
        )

    def _turns(self, row: dict[str, Any], place: str) -> tuple[Turns, str, str]:
        """(turns before the prompt, prompt, reference)."""
        named, messages = self.fields or {}, self.names["messages"]
        if "messages" in named or (self._instead() in row and self.names["prompt"] not in row):
            before, prompt, reference = taken_apart(row.get(messages), f"{place}: the field {messages!r}")
        else:
            before, prompt = (), text_of(row, self.names["prompt"], place)
            reference = text_of(row, self.names["reference"], place)
        system = row.get(named["system"]) if "system" in named else None
        if not isinstance(system, str | None):
            raise UserError(f"{place}: the field {named['system']!r} is no text")
        if system and system.strip() and not any(turn["role"] == "system" for turn in before):
            before = ({"role": "system", "content": system}, *before)
        return before, prompt, reference
