"""Rows of local files: JSONL, JSONL.gz and Parquet, each row with the words that name its place in an error.

A folder stands for the training split in it, as a download of a hub repository has it. Knows nothing of what the rows
mean.
"""

import gzip
import json
import stat
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sdd.errors import UserError
from sdd.store import digest_of, file_digest
from sdd.untrusted import check_inside, check_regular, printable

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
SPLIT = ("train.jsonl", "train.jsonl.gz", "train.parquet", "train-*.parquet", "data/train-*.parquet")
"""Where a folder may keep its rows; the first pattern that matches counts."""

LINE_BYTES = 64 << 20
"""Bytes of the longest line that is read."""
FREE_BYTES, RATIO = 64 << 20, 100
"""A packed file may unpack to `FREE_BYTES`, or to `RATIO` times its own size."""
ROWS_PER_BYTE = 100
"""Rows that a Parquet file can have for each of its bytes: a row of texts takes more than one."""
BATCH_ROWS = 1024


def data_files(path: Path, setting: str) -> list[Path]:
    """The file itself, or the files of a folder's training split, in order; `setting` is what errors call it.

    A folder may come from anyone: a link in it that leads out of it is not followed.
    """
    name = f"{setting}={printable(str(path))}"
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError):
        raise UserError(f"{name}: no such file or folder") from None
    if not is_folder:
        check_regular(path, name)
        return [path]
    for pattern in SPLIT:
        if files := sorted(path.glob(pattern)):
            break
    else:
        files = [entry for entry in path.iterdir() if entry.name.endswith(SUFFIXES)]
        if len(files) != 1:
            raise UserError(f"{name}: the folder has no {', '.join(SPLIT[:3])}; name the file")
    for file in files:
        check_own(file, path, setting)
    return files


def check_own(file: Path, folder: Path, setting: str) -> None:
    """Refuse what is no regular file of a folder; the hub's cache links its files to `blobs` beside `snapshots`."""
    name = f"{setting}={printable(str(file))}"
    check_regular(file, name)
    if folder.resolve().parent.name == "snapshots" and file.resolve().parent == folder.resolve().parents[1] / "blobs":
        return
    check_inside(file, folder, name)


def files_digest(files: Sequence[Path]) -> str:
    """sha256 of the file, or of the sha256s of several; hexadecimal."""
    digests = [file_digest(path) for path in files]
    return digests[0] if len(digests) == 1 else digest_of(digests)


def read_rows(
    files: Sequence[Path], setting: str, columns: Sequence[str] = (), instead: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of every row; blank lines are no rows. A Parquet file without one of `columns` is refused, unless it
    has the one that may stand there `instead`."""
    for path in files:
        check_regular(path, f"{setting}={printable(str(path))}")
        if path.suffix == ".parquet":
            yield from _parquet(path, setting, columns, instead)
        else:
            yield from _jsonl(path, setting)


def _check_ratio(size: int, path: Path, name: str) -> None:
    """Refuse a small file that stands for a huge one; texts are packed to a tenth, and rarely to a fiftieth."""
    if size > FREE_BYTES and size > RATIO * path.stat().st_size:
        raise UserError(f"{name}: more than {RATIO} times as large unpacked as it is; it is not read further")


def _jsonl(path: Path, setting: str) -> Iterator[tuple[str, dict[str, Any]]]:
    name = f"{setting}={printable(str(path))}"
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        number, size = 0, 0
        try:
            for number, data in enumerate(iter(partial(file.readline, LINE_BYTES + 1), b""), 1):
                size += len(data)
                if len(data) > LINE_BYTES:
                    raise UserError(f"{name}: line {number} has more than {LINE_BYTES:,} bytes")
                _check_ratio(size, path, name)
                if line := data.decode().strip():
                    yield f"{name}: line {number}", _row(line, f"{name}: line {number}")
        except UnicodeDecodeError:
            raise UserError(f"{name}: line {number} is not UTF-8 text") from None
        except (gzip.BadGzipFile, EOFError, zlib.error):
            raise UserError(f"{name}: not a complete gzip file") from None


def _row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{place} is not valid JSON (nested too deeply, or too long a number)") from None
    if not isinstance(row, dict):
        raise UserError(f"{place} is not a JSON object")
    if "\\ud" in line or "\\uD" in line:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError):
            raise UserError(
                f"{place} has half a character (a lone surrogate such as \\ud800), which is no text"
            ) from None
    return row


def _parquet(
    path: Path, setting: str, columns: Sequence[str], instead: str | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = f"{setting}={printable(str(path))}"
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            for column in columns:
                if column not in schema.names and instead not in schema.names:
                    names = printable(", ".join(schema.names)[:500])
                    raise UserError(f"{name}: no column {column!r}; the file has {names}")
            if file.metadata.num_rows > ROWS_PER_BYTE * path.stat().st_size:
                raise UserError(f"{name}: says that it has {file.metadata.num_rows:,} rows, which it cannot hold")
            _check_ratio(sum(_unpacked(file.metadata)), path, name)
            leaves = map(file.schema.column, range(len(file.schema)))
            texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        number, size = 0, 0
        with pq.ParquetFile(path, read_dictionary=texts) as file:
            for batch in file.iter_batches(BATCH_ROWS):
                size += sum(map(_bytes, batch.columns))
                _check_ratio(size, path, name)
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}: row {number}", row
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError, OverflowError) as error:
        reason = printable((str(error).splitlines() or [type(error).__name__])[0])[:300]
        raise UserError(f"{name}: not a complete Parquet file ({reason})") from None


def _unpacked(metadata: Any) -> Iterator[int]:
    """Bytes that each of the file's row groups says it has once unpacked."""
    for number in range(metadata.num_row_groups):
        yield metadata.row_group(number).total_byte_size


def _bytes(column: Any) -> int:
    """Bytes of a column's values once they are written out: a dictionary may hold a long one that every value names."""
    import pyarrow as pa
    from pyarrow import compute

    kind = column.type
    if pa.types.is_dictionary(kind):
        lengths = compute.cast(compute.binary_length(column.dictionary), pa.int64())
        return int(compute.sum(lengths.take(column.indices)).as_py() or 0)
    if pa.types.is_struct(kind):
        return sum(map(_bytes, column.flatten()))
    if pa.types.is_map(kind):
        return _bytes(column.keys) + _bytes(column.items)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _bytes(column.flatten())
    return int(column.nbytes)


def text_of(row: dict[str, Any], field: str, place: str) -> str:
    """The text of a field; a row without any is the user's mistake."""
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        wrong = "has no field" if field not in row else "has no text in the field"
        raise UserError(f"{place} {wrong} {field!r}")
    return value
