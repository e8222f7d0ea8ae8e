"""Rows of local files: JSONL, JSONL.gz and Parquet, each row with the words that name its place in an error.

A folder stands for the training split in it, as a download of a hub repository has it. Knows nothing of what the rows
mean.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sdd.errors import UserError
from sdd.store import digest_of, file_digest

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
SPLIT = ("train.jsonl", "train.jsonl.gz", "train.parquet", "train-*.parquet", "data/train-*.parquet")
"""Where a folder may keep its rows; the first pattern that matches counts."""


def data_files(path: Path, what: str) -> list[Path]:
    """The file itself, or the files of a folder's training split, in order; `what` names the setting in errors."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{what}={path}: no such file or folder")
    for pattern in SPLIT:
        if found := sorted(path.glob(pattern)):
            return found
    single = sorted(entry for entry in path.iterdir() if entry.name.endswith(SUFFIXES))
    if len(single) == 1:
        return single
    raise UserError(f"{what}={path}: the folder has no {', '.join(SPLIT[:3])}; name the file")


def files_digest(files: Sequence[Path]) -> str:
    """sha256 of the file, or of the sha256s of several; hexadecimal."""
    digests = [file_digest(path) for path in files]
    return digests[0] if len(digests) == 1 else digest_of(digests)


def read_rows(files: Sequence[Path], what: str, columns: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of every row; blank lines are no rows. A Parquet file without one of `columns` is refused."""
    for path in files:
        if path.suffix == ".parquet":
            yield from _parquet(path, what, columns)
        else:
            yield from _jsonl(path, what)


def _jsonl(path: Path, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        number = 0
        try:
            for number, data in enumerate(file, 1):
                if line := data.decode().strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise UserError(f"{what}={path}: line {number} is not a JSON object")
                    yield f"{what}={path}: line {number}", row
        except json.JSONDecodeError as error:
            raise UserError(f"{what}={path}: line {number} is not valid JSON ({error.msg})") from None
        except UnicodeDecodeError:
            raise UserError(f"{what}={path}: line {number} is not UTF-8 text") from None
        except (gzip.BadGzipFile, EOFError, zlib.error):
            raise UserError(f"{what}={path}: not a complete gzip file") from None


def _parquet(path: Path, what: str, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for column in columns:
                if column not in names:
                    raise UserError(f"{what}={path}: no column {column!r}; the file has {', '.join(names)}")
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{what}={path}: row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{what}={path}: not a complete Parquet file ({str(error).splitlines()[0]})") from None


def text_of(row: dict[str, Any], field: str, place: str) -> str:
    """The text of a field; a row without any is the user's mistake."""
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        wrong = "has no field" if field not in row else "has no text in the field"
        raise UserError(f"{place} {wrong} {field!r}")
    return value
