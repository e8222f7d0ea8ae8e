"""Parts of a long pass, written down as they are computed, so that a pass that was killed goes on where it stood.

Each part is a value of its own and none is added to another, so that any rank may have computed it: each writes a file
of its own, and reads what all have written before. Knows nothing of what a part is. For sums there is `sums`.
"""

import json
import time
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any

from sdd.forward import ranks
from sdd.store import digest_of

EVERY = 5.0
"""Seconds after which parts are written down; a kill costs as many, and a batch."""


class Parts:
    """To be used in a `with` while parts are computed; they lie in the files `kept`.<rank>.parts, or without `kept` in
    none. `what` tells the pass apart from others, in JSON."""

    def __init__(self, kept: Path | None = None, what: Any = None) -> None:
        self.kept, self.of = kept, digest_of(what) if kept else ""
        self._waiting: list[Callable[[], Any]] = []
        self._written = time.monotonic()

    def __enter__(self) -> "Parts":
        return self

    def known(self) -> Iterator[Any]:
        """The parts of this pass that are there. A folder may have come from elsewhere: what is damaged is left out."""
        for path in _files(self.kept) if self.kept else ():
            if path.is_symlink() or not path.is_file():
                path.unlink()
                continue
            with path.open("rb") as file:
                for line in file:
                    seal, _, text = line.rstrip(b"\n").partition(b" ")
                    if seal == self._seal(text):
                        yield json.loads(text)

    def add(self, part: Callable[[], Any]) -> None:
        """What gives a part as JSON; it is asked when some are written down."""
        if self.kept:
            self._waiting.append(part)
            if time.monotonic() - self._written >= EVERY:
                self.write()

    def write(self) -> None:
        """Write down what is not yet."""
        if self.kept and self._waiting:
            texts = [json.dumps(part()).encode() for part in self._waiting]
            with self.kept.with_name(f"{self.kept.name}.{ranks.rank()}.parts").open("ab") as file:
                file.write(b"".join(b"\n%s %s" % (self._seal(text), text) for text in texts))  # the last may be cut
            self._waiting.clear()
        self._written = time.monotonic()

    def _seal(self, text: bytes) -> bytes:
        """What a part begins with; neither one of another pass nor a damaged one has it."""
        return blake2b(self.of.encode() + text, digest_size=16).hexdigest().encode()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None:
            self.write()


def forget(kept: Path) -> None:
    """Remove the files of passes whose results are elsewhere."""
    for path in _files(kept):
        path.unlink()


def _files(kept: Path) -> list[Path]:
    """Those of all ranks."""
    return [path for path in sorted(kept.parent.glob("*.parts")) if path.name.rsplit(".", 2)[0] == kept.name]
