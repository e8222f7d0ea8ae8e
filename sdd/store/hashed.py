"""Large files whose sha256 is taken while they are written, so that nothing reads them again to know it."""

import hashlib
from io import BufferedReader
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any

from sdd.store.digests import file_digest

CHUNK = 2 << 20
"""Bytes that are read, hashed and written at a time."""
HELD = 3
"""So many chunks are held: one that fills, one or two that are still hashed."""

_taken: dict[tuple[int, ...], str] = {}


class HashedFile:
    """A new file to be written from front to back; a thread beside hashes what has been written.

    Use it in a `with`: at its end the file is whole, and `taken_digest` knows its sha256.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> "HashedFile":
        self.file = self.path.open("wb", buffering=0)
        self._sha256 = hashlib.sha256()
        self._full: SimpleQueue[tuple[memoryview, int] | None] = SimpleQueue()
        self._empty: SimpleQueue[memoryview] = SimpleQueue()
        for _ in range(HELD - 1):
            self._empty.put(memoryview(bytearray(CHUNK)))
        self._chunk, self._filled = memoryview(bytearray(CHUNK)), 0
        self._thread = Thread(target=self._hash, daemon=True)
        self._thread.start()
        return self

    def _hash(self) -> None:
        while (full := self._full.get()) is not None:
            chunk, filled = full
            self._sha256.update(chunk[:filled])
            self._empty.put(chunk)

    def write(self, data: Any) -> None:
        """Append bytes, or anything that lets its bytes be seen."""
        view = memoryview(data)
        left = view.cast("B") if view.nbytes else view[:0]
        while left.nbytes:
            size = min(len(left), CHUNK - self._filled)
            self._chunk[self._filled : self._filled + size] = left[:size]
            self._fill(size)
            left = left[size:]

    def copy(self, source: BufferedReader, length: int) -> None:
        """Append the next `length` bytes of an open file, which has to have them."""
        while length:
            size = source.readinto(self._chunk[self._filled : self._filled + length])
            assert size, "the file ended early after its header was checked"
            self._fill(size)
            length -= size

    def _fill(self, size: int) -> None:
        self._filled += size
        if self._filled == CHUNK:
            self.flush()

    def flush(self) -> None:
        """Hand what has gathered to the system, and to the thread."""
        self._full.put((self._chunk, self._filled))
        left = self._chunk[: self._filled]
        while left:
            left = left[self.file.write(left) :]
        self._chunk, self._filled = self._empty.get(), 0

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self._full.put(None)
            self._thread.join()
            self.file.close()
        if kind is None:
            _taken[_state(self.path)] = self._sha256.hexdigest()


def _state(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def taken_digest(path: Path) -> str:
    """sha256 of a file: the one that was taken as this process wrote it, if nothing has changed it since."""
    return _taken.pop(_state(path), None) or file_digest(path)
