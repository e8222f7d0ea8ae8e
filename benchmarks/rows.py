"""What a benchmark says: how many times as fast as something else, whether the results are equal, what the limit is."""

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Setting:
    """Where benchmarks run, "cpu" or "cuda", in so many turns; and what some of them need: a folder with rows of public
    tasks, as `evaluation.data_dir` is, the python of an environment with TRL, a writer of stories such as stories260K
    (a checkpoint) and stories (JSON objects with a `text`, one a line)."""

    device: str = "cpu"
    turns: int = 5
    data: Path | None = None
    trl: Path | None = None
    stories: tuple[Path, Path] | None = None


@dataclass(frozen=True)
class Ratio:
    """One comparison: seconds of the peer, of this project and of a physical limit (bare passes, a plain copy), turn by
    turn.

    `parity` says in words how equal the results are, and is empty where they are not: then no ratio is told. `details`
    are for the record alone.
    """

    what: str
    peer: str
    seconds: list[float]
    own_seconds: list[float]
    limit_seconds: list[float]
    parity: str
    goal: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.seconds, self.own_seconds, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def limit(self) -> float | None:
        """The ratio that the limit has, taken in the same turns."""
        if not self.limit_seconds:
            return None
        return statistics.median(a / b for a, b in zip(self.seconds, self.limit_seconds, strict=True))


def table(rows: Sequence[Ratio]) -> str:
    """In Markdown; what differs has no ratio."""
    lines = ["| what | against | s | here, s | times as fast (range) | asked | at most | equal |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        spread = f"**{row.ratio:.2f}** ({min(row.ratios):.2f} to {max(row.ratios):.2f})" if row.parity else "-"
        asked, most = (f"{value:g}" if value else "" for value in (row.goal, row.limit and round(row.limit, 2)))
        peer, own = statistics.median(row.seconds), statistics.median(row.own_seconds)
        lines.append(
            f"| {row.what} | {row.peer} | {peer:.2f} | {own:.2f} | {spread} | {asked} | {most} | {row.parity or 'NO'} |"
        )
    return "\n".join(lines)


def machine(device: str) -> dict[str, Any]:
    """What the numbers were taken on."""
    import torch

    found = {"machine": platform.machine(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2)}
    found["instructions"] = torch.backends.cpu.get_cpu_capability()
    if device != "cpu":
        found["gpu"] = torch.cuda.get_device_name()
    return {**found, "device": device, "torch": torch.__version__, "python": platform.python_version()}


def write(rows: Sequence[Ratio], folder: Path, device: str) -> None:
    """`benchmarks.json` and `benchmarks.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {**machine(device), "rows": [{**asdict(row), "ratio": row.ratio, "limit": row.limit} for row in rows]}
    (folder / "benchmarks.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "benchmarks.md").write_text(table(rows) + "\n")
