"""What a command takes beside its work: `--help`, a dry run of the paper's main table, cached jobs, and a sweep.

    python benchmarks/overhead.py [--quick] [--cells 20] [--pairs 3] [--workers 2] [--out overhead.json]

A job's seconds in a sweep are what it adds: a sweep of many against one of a single job, so that imports and Hydra's
start are left out. `sweep` makes cells (metrics and sizes of a cut of the embedded model, few calibration texts) by one
sweep and by a process each, as many side by side, in turns, in folders of their own: the artifacts are compared byte by
byte, their manifests but for times and for who asked first. A planned and a cached job are compared with the same job
run alone, and with the one that built. Seconds are the processor's, those of workers included, except where the wall's
are what counts; others on the machine lengthen the latter. Rows of `run` go to --out, a table to stdout.
Expected: `--help` 1.5 s, the main table's 120 jobs 15 s, a cached job 0.3 s, the sweep 3 times as fast.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rows import Ratio, ratio

REPOSITORY = Path(__file__).resolve().parents[1]
METRICS = ("angular", "block_influence", "magnitude", "random", "last")
SIZES = (1, 2, 3, 4)
SMALL = ("calibration.num_texts=4", "calibration.max_length=64")
ASKED = ("seconds", "created", "command", "config", "digest")
"""What a manifest says of the time, and of the job that came first to an artifact of several; its digest too."""
GOALS = {"help": 1.5, "dry run": 15.0, "cached job": 0.3, "sweep": 3.0}
"""Seconds at most, and times as fast at least."""


@dataclass(frozen=True)
class Ran:
    """A command that ended well: seconds on the wall and of the processor, and what it printed."""

    wall: float
    cpu: float
    stdout: str


def used() -> float:
    """Processor seconds of all children that have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def ran(folder: Path, script: str, *words: str) -> Ran:
    """One of the scripts in a folder; it must end well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(REPOSITORY / f"{script}.py"), *words]
    before, started = used(), time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return Ran(time.perf_counter() - started, used() - before, done.stdout)


def row(what: str, measured: float, unit: str, **facts: Any) -> dict[str, Any]:
    goal = GOALS[what]
    good = measured >= goal if unit == "times" else measured <= goal
    named = {"benchmark": "overhead", "what": what, "measured": measured, "unit": unit, "goal": goal, "good": good}
    return named | facts


def plan_of(folder: Path) -> Any:
    return json.loads((folder / "result.json").read_text())["plan"]


def measure_help(pairs: int) -> dict[str, Any]:
    runs = [ran(REPOSITORY, "train", "--help") for _ in range(pairs)]
    return row("help", statistics.median(run.cpu for run in runs), "s", wall=statistics.median(r.wall for r in runs))


def measure_dry_run(pairs: int, quick: bool) -> dict[str, Any]:
    """The main table, or four of its jobs; the plan of its last job is that of the job alone."""
    fewer = ["model=llama3.1_8b_instruct", "pruning=n2,n10", "dataset=openmathinstruct2", "finetune=sft,self_distill"]
    last = ["pruning=n10", "dataset=openmathinstruct2", "finetune=self_distill"]
    last.append("model=llama3.1_8b_instruct" if quick else "model=mistral_7b_v0.3_instruct")
    study, runs = ("experiment=paper/main_table", "dry_run=true"), []
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(pairs):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            table = ran(folder, "evaluate", "-m", *(fewer if quick else []), *study, "hydra.sweep.dir=table")
            alone = ran(folder, "evaluate", "-m", *last, *study, "hydra.sweep.dir=alone")
            jobs = len(list((folder / "table").glob("*/result.json")))
            if plan_of(folder / "table" / str(jobs - 1)) != plan_of(folder / "alone" / "0"):
                raise SystemExit("the last job's plan is another one than that of the job alone")
            runs.append((table, alone))
            print(f"overhead: dry run {number + 1} of {pairs}: {table.cpu:.1f} s", file=sys.stderr, flush=True)
    added = statistics.median((table.cpu - alone.cpu) / (jobs - 1) for table, alone in runs)
    cpu, wall = (statistics.median(getattr(table, which) for table, _ in runs) for which in ("cpu", "wall"))
    return row("dry run", cpu, "s", jobs=jobs, added_by_a_job=added, wall=wall, same=True)


def cells(number: int) -> tuple[list[str], list[str]]:
    """Metrics and sizes of so many cells, all combined."""
    metrics = METRICS[: -(-number // len(SIZES))]
    return list(metrics), [str(size) for size in SIZES[: -(-number // len(metrics))]]


def swept(metrics: Sequence[str], sizes: Sequence[str]) -> list[str]:
    return [f"metric={','.join(metrics)}", f"pruning.size={','.join(sizes)}", *SMALL]


def contents(artifacts: Path) -> dict[str, Any]:
    """Every file by its path; manifests without `ASKED`."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in artifacts.rglob("*") if path.is_file()):
        name = str(path.relative_to(artifacts))
        if name.startswith("."):
            continue
        found[name] = path.read_bytes()
        if path.name == "manifest.json":
            found[name] = {key: value for key, value in json.loads(found[name]).items() if key not in ASKED}
    return found


