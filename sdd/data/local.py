"""Rows and texts from a JSONL file (or .jsonl.gz), each line checked; a broken one is named by its number."""

import gzip
import json
import random
import zlib
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from sdd.data import Example
from sdd.errors import UserError
from sdd.store import file_digest


def read_jsonl(path: Path, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank; `what` names the setting in errors."""
    if not path.is_file():
        raise UserError(f"{what}={path}: no such file")
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for number, data in enumerate(file, 1):
                if line := data.decode().strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise UserError(f"{what}={path}: line {number} is not a JSON object")
                    yield number, row
        except json.JSONDecodeError as error:
            raise UserError(f"{what}={path}: line {number} is not valid JSON ({error.msg})") from None
        except UnicodeDecodeError:
            raise UserError(f"{what}={path}: line {number} is not UTF-8 text") from None
        except (gzip.BadGzipFile, EOFError, zlib.error):
            raise UserError(f"{what}={path}: not a complete gzip file") from None


def _text(row: dict[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        wrong = "has no field" if field not in row else "has no text in the field"
        raise UserError(f"{where} {wrong} {field!r}")
    return value


def _needs_path(path: str | None, what: str, fields: str) -> Path:
    if path is None:
        raise UserError(f"{what} is not set; name a JSONL file whose rows have {fields}")
    return Path(path).expanduser()


class LocalTexts:
    """The first `num_texts` rows' field `text`."""

    def __init__(self, num_texts: int, path: str | None = None) -> None:
        self.path, self.num_texts = _needs_path(path, "calibration.path", "`text`"), num_texts

    def texts(self) -> list[str]:
        rows = islice(read_jsonl(self.path, "calibration.path"), self.num_texts)
        where = f"calibration.path={self.path}: line"
        texts = [_text(row, "text", f"{where} {number}") for number, row in rows]
        if not texts:
            raise UserError(f"calibration.path={self.path} is empty; it needs rows with the field 'text'")
        return texts


class LocalRows:
    """Rows with `prompt`, `reference` and, if there, `id` and `answer`.

    `num_rows` takes a seeded sample: prefixes of one permutation, so that a larger sample holds the smaller one.
    """

    def __init__(
        self,
        path: str | None = None,
        num_rows: int | None = None,
        seed: int = 0,
        families: list[str] | None = None,
    ) -> None:
        if families:
            raise UserError("dataset.families belongs to the embedded datasets; leave it out for dataset=local")
        self.path = _needs_path(path, "dataset.path", "`prompt` and `reference`")
        self.num_rows, self.seed = num_rows, seed

    @cached_property
    def _selected(self) -> list[Example]:
        found: list[Example] = []
        seen: dict[str, int] = {}
        for number, row in read_jsonl(self.path, "dataset.path"):
            where = f"dataset.path={self.path}: line {number}"
            answer = row.get("answer")
            example = Example(
                id=str(row.get("id", len(found))),
                prompt=_text(row, "prompt", where),
                reference=_text(row, "reference", where),
                answer=None if answer is None else str(answer),
            )
            if example.id in seen:
                raise UserError(f"{where} repeats the id {example.id!r} of line {seen[example.id]}; ids must be unique")
            seen[example.id] = number
            found.append(example)
        if not found:
            raise UserError(f"dataset.path={self.path} is empty; it needs rows with 'prompt' and 'reference'")
        if self.num_rows is None:
            return found
        if self.num_rows > len(found):
            raise UserError(f"dataset.num_rows={self.num_rows}, but {self.path} has {len(found)} rows")
        order = list(range(len(found)))
        random.Random(self.seed).shuffle(order)
        return [found[index] for index in order[: self.num_rows]]

    def examples(self) -> list[Example]:
        return list(self._selected)

    def spec(self) -> dict[str, Any]:
        """What recipes say of these rows; `digest` is the file's sha256. The seed counts only if there is a sample."""
        assert self._selected
        return {
            "digest": file_digest(self.path),
            "num_rows": self.num_rows,
            "seed": None if self.num_rows is None else self.seed,
        }
