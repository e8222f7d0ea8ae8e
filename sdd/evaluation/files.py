"""Task rows from local files: `<data_dir>/<task>/<split>.jsonl`, `.jsonl.gz` or `.parquet`, in the hub's own fields.

MMLU's subjects share one file per split, told apart by the field `subject`. Every row is checked before any model is
opened; a broken one is named by its line.
"""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from sdd.data import files
from sdd.errors import UserError
from sdd.evaluation.definitions import Definition
from sdd.evaluation.suites import FOLDERS

WHAT = "evaluation.data_dir"
MMLU = ("cais/mmlu", "hails/mmlu_no_train")
"""Hub datasets of MMLU, which its variants in lm-eval name."""


def subject(task: Definition) -> str | None:
    """The subject whose rows a task takes from MMLU's files; None for every other task."""
    return str(task.setting("dataset_name")) if task.setting("dataset_path") in MMLU else None


def folder_of(task: Definition) -> str:
    return "mmlu" if subject(task) else FOLDERS.get(task.name, task.name)


def find_file(data_dir: Path, task: Definition, split: str) -> Path:
    """The file of a task's split; a user's mistake if there is none."""
    if not data_dir.is_dir():
        raise UserError(f"{WHAT}={data_dir}: no such folder")
    folder = data_dir / folder_of(task)
    for suffix in files.SUFFIXES:
        if os.path.lexists(path := folder / f"{split}{suffix}"):
            files.check_own(path, data_dir, WHAT)
            return path
    raise UserError(
        f"{WHAT}={data_dir}: {task.name} needs {folder_of(task)}/{split}.jsonl (or .jsonl.gz, .parquet), "
        "which is not there"
    )


def check_file(path: Path) -> None:
    """Refuse a file that is empty, or with a row that cannot be read or lacks a field of the first row."""
    status = path.stat()
    _check(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _check(path: Path, size: int, modified: int) -> None:
    first: set[str] | None = None
    for place, row in files.read_rows([path], WHAT):
        first = set(row) if first is None else first
        if missing := sorted(first - set(row)):
            raise UserError(f"{place} has no field {missing[0]!r}")
    if first is None:
        raise UserError(f"{WHAT}={path} is empty")


@lru_cache(maxsize=2)
def _by_subject(path: Path, modified: int) -> dict[str, list[dict[str, Any]]]:
    rows_by_subject: dict[str, list[dict[str, Any]]] = {}
    for place, row in files.read_rows([path], WHAT):
        if "subject" not in row:
            raise UserError(f"{place} has no field 'subject'")
        rows_by_subject.setdefault(str(row["subject"]), []).append(row)
    return rows_by_subject


def read_rows(path: Path, task: Definition) -> list[dict[str, Any]]:
    """The rows of a task, in the file's order."""
    wanted = subject(task)
    if wanted is None:
        return [row for _, row in files.read_rows([path], WHAT)]
    rows = _by_subject(path, path.stat().st_mtime_ns).get(wanted, [])
    if not rows:
        raise UserError(f"{WHAT}={path} has no row of the subject {wanted!r}")
    return rows
