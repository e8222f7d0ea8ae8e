"""Files of a checkpoint folder: which may be there, that they are plain ones within it, and headers of safetensors.

A safetensors file is eight bytes of length, a header (JSON: name -> dtype, shape, byte range) and the bytes. Nothing
that a header claims is allocated: shapes have to fit the bytes that are there, each byte named once. Stock code never
sees a stranger's folder, only a view of it with the files that are known here. Knows nothing of what is in them.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from sdd.errors import UserError
from sdd.untrusted import check_inside, check_regular, printable, read_json

if TYPE_CHECKING:
    from torch import Tensor

SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""What a checkpoint carries besides weights and config, as far as it decides what the model says."""

WEIGHT_FILE = re.compile(r"[\w.-]{1,200}\.safetensors")

LARGEST_SIDE_FILE = 256 << 20
"""Bytes; a tokenizer with a vocabulary of 256k takes 35 MB."""

LARGEST_HEADER = 32 << 20
"""Bytes of a safetensors header; one of 5,000 tensors takes half a megabyte."""

LARGEST_EXTENT = 1 << 40
LONGEST_NAME = 300
MOST_AXES = 8

BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2}
BYTES |= {"BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8}
"""Bytes a number of every dtype that a header may name."""

FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
"""Those of them that are rounded."""

CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""How a header names the dtypes that a model is opened in."""

NAME = re.compile(rf"[!-~]{{1,{LONGEST_NAME}}}")

Header = dict[str, Any]


def check_part(path: Path, folder: Path, at_most: int | None = None) -> None:
    """Refuse what is no regular file of the model's own: a pipe, a folder, a link out of it, one too large.

    In the hub's cache a model's files are links, from `snapshots/<commit>` to the `blobs` of the same repository.
    """
    what = f"model.path={folder}: {path.name}"
    size = check_regular(path, what).st_size
    if at_most is not None and size > at_most:
        raise UserError(f"{what}: {size:,} bytes, more than the {at_most:,} that are read")
    snapshot = folder.resolve()
    in_cache = snapshot.parent.name == "snapshots" and snapshot.parent.parent.name.startswith("models--")
    if in_cache and path.resolve().parent == snapshot.parent.parent / "blobs":
        return
    check_inside(path, folder, f"{what} (put a copy in its place)")


def side_files(folder: Path) -> list[Path]:
    """The side files that are there, each of them a plain file of the folder."""
    files = [folder / name for name in SIDE_FILES if os.path.lexists(folder / name)]
    for path in files:
        check_part(path, folder, LARGEST_SIDE_FILE)
    return files


@contextmanager
def view(folder: Path, files: list[Path]) -> Iterator[Path]:
    """A temporary folder with these files of `folder` and no others: stock code looks for more than is known here."""
    with tempfile.TemporaryDirectory(prefix="sdd-view-") as name:
        shown = Path(name) / (folder.resolve().name or "model")
        shown.mkdir()
        for path in files:
            (shown / path.name).symlink_to(path.resolve())
        yield shown


def indexed_names(folder: Path) -> list[str]:
    """The weight files that the index names, sorted."""
    path = folder / "model.safetensors.index.json"
    check_part(path, folder)
    what = f"model.path={folder}: {path.name} is not a valid index"
    weight_map = read_json(path, what).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and WEIGHT_FILE.fullmatch(name) for name in names):
        raise UserError(f"{what}; fetch it again")
    return sorted(set(names))


# ---- headers ----------------------------------------------------------------------------------------------------


def read_header(file: BinaryIO, path: Path) -> tuple[Header, int]:
    """The header of a safetensors file and the offset of its first data byte."""
    start = file.read(8)
    size = os.fstat(file.fileno()).st_size
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    if 8 + length > size:
        raise _damaged(path, "the header is cut off")
    if length > LARGEST_HEADER:
        raise _damaged(path, f"a header of {length:,} bytes, more than the {LARGEST_HEADER:,} that are read")
    try:
        header: Header = json.loads(file.read(length), object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise _damaged(path, "the header is not valid") from None
    if not isinstance(header, dict):
        raise _damaged(path, "the header is not valid")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "the header is not valid: its metadata are no texts")
    ranges = []
    for name, entry in header.items():
        if name != "__metadata__":
            if reason := _wrong(name, entry):
                raise _damaged(path, f"the header is not valid: {reason} of tensor {printable(name[:80])}")
            ranges.append(tuple(entry["data_offsets"]))
    reached = 0
    for begin, end in sorted(ranges):
        if begin != reached:
            raise _damaged(path, "the header is not valid: tensors overlap, or leave bytes between them")
        reached = end
    if 8 + length + reached > size:
        raise _damaged(path, "the data are cut off")
    if 8 + length + reached < size:
        raise _damaged(path, "bytes that belong to no tensor follow the data")
    return header, 8 + length


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: damaged safetensors file ({reason}); fetch it again")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a key stands twice")
    return table


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_EXTENT


def _wrong(name: str, entry: Any) -> str:
    """What is wrong with a header's entry; empty where nothing is."""
    if not NAME.fullmatch(name):
        return "the name"
    if not isinstance(entry, dict):
        return "the entry"
    shape, offsets, dtype = entry.get("shape"), entry.get("data_offsets"), entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in BYTES:
        return "the dtype"
    if not isinstance(shape, list) or len(shape) > MOST_AXES or not all(map(_is_count, shape)):
        return "the shape"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        return "the byte range"
    if offsets[1] - offsets[0] != math.prod(shape) * BYTES[dtype]:
        return "the byte range, not that of its shape and dtype,"
    return "" if entry.keys() <= {"dtype", "shape", "data_offsets"} else "the entry"


def is_narrower(code: str, dtype: str | None) -> bool:
    """Whether a header's dtype is one of floats with fewer bytes than `dtype` ("float32"), which holds them exactly."""
    return dtype is not None and code in FLOATS and BYTES[code] < BYTES[CODES[dtype]]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a header describes it: `dtype` by its code ("BF16"), and the file that it is in."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path

    def read(self) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(self.name)
        return tensor


def read_headers(files: list[Path]) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint's files by name; refused where one is stored twice."""
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        with path.open("rb") as file:
            header, _ = read_header(file, path)
        header.pop("__metadata__", None)
        if twice := next((name for name in header if name in tensors), None):
            raise _damaged(path, f"tensor {twice} is in another file of the checkpoint too")
        for name, entry in header.items():
            tensors[name] = StoredTensor(name, entry["dtype"], tuple(entry["shape"]), path)
    return tensors
