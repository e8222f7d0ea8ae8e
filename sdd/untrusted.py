"""What a stranger wrote is read within bounds and printed as text.

A shared folder may hold anything under a known name: a named pipe that never ends, a link out of the folder, a file of
terabytes, JSON a million brackets deep, names that steer a terminal. Everything that reads such files does it through
here. Knows nothing of what the files mean.
"""

import json
import math
import os
import re
import stat
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdd.errors import UserError

SMALL_FILE = 64 << 20
"""Bytes of the largest file that is read as a whole: a tokenizer with a vocabulary of 256k takes 35 MB."""

LARGE_FILE = 8 << 30
"""Bytes of the largest file that is read row by row."""
LONGEST_ROW = 16 << 20
"""Bytes of a row: a prompt of a few million tokens."""
DEEPEST = 40
"""Levels of a value that a stage wrote; they nest about five."""
ANY = object
"""A shape that holds anything that is not nested too deeply."""
_NONE = object()
"""No shape at all."""


def tell_error(error: ValueError | OSError) -> int:
    """Tell a user's mistake, or a file that cannot be used, in one line on stderr; the exit code."""
    line = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
    print(f"error: {printable(' '.join(line.split()))}", file=sys.stderr)
    return 2


def printable(text: str) -> str:
    """The text with every character that steers a terminal (control, format, line separator, surrogate) escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def cleaned(value: Any) -> Any:
    """JSON as text to be shown: what steers a page or hides in it is escaped, keys included; lines and joiners stay."""
    if isinstance(value, str):
        return value if value.isascii() and value.isprintable() else "".join(map(_shown, value))
    if isinstance(value, list):
        return [cleaned(item) for item in value]
    return {cleaned(key): cleaned(item) for key, item in value.items()} if isinstance(value, dict) else value


def _shown(character: str) -> str:
    kind = unicodedata.category(character)
    if kind not in ("Cc", "Cf", "Cs", "Zl", "Zp") or character in "\n\t\r\u00ad\u200c\u200d":
        return character
    return character.encode("unicode_escape", "backslashreplace").decode()


def as_markdown(text: str) -> str:
    """One line of Markdown that is taken for neither HTML, a link, an image nor the end of a cell."""
    text = " ".join(text.split())
    for character, escape in (("\\", "\\\\"), ("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "\\`")):
        text = text.replace(character, escape)
    return text.replace("](", "]\\(").replace("![", "!\\[").replace("://", ":\\//").replace("www.", "www\\.")


def as_code(text: str) -> str:
    """Text between backticks, on one line."""
    return f"`{printable(' '.join(text.split())).replace('`', chr(39))}`"


def as_block(text: str, language: str = "") -> list[str]:
    """Lines of a block of code that nothing in it ends."""
    runs = re.findall(r"`+", text)
    fence = "`" * max(3, *(len(run) + 1 for run in runs), 3)
    return [fence + language, *(printable(line) for line in text.splitlines()), fence]


def expanded(path: str) -> Path:
    """A path with `~` as the home of its user; one of nobody's stays as it is, and leads nowhere."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def check_regular(path: Path, label: str) -> os.stat_result:
    """The status of a regular file, links followed; `label` opens the line that refuses a pipe, a device, a folder."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no name of a file"
        raise UserError(f"{label}: {reason}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{label}: not a regular file")
    return status


def check_inside(path: Path, folder: Path, label: str) -> None:
    """Refuse a link that leads out of `folder`."""
    if _is_without_links(path, folder):
        return
    try:
        inside = path.resolve(strict=True).is_relative_to(folder.resolve(strict=True))
    except (OSError, RuntimeError):
        raise UserError(f"{label}: a link that leads nowhere") from None
    if not inside:
        raise UserError(f"{label}: a link to a file outside its folder, which is not followed")


def _is_without_links(path: Path, folder: Path) -> bool:
    """Whether a path goes down from the folder through what is there and is no link: told without resolving either."""
    if not path.is_relative_to(folder) or ".." in path.parts:
        return False
    place = str(folder)
    for part in path.parts[len(folder.parts) :]:
        place = f"{place}{os.sep}{part}"
        try:
            if stat.S_ISLNK(os.lstat(place).st_mode):
                return False
        except OSError:
            return False
    return True


def read_text(path: Path, label: str, at_most: int = SMALL_FILE) -> str:
    """A regular UTF-8 file of at most `at_most` bytes."""
    size = check_regular(path, label).st_size
    if size > at_most:
        raise UserError(f"{label}: {size:,} bytes, more than the {at_most:,} that are read")
    try:
        with path.open("rb") as file:
            return file.read(at_most + 1).decode()
    except UnicodeDecodeError:
        raise UserError(f"{label}: not UTF-8 text") from None


def parse_json(text: str, label: str) -> Any:
    """JSON; too deep, too large a number and plain nonsense are refused alike."""
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{label}: JSON that is nested too deeply") from None
    except ValueError:
        raise UserError(f"{label}: not valid JSON") from None


def strict_json(text: str, label: str, advice: str = "") -> Any:
    """JSON without NaN and infinities."""

    def refuse(name: str) -> None:
        raise UserError(f"{label} holds {name}, which is no number{advice}")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise UserError(f"{label}: JSON that is nested too deeply{advice}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{label} is not valid JSON (line {error.lineno}){advice}") from None
    except UserError:
        raise
    except ValueError:
        raise UserError(f"{label}: not valid JSON{advice}") from None


def read_json(path: Path, label: str, at_most: int = SMALL_FILE) -> dict[str, Any]:
    """A JSON object from a regular file."""
    value = parse_json(read_text(path, label, at_most), label)
    if not isinstance(value, dict):
        raise UserError(f"{label}: not a JSON object")
    return value


def read_rows(path: Path, label: str, at_most: int = LARGE_FILE) -> Iterator[dict[str, Any]]:
    """The JSON objects of a regular file, one a line; lines without any are left out."""
    for _, where, text in read_lines(path, label, at_most):
        yield row_of(text, where)


def cleaned_rows(path: Path, label: str) -> Iterator[dict[str, Any]]:
    """The same as text to be shown, with finite numbers, and nested no deeper than stages write."""
    for _, where, text in read_lines(path, label):
        row = row_of(text, where)
        _check_depth(row, label)
        is_plain = text.isascii() and text.isprintable() and not _ESCAPED.search(text)
        yield row if is_plain else cleaned(row)


_ESCAPED = re.compile(r"\\[ubf]")
"""How a line of JSON may write characters that it does not hold itself; ends of lines and tabs are shown."""


def read_lines(path: Path, label: str, at_most: int = LARGE_FILE) -> Iterator[tuple[int, str, str]]:
    """(first byte, words that name it, text) of every line of a regular file that has a text."""
    size = check_regular(path, label).st_size
    if size > at_most:
        raise UserError(f"{label}: {size:,} bytes, more than the {at_most:,} that are read")
    with path.open("rb") as file:
        number = start = 0
        while line := file.readline(LONGEST_ROW + 1):
            number += 1
            where = f"{label}, line {number}"
            if len(line) > LONGEST_ROW:
                raise UserError(f"{where}: more than {LONGEST_ROW:,} bytes")
            try:
                text = line.decode().strip()
            except UnicodeDecodeError:
                raise UserError(f"{where}: not UTF-8 text") from None
            if text:
                yield start, where, text
            start += len(line)


def row_of(text: str, where: str) -> dict[str, Any]:
    row = parse_json(text, where)
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object")
    return row


def check_shape(value: Any, shape: Any, label: str) -> None:
    """Refuse a value that is not of a shape.

    A shape is `str`, `bool`, `int`, `float` (any finite number), None, `ANY`, a tuple of alternatives, `[shape]` for a
    list, `{str: shape}` for an object of any names, or `{name: shape}` for one with these, of which those with a
    question mark may be missing, and with others that are not looked at.
    """
    if shape is ANY:
        _check_depth(value, label)
    elif isinstance(shape, tuple):
        alternative = next((alternative for alternative in shape if _is_like(value, alternative)), _NONE)
        if alternative is _NONE:
            raise UserError(f"{label}: not {' or '.join(map(_named, shape))}")
        if alternative is ANY or isinstance(alternative, list | dict):
            check_shape(value, alternative, label)
    elif not _is_like(value, shape):
        raise UserError(f"{label}: not {_named(shape)}")
    elif isinstance(shape, list):
        for number, item in enumerate(value):
            check_shape(item, shape[0], f"{label}[{number}]")
    elif isinstance(shape, dict) and str in shape:
        for name, item in value.items():
            check_shape(item, shape[str], f"{label}: {name[:80]}")
    elif isinstance(shape, dict):
        for key, inner in shape.items():
            name = key.removesuffix("?")
            if name in value:
                check_shape(value[name], inner, f"{label}: {name}")
            elif name == key:
                raise UserError(f"{label}: without {name}")


def _is_like(value: Any, shape: Any) -> bool:
    """Whether a value is of the kind of a shape, whatever is in it."""
    if shape is str:
        return isinstance(value, str)
    if shape is None or shape is ANY:
        return shape is ANY or value is None
    if shape is int or shape is float:
        number = isinstance(value, int) or (shape is float and isinstance(value, float) and math.isfinite(value))
        return number and not isinstance(value, bool) and abs(value) < 1e18
    return isinstance(value, shape if isinstance(shape, type) else type(shape))


def _named(shape: Any) -> str:
    names = {str: "text", bool: "true or false", int: "a whole number", float: "a finite number", None: "null"}
    return "a list" if isinstance(shape, list) else "an object" if isinstance(shape, dict) else names[shape]


def _check_depth(value: Any, label: str) -> None:
    level = [value]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for node in level:
            if isinstance(node, float):
                if not math.isfinite(node):
                    raise UserError(f"{label}: not a finite number")
            elif isinstance(node, dict):
                below += node.values()
            elif isinstance(node, list):
                below += node
        if not below:
            return
        level = below
    raise UserError(f"{label}: nested more than {DEEPEST} levels")
