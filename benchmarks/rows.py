"""What a benchmark says: how many times as fast as something else, whether the results are equal, what the limit is."""

import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ratio:
    """One comparison. `ratios` are those of the interleaved pairs, seconds of the peer over seconds here.

    `limit` is the ratio that a physical limit would have (bare passes, a plain copy); `parity` says in words how equal
    the results are, and is empty where they are not: then no ratio is told.
    """

    what: str
    peer: str
    seconds: float
    own_seconds: float
    ratios: list[float]
    parity: str
    goal: float | None = None
    limit: float | None = None

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def good(self) -> bool:
        return bool(self.parity) and (self.goal is None or self.ratio >= self.goal)


def paired(
    peer: Callable[[], Any], own: Callable[[], Any], pairs: int, clock: Callable[[], float]
) -> tuple[list[tuple[float, float]], Any, Any]:
    """Seconds of both ways in turns, the second first in every other pair; and what each came to the last time."""
    runs, results = [], [None, None]
    for number in range(pairs):
        taken = [0.0, 0.0]
        for place in (0, 1) if number % 2 else (1, 0):
            started = clock()
            results[place] = (peer, own)[place]()
            taken[place] = clock() - started
        runs.append((taken[0], taken[1]))
    return runs, results[0], results[1]


def ratio(what: str, peer: str, runs: list[tuple[float, float]], parity: str, **more: Any) -> Ratio:
    seconds, own = (statistics.median(run[place] for run in runs) for place in (0, 1))
    return Ratio(what, peer, seconds, own, [a / b for a, b in runs], parity, **more)


def table(rows: Sequence[Ratio]) -> str:
    """In Markdown; what differs has no ratio."""
    lines = ["| what | against | s | here, s | times as fast (range) | asked | at most | equal |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        spread = f"**{row.ratio:.2f}** ({min(row.ratios):.2f} to {max(row.ratios):.2f})" if row.parity else "-"
        asked, most = (f"{value:g}" if value else "" for value in (row.goal, row.limit and round(row.limit, 2)))
        lines.append(
            f"| {row.what} | {row.peer} | {row.seconds:.2f} | {row.own_seconds:.2f} | {spread} | {asked} | {most} | "
            f"{row.parity or 'NO'} |"
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    import torch

    found = {"machine": platform.machine(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2)}
    capability = torch.backends.cpu.get_cpu_capability()
    return {**found, "instructions": capability, "torch": torch.__version__, "python": platform.python_version()}


def write(rows: Sequence[Ratio], folder: Path) -> None:
    """`benchmarks.json` and `benchmarks.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {**machine(), "rows": [{**asdict(row), "ratio": row.ratio} for row in rows]}
    (folder / "benchmarks.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "benchmarks.md").write_text(table(rows) + "\n")
