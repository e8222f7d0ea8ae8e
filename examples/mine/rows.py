"""Rows of a question, its choices, and the number of the right one."""

from typing import Any

from sdd.data import Example
from sdd.data.files import text_of
from sdd.data.rows import Rows
from sdd.errors import UserError


class Choices(Rows):
    columns = ("question", "choices", "right")

    def example(self, row: dict[str, Any], id: str, place: str) -> Example:
        choices, right = row["choices"], row["right"]
        if not isinstance(choices, list) or not isinstance(right, int) or not 0 <= right < len(choices):
            raise UserError(f"{place}: 'right' is not the number of one of the 'choices'")
        prompt = f"{text_of(row, 'question', place)} Choose: {', '.join(map(str, choices))}."
        return Example(id, prompt, f"It is {choices[right]}.", str(choices[right]))
