"""An engine's answers in a file as they come, for engines that ask for each alone: what is there is not asked again."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sdd.rewriting.engines import Completion, Engine, Request
from sdd.untrusted import read_rows


class Journal:
    """The engine, and a file with a line an answer: {"id", "attempt", "text", "finish"}.

    A last line that a kill has cut is dropped, and its row asked again.
    """

    def __init__(self, engine: Engine, path: Path) -> None:
        self.engine, self.tries, self.path = engine, engine.tries, path

    def complete(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Completions in any order; the kept ones come first."""
        asked = {(request.id, request.attempt): request for request in requests}
        for one in self._kept():
            if asked.pop((one["id"], one["attempt"]), None) is not None:
                yield Completion(one["id"], one["text"], one["finish"])
        if not asked:
            return
        attempts = {request.id: request.attempt for request in asked.values()}
        with self.path.open("a", encoding="utf-8") as file:
            for completion in self.engine.complete(list(asked.values())):
                line = {"id": completion.id, "attempt": attempts[completion.id]}
                line |= {"text": completion.text, "finish": completion.finish}
                file.write(json.dumps(line) + "\n")
                file.flush()
                yield completion

    def _kept(self) -> Iterator[dict[str, Any]]:
        if self.path.exists():
            with self.path.open("r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
            yield from read_rows(self.path, f"{self.path}")
