"""What a stranger wrote is read within bounds and printed as text.

A shared folder may hold anything under a known name: a named pipe that never ends, a link out of the folder, a file of
terabytes, JSON a million brackets deep, names that steer a terminal. Everything that reads such files does it through
here. Knows nothing of what the files mean.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

from sdd.errors import UserError

SMALL_FILE = 64 << 20
"""Bytes of the largest file that is read as a whole: a tokenizer with a vocabulary of 256k takes 35 MB."""


def printable(text: str) -> str:
    """The text with every character that steers a terminal (control, format, line separator, surrogate) escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def check_regular(path: Path, what: str) -> os.stat_result:
    """The status of a regular file, links followed; `what` opens the line that refuses a pipe, a device, a folder."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no name of a file"
        raise UserError(f"{what}: {reason}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{what}: not a regular file")
    return status


def check_inside(path: Path, folder: Path, what: str) -> None:
    """Refuse a link that leads out of `folder`."""
    try:
        inside = path.resolve(strict=True).is_relative_to(folder.resolve(strict=True))
    except (OSError, RuntimeError):
        raise UserError(f"{what}: a link that leads nowhere") from None
    if not inside:
        raise UserError(f"{what}: a link to a file outside its folder, which is not followed")


def read_text(path: Path, what: str, at_most: int = SMALL_FILE) -> str:
    """A regular UTF-8 file of at most `at_most` bytes."""
    size = check_regular(path, what).st_size
    if size > at_most:
        raise UserError(f"{what}: {size:,} bytes, more than the {at_most:,} that are read")
    try:
        with path.open("rb") as file:
            return file.read(at_most + 1).decode()
    except UnicodeDecodeError:
        raise UserError(f"{what}: not UTF-8 text") from None


def parse_json(text: str, what: str) -> Any:
    """JSON; too deep, too large a number and plain nonsense are refused alike."""
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{what}: JSON that is nested too deeply") from None
    except ValueError:
        raise UserError(f"{what}: not valid JSON") from None


def read_json(path: Path, what: str, at_most: int = SMALL_FILE) -> dict[str, Any]:
    """A JSON object from a regular file."""
    value = parse_json(read_text(path, what, at_most), what)
    if not isinstance(value, dict):
        raise UserError(f"{what}: not a JSON object")
    return value
