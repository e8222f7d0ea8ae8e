r"""Public instruction datasets, as rows of the columns that the hub's files have.

GSM8K (arXiv 2110.14168), Dolly (Databricks, 2023), Alpaca (Stanford, 2023), OpenMathInstruct 1 and 2 (arXiv 2402.10176,
2410.01560). The answers of a row are its writer's, except for what a machine put into them: GSM8K's calculator notes.
Ids are places in the file, so that a row keeps its id whatever is left out before it.
"""

import re
from typing import Any

from sdd.answers import extract
from sdd.data import Example
from sdd.data.files import text_of
from sdd.data.rows import Rows
from sdd.errors import UserError

_CALCULATOR = re.compile(r"<<[^<>]*>>")


def _task(instruction: str, context: Any) -> str:
    """The instruction, and below it what it is about, if there is anything."""
    return f"{instruction}\n\n{context}" if isinstance(context, str) and context.strip() else instruction


def _group(value: Any) -> str | None:
    return value if isinstance(value, str) else None


class GSM8K(Rows):
    """Word problems; the reference ends in "#### 18". The calculator's notes (<<48/2=24>>) are taken out."""

    columns = ("question", "answer")

    def example(self, row: dict[str, Any], id: str, place: str) -> Example:
        written = text_of(row, "answer", place)
        if "####" not in written:
            raise UserError(f"{place}: the field 'answer' has no final answer after '####'")
        reference = _CALCULATOR.sub("", written)
        return Example(id, text_of(row, "question", place), reference, extract(reference, "gsm8k"))


class Dolly(Rows):
    """Instructions of eight categories, some with a text that they are about."""

    columns = ("instruction", "context", "response")

    def example(self, row: dict[str, Any], id: str, place: str) -> Example:
        prompt = _task(text_of(row, "instruction", place), row.get("context"))
        return Example(id, prompt, text_of(row, "response", place), group=_group(row.get("category")))


class Alpaca(Rows):
    """Instructions, some with an input. The published file has rows with an empty output, which are left out."""

    columns = ("instruction", "input", "output")

    def example(self, row: dict[str, Any], id: str, place: str) -> Example | None:
        if isinstance(row.get("output"), str) and not row["output"].strip():
            return None
        return Example(id, _task(text_of(row, "instruction", place), row.get("input")), text_of(row, "output", place))


class OpenMathInstruct1(Rows):
    """Solutions with code by Mixtral, of GSM8K's and MATH's questions; those marked wrong are left out."""

    columns = ("question", "generated_solution", "expected_answer")

    def example(self, row: dict[str, Any], id: str, place: str) -> Example | None:
        if row.get("is_correct") is False:
            return None
        return _solved(row, "question", id, place)


class OpenMathInstruct2(Rows):
    """Solutions by Llama 3.1 405B of MATH's and GSM8K's questions and of new ones made from them."""

    columns = ("problem", "generated_solution", "expected_answer")

    def example(self, row: dict[str, Any], id: str, place: str) -> Example:
        return _solved(row, "problem", id, place)


def _solved(row: dict[str, Any], question: str, id: str, place: str) -> Example:
    group = _group(row.get("problem_source") or row.get("dataset"))
    answer = text_of(row, "expected_answer", place)
    return Example(id, text_of(row, question, place), text_of(row, "generated_solution", place), answer, group=group)
