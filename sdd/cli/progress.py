"""One line about a whole sweep every so often, in place of the bars of all its jobs.

A job of a sweep writes its bars into `progress.log` in its own folder. The process that launched the sweep reads the
ends of those files, and the records of the jobs that are through: it does not matter which process runs a job.
"""

import contextlib
import io
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from sdd.errors import UserError
from sdd.untrusted import printable, read_json

FILE = "progress.log"
TAIL = 2_000
"""Bytes at the end of a job's file in which its last bar is, or the stage that it builds."""
ON_TERMINAL, ELSEWHERE = 10.0, 60.0
"""Seconds between two lines."""
MOST = 8
"""Running jobs that a line names."""
LARGEST = 4 << 20
"""Bytes of a job's record."""


class _Switch(io.TextIOBase):
    """A stderr that outlives the file it leads to: libraries that are imported meanwhile keep it for good."""

    target: TextIO

    def write(self, text: str) -> int:
        return self.target.write(text)

    def flush(self) -> None:
        self.target.flush()


_switch = _Switch()


@contextlib.contextmanager
def bars_into(folder: Path) -> Iterator[None]:
    """What is written to stderr meanwhile, the console's log records apart, goes into the job's folder."""
    before = sys.stderr
    with (folder / FILE).open("a", encoding="utf-8", buffering=1) as file:
        _switch.target = file
        try:
            with contextlib.redirect_stderr(_switch):
                yield
        finally:
            _switch.target = before


def number_of_jobs(config: Any) -> int | None:
    """How many jobs the words of a sweep come to; None where another sweeper than Hydra's own decides."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    sweeper = config.hydra.sweeper
    if not str(sweeper.get("_target_")).endswith(".BasicSweeper"):
        return None
    words = [f"{name}={value}" for name, value in (sweeper.params or {}).items()]
    try:
        overrides = OverridesParser.create().parse_overrides([*words, *config.hydra.overrides.task])
        (jobs,) = BasicSweeper.split_arguments(overrides, None)
    except HydraException:
        return None
    return len(jobs)


def _end_of(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        return file.read().decode("utf-8", "replace")


def last_bar(path: Path) -> str:
    """'tune: 45% 29/64 [00:10<00:12, 2.8step/s]': the last line of a file, the drawn part of its bar left out."""
    parts = re.split(r"(?:[\r\n]|\x1b\[[0-9;]*[A-Za-z])+", _end_of(path))
    lines = [line.strip() for line in parts if line.strip()]
    return printable(" ".join(re.sub(r"\|[^|]*\|", " ", lines[-1]).split())) if lines else "begun"


def stage_of(folder: Path) -> str:
    """What a job builds, by the last such line of its log."""
    for path in folder.glob("*.log"):
        if path.name != FILE and (stages := re.findall(r" building ([a-z]+)/", _end_of(path))):
            return f"{stages[-1]}, "
    return ""


class Progress:
    """The jobs of a sweep in `folder`, as far as they are newer than it; `jobs` is how many there will be."""

    def __init__(self, folder: Path, jobs: int | None) -> None:
        self.folder, self.jobs = folder, jobs
        self.earlier = {path: path.stat().st_mtime_ns for path in self._files()}
        self._stop = threading.Event()
        self._line = ""

    def __getstate__(self) -> dict[str, Any]:
        """Launchers pickle callbacks for their workers, in which nobody watches."""
        return {name: value for name, value in self.__dict__.items() if name != "_stop"}

    def _files(self) -> list[Path]:
        return [path for name in ("result.json", FILE) for path in self.folder.rglob(name)]

    def line(self) -> str:
        """'3 of 12 jobs done, 1 of them failed; running: #3 tuned, tune: 45% 29/64 [...]; #4 begun'."""
        fresh = [path for path in self._files() if path.stat().st_mtime_ns != self.earlier.get(path)]
        through = {path.parent for path in fresh if path.name == "result.json"}
        failed = sum(_has_failed(folder / "result.json") for folder in through)
        running = sorted((p for p in fresh if p.name == FILE and p.parent not in through), key=_order)
        text = f"{len(through)}{'' if self.jobs is None else f' of {self.jobs}'} jobs done"
        text += f", {failed} of them failed" if failed else ""
        named = [f"#{p.parent.relative_to(self.folder)} {stage_of(p.parent)}{last_bar(p)}" for p in running[:MOST]]
        named += [f"and {len(running) - MOST} more"] if len(running) > MOST else []
        return text + (f"; running: {'; '.join(named)}" if named else "")

    def show(self, stream: TextIO) -> None:
        """Write the line unless it is as before."""
        try:
            line = self.line()
        except OSError:  # a file went away meanwhile
            return
        if line != self._line:
            self._line = line
            print(f"[sweep] {line}", file=stream, flush=True)

    def start(self) -> None:
        """Show it every so often, until `stop`, on what is now stderr."""
        stream = sys.stderr
        pause = ON_TERMINAL if stream.isatty() else ELSEWHERE

        def watch() -> None:
            while not self._stop.wait(pause):
                self.show(stream)

        threading.Thread(target=watch, name="progress", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()


def _order(path: Path) -> tuple[int, str]:
    return len(str(path)), str(path)


def _has_failed(path: Path) -> bool:
    try:
        return "error" in read_json(path, f"{path}", LARGEST)
    except UserError:
        return True