def separate(folder: Path, metrics: Sequence[str], sizes: Sequence[str], workers: int) -> Ran:
    """Every cell by a process of its own, so many side by side."""
    before, started = used(), time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        words = [swept([metric], [size]) for metric, size in product(metrics, sizes)]
        runs = list(pool.map(lambda one: ran(folder, "prune", *one), words))
    return Ran(time.perf_counter() - started, used() - before, "".join(run.stdout for run in runs))


def measure_sweep(number: int, pairs: int, workers: int) -> list[dict[str, Any]]:
    """What a cached job adds to a sweep, and a sweep against processes."""
    metrics, sizes = cells(number)
    launcher = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={workers}"] if workers > 1 else []
    jobs, runs, added = len(metrics) * len(sizes), [], []
    with tempfile.TemporaryDirectory() as temporary:
        for pair in range(pairs):
            together, apart = (Path(temporary) / f"{name}-{pair}" for name in ("together", "apart"))
            together.mkdir()
            apart.mkdir()
            before = separate(apart, metrics, sizes, workers) if pair % 2 else None
            one = ran(together, "prune", "-m", *swept(metrics, sizes), *launcher)
            runs.append((one, before or separate(apart, metrics, sizes, workers)))
            told = ", ".join(f"{what} {run.wall:.0f} s" for what, run in zip(("sweep", "apart"), runs[-1], strict=True))
            print(f"overhead: pair {pair + 1} of {pairs}: {told}", file=sys.stderr, flush=True)
            if contents(together / "artifacts") != contents(apart / "artifacts"):
                raise SystemExit("the sweep's artifacts differ from those of separate processes")
            again = ran(together, "prune", "-m", *swept(metrics, sizes))
            single = ran(together, "prune", "-m", *swept(metrics[:1], sizes[:1]))
            if sorted(again.stdout.split()) != sorted(one.stdout.split()):
                raise SystemExit("cached jobs print other paths than those that built")
            added.append((again.cpu - single.cpu) / (jobs - 1))
    ratios = [other.wall / one.wall for one, other in runs]
    facts: dict[str, Any] = {"jobs": jobs, "workers": workers, "ratios": ratios}
    for place, name in enumerate(("together", "apart")):
        for which in ("wall", "cpu"):
            facts[f"{name}_{which}"] = statistics.median(getattr(run[place], which) for run in runs)
    sweep = row("sweep", statistics.median(ratios), "times", **facts, same=True)
    return [row("cached job", statistics.median(added), "s", jobs=jobs, same=True), sweep]


def run(quick: bool = False, number: int = 20, pairs: int = 3, workers: int = 2) -> list[dict[str, Any]]:
    """A row for each of `GOALS`: what was measured, its unit, what is expected, and whether it is as expected.

    `quick` plans four jobs, sweeps four cells and does each once: what is expected of more is then not told.
    """
    number, pairs = (4, 1) if quick else (number, pairs)
    return [measure_help(pairs), measure_dry_run(pairs, quick), *measure_sweep(number, pairs, workers)]


def rows(pairs: int = 3) -> list[Ratio]:
    """For the table of all benchmarks: seconds are compared with those that are asked."""
    found = []
    for one in run(pairs=pairs):
        if one["unit"] == "times":
            runs = [(one["apart_wall"], one["apart_wall"] / each) for each in one["ratios"]]
            what, peer, goal = f"a sweep of {one['jobs']} cells", "as many processes", one["goal"]
        else:
            what, peer, goal, runs = one["what"], "the seconds asked", 1.0, [(one["goal"], one["measured"])]
        found.append(ratio(what, peer, runs, "yes", goal=goal))
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| what | measured | expected | beside it |", "|---|---|---|---|"]
    shown = ("benchmark", "what", "measured", "unit", "goal", "good")
    for one in rows:
        most = "at least" if one["unit"] == "times" else "at most"
        facts = {key: _short(value) for key, value in one.items() if key not in shown}
        beside = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items())
        line = f"| {one['what']} | {one['measured']:.2f} {one['unit']} | {most} {one['goal']:g} | {beside} |"
        lines.append(line if one["good"] else line.replace(f"{one['goal']:g} |", f"{one['goal']:g}: NOT so |"))
    return "\n".join(lines)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"{min(value):.2f} to {max(value):.2f}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few jobs, once each")
    parser.add_argument("--cells", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="jobs side by side")
    parser.add_argument("--out", type=Path, help="write the rows into this JSON file")
    given = parser.parse_args(arguments)
    rows = run(given.quick, given.cells, given.pairs, given.workers)
    if given.out:
        given.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    return 0 if all(one["good"] for one in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
