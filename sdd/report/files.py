"""Files of a report: whole or absent, readable by whoever may enter their folder, and of any text at all."""

from pathlib import Path

from sdd.store.digests import write_atomically


def write(path: Path, text: str) -> None:
    """UTF-8; what cannot be encoded (half of a pair) is written as its escape."""
    write_atomically(path, text.encode("utf-8", "backslashreplace").decode())
    path.chmod(path.parent.stat().st_mode & 0o666)
