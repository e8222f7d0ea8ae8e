"""What a command takes beside its work: `--help`, a dry run of the paper's main table, cached jobs, and a sweep.

    python -m benchmarks overhead

A job's seconds in a sweep are what it adds: a sweep of many against one of a single job, so that imports and Hydra's
start are left out. `a sweep` makes cells (metrics and sizes of a cut of the embedded model, few calibration texts) by
one sweep and by a process each, as many side by side, in turns, in folders of their own: the artifacts are compared
byte by byte, their manifests but for times and for who asked first. A planned and a cached job are compared with the
same job run alone, and with the one that built. Seconds are the processor's, those of workers included, except where
the wall's are what counts; others on the machine lengthen the latter. What has no peer stands beside the seconds that
are asked: `--help` 1 s, the main table's 120 jobs 15 s, a cached job 0.3 s; the sweep 3 times as fast.
"""

import json
import os
import resource
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

from benchmarks.rows import Ratio, Setting

REPOSITORY = Path(__file__).resolve().parents[1]
METRICS = ("angular", "block_influence", "magnitude", "random", "last")
SIZES = (1, 2, 3, 4)
SMALL = ("calibration.num_texts=4", "calibration.max_length=64")
ASKED = ("seconds", "created", "command", "config", "digest")
"""What a manifest says of the time, and of the job that came first to an artifact of several; its digest too."""
GOALS = {"help": 1.0, "dry run": 15.0, "cached job": 0.3}
"""Seconds at most."""
WORKERS = 2


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


def asked(what: str, seconds: list[float], details: dict[str, Any]) -> Ratio:
    """Beside the seconds that are asked."""
    return Ratio(what, "the seconds asked", [GOALS[what]] * len(seconds), seconds, [], "yes", 1.0, details)


def plan_of(folder: Path) -> Any:
    return json.loads((folder / "result.json").read_text())["plan"]


def measure_help(turns: int) -> Ratio:
    runs = [ran(REPOSITORY, "train", "--help") for _ in range(turns)]
    return asked("help", [run.cpu for run in runs], {"wall": [run.wall for run in runs]})


def measure_dry_run(turns: int) -> Ratio:
    """The main table; the plan of its last job is that of the job alone."""
    last = ["pruning=n10", "dataset=openmathinstruct2", "finetune=self_distill", "model=mistral_7b_v0.3_instruct"]
    study, runs = ("experiment=paper/main_table", "dry_run=true"), []
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(turns):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            table = ran(folder, "evaluate", "-m", *study, "hydra.sweep.dir=table")
            alone = ran(folder, "evaluate", "-m", *last, *study, "hydra.sweep.dir=alone")
            jobs = len(list((folder / "table").glob("*/result.json")))
            if plan_of(folder / "table" / str(jobs - 1)) != plan_of(folder / "alone" / "0"):
                raise SystemExit("the last job's plan is another one than that of the job alone")
            runs.append((table, alone))
            print(f"overhead: dry run {number + 1} of {turns}: {table.cpu:.1f} s", file=sys.stderr, flush=True)
    added = [(table.cpu - alone.cpu) / (jobs - 1) for table, alone in runs]
    details = {"jobs": jobs, "added_by_a_job": added, "wall": [table.wall for table, _ in runs]}
    return asked("dry run", [table.cpu for table, _ in runs], details)


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


def separate(folder: Path, metrics: Sequence[str], sizes: Sequence[str]) -> Ran:
    """Every cell by a process of its own, so many side by side."""
    before, started = used(), time.perf_counter()
    with ThreadPoolExecutor(WORKERS) as pool:
        words = [swept([metric], [size]) for metric, size in product(metrics, sizes)]
        runs = list(pool.map(lambda one: ran(folder, "prune", *one), words))
    return Ran(time.perf_counter() - started, used() - before, "".join(run.stdout for run in runs))


def measure_sweep(turns: int) -> list[Ratio]:
    """What a cached job adds to a sweep, and a sweep against processes."""
    metrics, sizes = list(METRICS), [str(size) for size in SIZES]
    launcher = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={WORKERS}"]
    jobs, runs, added = len(metrics) * len(sizes), [], []
    with tempfile.TemporaryDirectory() as temporary:
        for turn in range(turns):
            together, apart = (Path(temporary) / f"{name}-{turn}" for name in ("together", "apart"))
            together.mkdir()
            apart.mkdir()
            before = separate(apart, metrics, sizes) if turn % 2 else None
            one = ran(together, "prune", "-m", *swept(metrics, sizes), *launcher)
            runs.append((one, before or separate(apart, metrics, sizes)))
            told = ", ".join(f"{what} {run.wall:.0f} s" for what, run in zip(("sweep", "apart"), runs[-1], strict=True))
            print(f"overhead: turn {turn + 1} of {turns}: {told}", file=sys.stderr, flush=True)
            if contents(together / "artifacts") != contents(apart / "artifacts"):
                raise SystemExit("the sweep's artifacts differ from those of separate processes")
            again = ran(together, "prune", "-m", *swept(metrics, sizes))
            single = ran(together, "prune", "-m", *swept(metrics[:1], sizes[:1]))
            if sorted(again.stdout.split()) != sorted(one.stdout.split()):
                raise SystemExit("cached jobs print other paths than those that built")
            added.append((again.cpu - single.cpu) / (jobs - 1))
    details = {"workers": WORKERS, "cpu": [[one.cpu, other.cpu] for one, other in runs]}
    seconds, own = [other.wall for _, other in runs], [one.wall for one, _ in runs]
    sweep = Ratio(f"a sweep of {jobs} cells", "as many processes", seconds, own, [], "yes", 3.0, details)
    return [asked("cached job", added, {"jobs": jobs}), sweep]


def rows(setting: Setting) -> list[Ratio]:
    return [measure_help(setting.turns), measure_dry_run(setting.turns), *measure_sweep(setting.turns)]
