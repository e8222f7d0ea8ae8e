"""What the compiled tokenizers library panics over, as one line.

Its code prints lines of its own to the process's stderr before the panic reaches Python, and no setting turns that off.
"""

import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sdd.errors import UserError
from sdd.untrusted import printable

_STDERR = 2
_lock = threading.RLock()
_open = 0


def is_panic(error: BaseException) -> bool:
    """Whether the compiled library gave up, as its regular expressions do after ten million steps at one place."""
    return type(error).__name__ == "PanicException"


@contextmanager
def panics_told(what: str = "the tokenizer gives up on a text") -> Iterator[None]:
    """A panic inside is a UserError of one line, and what the library wrote about it is dropped.

    Whatever else is written to stderr meanwhile comes out afterwards. One thread at a time; may be nested.
    """
    global _open
    with _lock:
        _open += 1
        written = _Stderr() if _open == 1 else None
        panicked = False
        try:
            yield
        except BaseException as error:
            panicked = is_panic(error)
            if not panicked:
                raise
            reason = (str(error).splitlines() or ["panic"])[0]
            raise UserError(f"{what} ({printable(reason)[:200]}); use another tokenizer.json") from None
        finally:
            _open -= 1
            if written is not None:
                written.restore(drop=panicked)


class _Stderr:
    """The process's stderr, held back in a file; a process without one has nothing to hold back."""

    def __init__(self) -> None:
        self.was: int | None = None
        _flush()
        try:
            was = os.dup(_STDERR)
        except OSError:
            return
        try:
            self.held = _temporary()
        except OSError:  # no more files may be open: nothing is held back
            os.close(was)
            return
        os.dup2(self.held, _STDERR)
        self.was = was

    def restore(self, drop: bool) -> None:
        if self.was is None:
            return
        _flush()
        os.dup2(self.was, _STDERR)
        os.close(self.was)
        size = os.lseek(self.held, 0, os.SEEK_END)
        if size and not drop:
            os.write(_STDERR, os.pread(self.held, size, 0))
        os.close(self.held)


def _flush() -> None:
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.flush()


def _temporary() -> int:
    """An open file without a name: in memory where the system has that, which takes a twentieth of the time."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("stderr")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
