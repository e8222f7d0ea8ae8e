"""sha256 of files, remembered by (path, size, modification time) so that a checkpoint is hashed once."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

SMALL = 1 << 20
"""Bytes; smaller files are hashed every time."""


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, hexadecimal, never remembered."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_digest(path: Path, memory: Path) -> str:
    """`file_digest`, looked up in the folder `memory` first when the file is large."""
    status = path.stat()
    if status.st_size < SMALL:
        return file_digest(path)
    key = json.dumps([str(path.resolve()), status.st_size, status.st_mtime_ns])
    note = memory / hashlib.sha256(key.encode()).hexdigest()
    with contextlib.suppress(OSError, ValueError):
        remembered = note.read_text()
        if len(remembered) == 64:
            return remembered
    sha256 = file_digest(path)
    with contextlib.suppress(OSError):
        memory.mkdir(parents=True, exist_ok=True)
        write_atomically(note, sha256)
    return sha256


def write_atomically(path: Path, text: str | Iterable[str]) -> None:
    """Write a file under another name in its folder, flush it to disk, then rename it into place.

    Parts of a text are written as they come, and never held together.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
