"""What remains of artifacts when processes are killed, disks fill up, folders can only be read and bits flip.

    python -m benchmarks.faults [--kills 1000] [--seconds S] [--seed 0] [--folder DIR] [--out faults.json] [KIND ...]

Kinds are the stages, and `sweep`, `joblib`, `pair` (a sweep beside another on one folder, which goes on), `ranks` (two
processes that train together), `launched` (the same, each of which has imported its libraries anew). A trial takes what
a stage needs from a study on the embedded model that nothing disturbed, has the stage built, and kills that at a moment
drawn uniformly over the processor's time that it takes, by SIGKILL or SIGTERM; then again, up to `IN_A_ROW` times; or
at a step, then at the next one. Then it is let go on, now and then by the whole command that asks for the stage. In the
end everything must be there, byte for byte as in the undisturbed study (`timings.json` aside), and nothing else: no
torn artifact at any time, no row lost or doubled, no process and no lock that outlives the one that was killed. Only
that process gets the signal: what it started has to notice. Of ranks every other signal goes to one of them, which has
to end the command by one line. Then come a disk that is full at a drawn size, a folder that can only be read, a bit
flipped in a file or a manifest, a manifest cut short; what is damaged is found and deleted by `sdd store verify`, and
built again.

Steps are Python's calls that change what lies in the folder of artifacts: files opened for writing, renamed, removed,
folders made. A moment hardly ever falls between two of them that follow at once. Before one is done the stage's process
kills itself.

What is killed is forked from a process that has composed the command, up to where the store is asked, and builds the
stage alone: a kill costs what that takes, no imports and nothing downstream. Sweeps are killed as whole commands, and
so is what `launched` starts: imports are most of its time. A trial is a function of (seed, its number), but for what
else the machine does. Counts by kind, and by what was being built when the signal came, go to --out after every trial,
where a later call with the same arguments goes on, and as tables to stdout.
Exit code 1 where anything was not as it must be.
"""

import argparse
import contextlib
import ctypes
import fcntl
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver, util
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "system"))

import launching
from launching import LIBRARIES, Outcome, Running, artifacts_of, files_of, spawn
from tqdm import tqdm

from sdd.store import TIMINGS, Store
from sdd.store.__main__ import main as store_command
from sdd.store.digests import write_atomically
from sdd.store.store import MANIFEST

SMALL = [
    *("calibration.num_texts=8", "calibration.max_length=64", "dataset.num_rows=140", "engine.max_new_tokens=4"),
    *("engine.batch_size=32", "finetune.validation_rows=4", "finetune.num_rows=12", "finetune.batch_size=4"),
    *("finetune.epochs=2", "adapter.rank=2", "trainer.checkpoint_every=1", "trainer.threads=1"),
    *("evaluation.tasks=[arithmetic,fact_choice]", "evaluation.limit=3", "evaluation.max_new_tokens=4"),
    *("analysis.max_new_tokens=4", "analysis.repeats=1", "analysis.timed_prompts=1", "analysis.context=32"),
    *("analysis.prompt_tokens=16", "analysis.new_tokens=4", "analysis.batch_size=2"),
]
"""A second or so a stage of the embedded model; 140 rows are two chunks of rewrites."""
MERGED = ["merge=slerp", "merge.students=[[dataset=tiny_math],[dataset=tiny_instruct]]"]
SHIFT = ["analysis=shift", "analysis.embedder=null"]
ASKED_BY = {
    "scores": ["prune"],
    "pruned": ["prune"],
    "rewrites": ["generate"],
    "targets": ["generate"],
    "damaged": ["train", "finetune.choose=damage"],
    "taught": ["train", "finetune=logit_distill", "finetune.cached=top_k"],
    "tuned": ["train"],
    "merged": ["train", *MERGED],
    "evaluated": ["evaluate"],
    "answered": ["evaluate", *SHIFT],
    "surprisals": ["evaluate", *SHIFT],
    "drafted": ["evaluate", "analysis=speculative"],
    "shifted": ["evaluate", *SHIFT],
    "measured": ["evaluate", "analysis=cost"],
}
"""By stage, the command that asks for it."""
SIZES = ("n1", "n2")
SWEPT = ["train", "-m", f"pruning={','.join(SIZES)}", "finetune=sft"]
WORDS = {
    **ASKED_BY,
    "sweep": SWEPT,
    "pair": SWEPT,
    "joblib": [*SWEPT, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "launched": ["train", "trainer.devices=2"],
    "ranks": ["train", "trainer.devices=2"],
}
"""By kind, the command of its trials."""
STARTED_ANEW = util.spawnv_passfds
LIBRARIES += ["sdd.api", *(f"sdd.stages.{stage}" for stage in ASKED_BY)]
FROM_NOTHING = ("sweep", "pair", "joblib")
BUILDS = {stage: stage for stage in ASKED_BY} | {"launched": "tuned", "ranks": "tuned"}
"""By kind that begins with what a stage needs, the stage."""
BY_STEP = 0.5
"""Share of a stage's trials whose kills come at steps: at `IN_A_ROW` of them, one after another."""
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod")
"""What Python tells before it does it."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
FORKED = (*ASKED_BY, "ranks")
"""Kinds that a composed process forks itself for."""
OFTEN = dict.fromkeys(WORDS, 8) | {"pair": 4, "joblib": 1, "launched": 1}
"""How often a kind comes, relative to the others: processes that import the libraries anew take ten times as long."""
IN_A_ROW = 20
"""Kills of one command before it may end."""
WHOLE = 0.1
"""Share of a stage's trials that the whole command ends, with all that it builds downstream."""
PATIENCE = 600.0
"""Seconds for a process to end, and as many more a second that it has of a processor."""
HEEDED = 0.5
"""Seconds of the processor that a process may end its work in which a signal has come too late for."""
MOMENT = 60.0
"""Seconds that what a killed process started may take to notice, and as many more a second that it has of a processor.
"""
PROCESSORS = os.cpu_count() or 1
WORK = {"joblib": 20.0, "launched": 20.0}
"""Seconds of the processor that it may take, by kind: imports are not interrupted."""
LITTLE_WORK = 3.0
"""The same of what has nothing to import: it looks every second."""
launching.PATIENCE = 6 * PATIENCE


@contextlib.contextmanager
def adopting() -> Iterator[None]:
    """Within, processes whose parent dies become this one's children, so that none is out of sight."""
    libc = ctypes.CDLL(None)
    libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    try:
        yield
    finally:
        libc.prctl(36, 0, 0, 0, 0)


class Process(NamedTuple):
    """What the system says of one; `seconds` are the processor's, with those of the processes it has waited for."""

    name: str
    state: str
    parent: int
    group: int
    seconds: float


def processes() -> dict[int, Process]:
    """All of this machine, by number."""
    ticks, everyone = os.sysconf("SC_CLK_TCK"), {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = path.read_text().partition(" (")[2].rpartition(") ")
            state, *numbers = rest.split()
            parent, group, *_ = map(int, numbers[:2])
            everyone[int(path.parent.name)] = Process(name, state, parent, group, sum(map(int, numbers[10:14])) / ticks)
    return everyone


def processor(group: int) -> float:
    """Seconds that a group of processes has had; a busy machine makes a run longer, and a kill not earlier."""
    return sum(one.seconds for one in processes().values() if one.group == group)


def descendants(beside: Collection[int] = ()) -> dict[int, Process]:
    """The processes below this one, by number, without those `beside` and what is below them.

    Those that have ended are let go.
    """
    everyone = {}
    for pid, one in processes().items():
        if one.state == "Z" and one.parent == os.getpid():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        elif one.state not in "ZX" and pid not in beside:
            everyone[pid] = one
    own: dict[int, Process] = {}
    level = {os.getpid()}
    while level := {pid for pid, one in everyone.items() if one.parent in level}:
        own |= {pid: everyone[pid] for pid in level}
    return own


def ranks_of(launcher: int) -> list[int]:
    """The processes that a server of forks has begun for a command."""
    group = {pid: one for pid, one in processes().items() if one.group == launcher}
    return [pid for pid, one in group.items() if pid != launcher and one.parent != launcher and one.parent in group]


def watched(running: Running) -> tuple[Outcome, float]:
    """How a process ends, and the seconds of the processor that it and what it started were seen to take."""
    seconds = 0.0
    while running.process.exitcode is None:
        seconds = max(seconds, processor(running.process.pid))
        running.process.join(0.02)
    return running.outcome(), seconds


def doing(running: Running) -> str:
    """The stage that a process was building last; what else it was at."""
    stream = running.stream("stderr")
    begun = re.findall(r"building ([a-z]+/[0-9a-f]+)$", stream, re.M)
    unfinished = [name for name in begun if f"{name} built in" not in stream]
    return unfinished[-1].split("/")[0] if unfinished else "between" if begun else "starting"


def contents(root: Path) -> dict[str, str]:
    """Digests of the files of all complete artifacts, by stage/address/name, but for timings."""
    return {name: digest for name, digest in files_of(root).items() if Path(name).name != TIMINGS}


def ids_of(path: Path) -> list[str]:
    rows = map(json.loads, path.read_text().splitlines())
    return [str(row.get("id", row)) for row in rows]


def of_artifact(file: str) -> str:
    return "/".join(file.split("/")[:2])


@dataclass
class Forked:
    """A process that another one forked, which says by a pipe how it ended."""

    pid: int
    pipe: Any
    exitcode: int | None = None

    def join(self, seconds: float) -> None:
        if self.exitcode is None and self.pipe.poll(seconds):
            self.exitcode = self.pipe.recv()


class Composed:
    """A process that has composed a command to be run in a folder, and forks itself to build a stage of it there."""

    def __init__(self, words: Sequence[str], folder: Path, stage: str) -> None:
        server = multiprocessing.get_context("forkserver")
        folder.mkdir(parents=True, exist_ok=True)
        self.pipe, other = server.Pipe()
        self.folder, self.forks = folder, 0
        self.process = server.Process(target=_compose, args=(list(words), folder, stage, other))
        self.process.start()
        other.close()  # so that its end is noticed here
        self.wanted: set[str] = self.pipe.recv()

    def start(self, step: int | None = None) -> Running:
        """Begin the stage; with `step`, it is to kill itself before that step."""
        self.forks += 1
        name = f"fork{self.forks}"
        self.pipe.send((name, step))
        return Running(Forked(self.pipe.recv(), self.pipe), self.folder, name)

    def end(self) -> None:
        self.pipe.send(None)
        self.process.join()


def _compose(words: list[str], folder: Path, stage: str, pipe: Any) -> None:
    from sdd.api import compose
    from sdd.cli.app import USER, explained

    os.chdir(folder)
    script, *overrides = words
    job = compose(*overrides)
    wanted = job.wanted(script)
    assert wanted is not None
    recipes = list(wanted.walk())
    pipe.send({f"{recipe.stage}/{recipe.address}" for recipe in recipes})
    while request := pipe.recv():
        name, step = request
        if pid := os.fork():
            pipe.send(pid)
            pipe.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            continue
        code = 1
        try:
            os.chdir(folder)
            for number, stream in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(f"{name}.{stream}", os.O_WRONLY | os.O_CREAT), number)
            os.setpgid(0, 0)
            util.spawnv_passfds = _forked_server
            logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
            counted = count_steps(folder / "artifacts", step)
            for recipe in recipes:
                if recipe.stage == stage:
                    print(job.build(recipe, script), flush=True)
            Path(f"{name}.steps").write_text(str(next(counted)))
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except Exception as error:
            code, said = explained(error)
            print(f"error: {said}", file=sys.stderr, flush=True)
            if code != USER:
                traceback.print_exc()
        finally:
            os._exit(code)


def count_steps(folder: Path, last: int | None) -> "itertools.count[int]":
    """Counts this process's changes below a folder from now on, from 0, and kills it before the `last`."""
    counted, process = itertools.count(), os.getpid()

    def is_below(path: Any) -> bool:
        return isinstance(path, str | bytes | os.PathLike) and Path(os.fsdecode(path)).absolute().is_relative_to(folder)

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES or os.getpid() != process:
            return
        if event == "open":
            is_change = bool((arguments[2] or 0) & WRITING) and is_below(arguments[0])
        else:  # of a path in a folder that is open, too: how trees are removed
            is_change = any(map(is_below, arguments[:2])) or arguments[-1] not in (-1, None)
        if is_change and next(counted) == last:
            os.kill(process, signal.SIGKILL)

    sys.addaudithook(look)
    return counted


def _forked_server(path: str, words: list[str], kept: Sequence[int]) -> int:
    """In the place of multiprocessing's function that begins a server of forks: one that has its imports from here."""
    *_, flag, program = words
    if flag != "-c" or "forkserver" not in program:
        return STARTED_ANEW(path, words, kept)
    threads = list(Path("/proc/self/task").iterdir())
    assert len(threads) == 1, f"a fork of {len(threads)} threads has one"
    if pid := os.fork():
        return pid
    try:
        for number in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
            if number > 2 and number not in kept:
                with contextlib.suppress(OSError):  # that of the listing
                    os.close(number)
        exec(program, {})
    finally:
        os._exit(0)


@dataclass
class Trial:
    """One command in a folder of its own, and what became of its processes; `problems` are what must not be."""

    folder: Path
    words: Sequence[str]
    beside: set[int] = field(default_factory=set)
    work: float = LITTLE_WORK
    kills: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    started: int = 0
    whole: set[Path] = field(default_factory=set)

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"

    def start(self) -> Running:
        self.started += 1
        script, *words = self.words
        return spawn(script, *words, cwd=self.folder, name=f"process{self.started}")

    def kill(self, running: Running, after: float, number: signal.Signals, rank: int | None = None) -> bool:
        """Whether the process, or that of its ranks, was there to be killed after so many seconds of the processor."""
        pid = running.process.pid
        self.watch(running, after)
        if running.process.exitcode is not None:
            if running.process.exitcode != 0:
                self.problems.append(f"not killed, and ended: {running.stream('stderr')[-500:]}")
            return False
        hit = pid
        if rank is not None and (ranks := sorted(ranks_of(pid))):
            hit = ranks[rank % len(ranks)]
        with contextlib.suppress(ProcessLookupError):  # it has ended since it was looked at
            os.kill(hit, number)
        work = -processor(pid) + self.watch(running)
        what = doing(running) if hit == pid else "rank"
        when = f"{number.name} while {what}"
        if running.process.exitcode == 0:
            if not running.stream("stdout"):
                self.problems.append(f"{when}: exit code 0 and nothing printed")
            if work > HEEDED:
                self.problems.append(f"{when}: not heeded, {work:.1f} s more of work")
            return False
        if hit != pid:
            outcome = running.outcome()
            self.problems += [f"{when}: {wrong}" for wrong in one_line(outcome, "error: process ")]
        elif running.process.exitcode not in (-number, 128 + number):
            self.problems.append(f"{when}: exit code {running.process.exitcode}")
        self.kills[f"{what} {number.name}"] += 1
        self.check(when)
        return True

    def stopped(self, running: Running) -> bool:
        """Whether the process, which was to kill itself at a step, came to it."""
        self.watch(running)
        if running.process.exitcode == 0:
            return False
        when = f"SIGKILL at a step while {doing(running)}"
        if running.process.exitcode != -signal.SIGKILL:
            self.problems.append(f"{when}: exit code {running.process.exitcode}: {running.stream('stderr')[-500:]}")
        self.kills[f"{doing(running)} SIGKILL-step"] += 1
        self.check(when)
        return True

    def watch(self, running: Running, after: float = math.inf) -> float:
        """Wait for a process to end, or to have had so many seconds of the processor; those that it was seen to have.

        One that is stuck is a problem, and ended with what it has started.
        """
        began, before = time.monotonic(), processor(running.process.pid)
        seconds = before
        while running.process.exitcode is None:
            seconds = max(seconds, processor(running.process.pid))
            if seconds >= after:
                break
            if time.monotonic() - began > PATIENCE * (1 + seconds - before):
                self.problems.append(f"stuck while {doing(running)}: {running.stream('stderr')[-500:]}")
                running.kill()
            running.process.join(max(0.005, min(0.2, (after - seconds) / PROCESSORS)))
        return seconds

    def end(self, running: Running) -> Outcome:
        self.watch(running)
        return running.outcome()

    def check(self, when: str) -> None:
        """Nothing of what has ended is left running, and no artifact is torn."""
        began, before = time.monotonic(), descendants(self.beside)
        while left := descendants(self.beside):
            work = max(one.seconds - (before[pid].seconds if pid in before else 0) for pid, one in left.items())
            if work > self.work or time.monotonic() - began > MOMENT * (1 + work):
                self.problems += [f"{when}: a process {one.name} is left" for one in left.values()]
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.02)
        store = Store(self.artifacts)
        for folder in store.folders():
            if folder not in self.whole:
                self.problems += [f"{when}: {folder}: {wrong}" for wrong in store.verify(folder)]
                self.whole.add(folder)

    def compare(self, outcome: Outcome, reference: Path, wanted: set[str]) -> None:
        """All that is `wanted` must be there as it is in the reference, and nothing else."""
        if outcome.code != 0:
            self.problems.append(f"exit code {outcome.code}: {outcome.stderr[-500:]}")
            return
        self.whole.clear()
        self.check("at the end")
        made, whole = contents(self.artifacts), artifacts_of(self.artifacts)
        expected = {file: digest for file, digest in contents(reference).items() if of_artifact(file) in wanted}
        self.problems += [f"other bytes: {file}" for file, digest in expected.items() if made.get(file) != digest]
        self.problems += [f"unasked: {file}" for file in made.keys() - expected.keys()]
        here = [file for file in made.keys() & expected.keys() if (self.artifacts / file).is_file()]
        for file in sorted(file for file in here if file.endswith(".jsonl")):
            ids, right = ids_of(self.artifacts / file), ids_of(reference / file)
            if sorted(ids) != sorted(right):
                self.problems.append(f"{file}: {len(set(right) - set(ids))} rows lost, {len(ids)} of {len(right)}")
        partial = self.artifacts / ".partial"
        self.problems += [f"left: {path}" for path in partial.glob("*/*") if path.suffix != ".lock"]
        for path in self.artifacts.rglob("*"):
            name = path.relative_to(self.artifacts)
            is_note = name.parts[0] == ".digests" and not path.name.startswith(".")
            if path.is_file() and name.parts[0] != ".partial" and not is_note and of_artifact(str(name)) not in whole:
                self.problems.append(f"left: {path}")
        for path in partial.glob("*/*.lock"):
            with path.open("rb") as file:  # a folder that can only be read has its locks opened no other way
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self.problems.append(f"locked: {path}")


class Campaign:
    """Trials in folders below `folder`, each a function of (seed, kind, number); `more` are words of every command."""

    def __init__(self, folder: Path, seed: int, more: Sequence[str] = ()) -> None:
        self.folder, self.seed, self.more = folder, seed, more
        self.study = folder / "study" / "artifacts"
        self.kept: dict[str, tuple[Path, set[str], float]] = {}
        self.steps: dict[str, int] = {}
        self.composed: dict[str, Composed] = {}
        multiprocessing.set_forkserver_preload(LIBRARIES)
        forkserver.ensure_running()
        self.beside = set(descendants())

    def words(self, kind: str) -> list[str]:
        """The script, and what it is told."""
        script, *rest = WORDS[kind]
        flags = ["-m"] if rest[:1] == ["-m"] else []
        return [script, *flags, *SMALL, *self.more, *rest[len(flags) :]]

    def trial(self, kind: str, name: str) -> Trial:
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return Trial(self.folder / name, self.words(kind), self.beside, WORK.get(kind, LITTLE_WORK))

    def reference(self, kind: str) -> tuple[Path, set[str], float]:
        """Artifacts to compare with; which of them the kind's command asks for, inputs included; its seconds. A stage's
        steps are counted.

        The study grows by what the command makes of nothing. Then the stage is built of what it needs, and has the
        same bytes. Several ranks round sums otherwise, and are compared with the undisturbed of `launched`.
        """
        note = self.folder / f"{kind}.json"
        if kind not in self.kept and note.exists():
            place, names, seconds, self.steps[kind] = json.loads(note.read_text())
            self.kept[kind] = Path(place), set(names), seconds
        if kind in self.kept:
            return self.kept[kind]
        if kind == "ranks":
            place, wanted, _ = self.reference("launched")
        else:
            first = Trial(self.study.parent, self.words(BUILDS.get(kind, kind)), self.beside)
            outcome = first.start().outcome()
            assert outcome.code == 0, outcome.stderr
            place = self.study
        trial = self.trial(kind, kind if kind in FORKED else f"undisturbed-{kind}")
        if kind in FORKED:
            wanted = self.composing(kind, trial).wanted
        else:
            composed = [Composed(words, trial.folder, kind) for words in self.jobs(kind)]
            wanted = set[str]().union(*(one.wanted for one in composed))
            for one in composed:
                one.end()
        self.kept[kind] = place, wanted, 0.0
        expected = self.fill(kind, trial)
        running = self.composed[kind].start() if kind in FORKED else trial.start()
        outcome, seconds = watched(running)
        self.steps[kind] = int(running.stream("steps") or 0)
        if kind == "launched":
            place = trial.artifacts
        trial.compare(outcome, place, expected if kind in BUILDS else wanted)
        assert not trial.problems, trial.problems
        self.kept[kind] = place, wanted, seconds
        write_atomically(note, json.dumps([str(place), sorted(wanted), seconds, self.steps[kind]]))
        return self.kept[kind]

    def jobs(self, kind: str) -> list[list[str]]:
        """The command, or those of a sweep's jobs."""
        words = self.words(kind)
        if kind not in FROM_NOTHING:
            return [words]
        rest = [word for word in words[2:] if not word.startswith(("pruning=", "hydra"))]
        return [[words[0], *rest, f"pruning={size}"] for size in SIZES]

    def composing(self, kind: str, trial: Trial) -> Composed:
        """The process that builds the stage in all trials of a kind."""
        if kind not in self.composed:
            self.composed[kind] = Composed(trial.words, trial.folder, BUILDS[kind])
            self.beside.add(self.composed[kind].process.pid)
        return self.composed[kind]

    def fill(self, kind: str, trial: Trial) -> set[str]:
        """Give a trial all that its command needs but the stage, and what is made of it; a sweep begins at nothing.

        Returns what is there once the stage is built.
        """
        reference, wanted, _ = self.kept[kind]
        first = BUILDS.get(kind)
        gone = self.with_downstream(kind, {name for name in wanted if name.split("/")[0] == first or first is None})
        trial.folder.mkdir(parents=True, exist_ok=True)
        for name in wanted - gone:
            shutil.copytree(reference / name, trial.artifacts / name)
        return wanted - gone | {name for name in wanted if name.split("/")[0] == first}

    def with_downstream(self, kind: str, names: set[str]) -> set[str]:
        """Artifacts of a kind's command, and those of it that are made from them."""
        reference, wanted, _ = self.kept[kind]
        inputs = {name: set(manifest["inputs"].values()) for name, manifest in artifacts_of(reference).items()}
        while more := {name for name in wanted - names if inputs[name] & {one.split("/")[1] for one in names}}:
            names = names | more
        return names

    def run(self, kind: str, number: int) -> Trial:
        """A command killed several times, and then let go on."""
        reference, wanted, seconds = self.reference(kind)
        draw = random.Random(f"{self.seed} {kind} {number}")
        trial = self.trial(kind, kind)
        expected = self.fill(kind, trial)
        trial.whole |= set(Store(trial.artifacts).folders())
        composed = self.composing(kind, trial) if kind in FORKED else None
        other = trial.start() if kind == "pair" else None
        trial.beside = self.beside | ({other.process.pid} if other else set())
        span = seconds / 2 if kind == "pair" else seconds  # the other does its part
        by_step = kind in ASKED_BY and draw.random() < BY_STEP
        if composed and by_step:
            first = draw.randrange(0, self.steps[kind], IN_A_ROW)
            all(trial.stopped(composed.start(step)) for step in range(first, first + IN_A_ROW))
        for _ in range(0 if by_step else draw.randint(1, IN_A_ROW)):
            after, sent = draw.uniform(0, span), draw.choice([signal.SIGKILL, signal.SIGTERM])
            if kind in FROM_NOTHING:  # what is built stays
                span = max(span - after, seconds / IN_A_ROW)
            rank = draw.randrange(2) if kind in ("launched", "ranks") and draw.random() < 0.5 else None
            if not trial.kill(composed.start() if composed else trial.start(), after, sent, rank):
                break
        if other and trial.end(other).code != 0:
            trial.problems.append(f"beside killed ones: {other.stream('stderr')[-500:]}")
        trial.beside = self.beside
        if composed and draw.random() >= WHOLE:
            trial.compare(trial.end(composed.start()), reference, expected)
        else:
            trial.compare(trial.end(trial.start()), reference, wanted)
        if trial.problems:
            kept = self.folder / f"{kind}-{number}"
            shutil.rmtree(kept, ignore_errors=True)
            trial.folder.rename(kept)
        return trial

    def close(self) -> None:
        for one in self.composed.values():
            one.end()


# ---- disks and bits -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Callable[[str], None]]:
    """A file system in memory at a folder, and a function that mounts it anew with other options."""
    folder.mkdir(parents=True)

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, capture_output=True)

    mount(f"size={kilobytes}k")
    try:
        yield lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def one_line(outcome: Outcome, begins: str) -> list[str]:
    """What is wrong with the end of a command that the user has to mend something for."""
    if (outcome.code, len(outcome.errors), outcome.stdout) == (2, 1, "") and outcome.errors[0].startswith(begins):
        return []
    return [f"exit code {outcome.code}, {outcome.stdout!r}, {outcome.stderr[-500:]}"]


def full_disk(campaign: Campaign, number: int) -> Trial:
    """A disk that is full somewhere on the way to an evaluation, and then has room again."""
    reference, wanted, _ = campaign.reference("evaluated")
    whole = sum(path.stat().st_size for name in wanted for path in (reference / name).rglob("*"))
    trial = campaign.trial("evaluated", f"full-{number}")
    size = random.Random(f"{campaign.seed} full {number}").randrange(64, whole // 1024)
    with small_disk(trial.artifacts, size) as remount:
        running = trial.start()
        trial.problems += one_line(running.outcome(), "error: the disk is full")
        trial.kills[f"{doing(running)} full"] += 1
        remount(f"size={4 * whole // 1024}k")
        trial.compare(trial.start().outcome(), reference, wanted)
    return trial


def read_only(campaign: Campaign, number: int) -> Trial:
    """A folder that only can be read: what is there is used, what is not is one line."""
    kind = list(ASKED_BY)[number % len(ASKED_BY)]
    reference, wanted, _ = campaign.reference(kind)
    trial = campaign.trial(kind, f"read-only-{number}")
    with small_disk(trial.artifacts, 1 << 20) as remount:
        campaign.fill(kind, trial)
        remount("ro")
        trial.problems += one_line(trial.start().outcome(), "error: paths.artifacts=")
        trial.kills[f"{kind} read-only"] += 1
        remount("rw")
        trial.compare(trial.start().outcome(), reference, wanted)
        remount("ro")
        trial.compare(trial.start().outcome(), reference, wanted)
    return trial


def verified(artifacts: Path, *words: str) -> tuple[int, set[str], set[str]]:
    """The exit code of `sdd.store verify`, what it says is damaged, and what made from that."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = store_command(["--artifacts", str(artifacts), "--json", "verify", *words])
    answer = json.loads(said.getvalue())
    return code, set(answer["damaged"]), set(answer["made_from_damaged"])


def damage(campaign: Campaign, number: int) -> Trial:
    """A bit flipped in a file or a manifest, or that cut short: found, deleted with what is made of it, built again."""
    kind = list(ASKED_BY)[number % len(ASKED_BY)]
    reference, wanted, _ = campaign.reference(kind)
    draw = random.Random(f"{campaign.seed} damage {number}")
    trial = campaign.trial(kind, f"damage-{number}")
    for name in wanted:
        shutil.copytree(reference / name, trial.artifacts / name)
    hit = draw.choice(sorted(name for name in wanted if name.startswith(f"{kind}/")))
    manifest = trial.artifacts / hit / MANIFEST
    if (what := draw.choice(["cut", "file", "manifest"])) == "cut":
        manifest.write_bytes(manifest.read_bytes()[: draw.randrange(manifest.stat().st_size - 1)])
    else:
        files = sorted(json.loads(manifest.read_text())["files"]) if what == "file" else [MANIFEST]
        path = trial.artifacts / hit / draw.choice(files)
        data = bytearray(path.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
    gone = campaign.with_downstream(kind, {hit})
    answers = [verified(trial.artifacts, *words) for words in ((), ("--delete",), ())]
    if answers != [(1, {hit}, gone - {hit}), (0, {hit}, gone - {hit}), (0, set(), set())]:
        trial.problems.append(f"{hit} is damaged, {gone - {hit}} made from it, said to be: {answers}")
    outcome = trial.start().outcome()
    trial.compare(outcome, reference, wanted)
    if sorted(outcome.built) != sorted(gone):
        trial.problems.append(f"{gone} were to be built again, built were {outcome.built}")
    trial.kills[f"{kind} {what}"] += 1
    return trial


OTHERS = {"full": full_disk, "read-only": read_only, "damage": damage}
"""Trials that kill nothing."""


def table(head: str, counts: Counter[tuple[str, str]]) -> str:
    """How often what was done, by (row, what)."""
    rows = sorted({row for row, _ in counts}, key=lambda row: ([*OFTEN, row].index(row), row))
    columns = sorted({what for _, what in counts}, key=lambda what: (not what.startswith("SIG"), what))
    lines = [f"| {head} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {row} | {' | '.join(str(counts[row, what]) for what in columns)} |" for row in rows]
    totals = [sum(count for (_, what), count in counts.items() if what == one) for one in columns]
    return "\n".join([*lines, f"| all | {' | '.join(map(str, totals))} |", ""])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join([*OFTEN, *OTHERS])}; default: all")
    parser.add_argument("--kills", type=int, default=1000, help="signals at least")
    parser.add_argument("--others", type=int, default=36, help="trials of each kind that kills nothing")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no trial begins later")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where trials lie; those with problems stay there")
    parser.add_argument("--out", type=Path, default=Path("faults.json"))
    given = parser.parse_args(arguments)
    kinds = given.kinds or [*OFTEN, *OTHERS]
    if unknown := [kind for kind in kinds if kind not in (*OFTEN, *OTHERS)]:
        parser.error(f"{unknown[0]} is no kind; choose from {', '.join([*OFTEN, *OTHERS])}")
    killing = [kind for kind in kinds if kind in OFTEN]
    deadline = time.monotonic() + given.seconds
    record: dict[str, Any] = {"seed": given.seed, "trials": {}}
    if given.out.exists() and (found := json.loads(given.out.read_text()))["seed"] == given.seed:
        record = found
    trials = record["trials"]
    folder = given.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    print(f"seed {given.seed}, trials in {folder}", file=sys.stderr)

    def sent() -> int:
        return sum(count for one in trials.values() for key, count in one["kills"].items() if "SIG" in key)

    def keep(name: str, trial: Trial) -> None:
        trials[name] = {"kills": dict(trial.kills), "problems": trial.problems}
        write_atomically(given.out, json.dumps(record, indent=1) + "\n")
        for problem in trial.problems:
            tqdm.write(f"{name}: {problem}", file=sys.stderr)

    with adopting(), contextlib.closing(Campaign(folder, given.seed)) as campaign:
        with tqdm(total=given.kills if killing else 0, initial=sent(), desc="kills") as progress:
            number = 0
            while killing and sent() < given.kills and time.monotonic() < deadline:
                (kind,) = random.Random(f"{given.seed} {number}").choices(killing, [OFTEN[one] for one in killing])
                if (name := f"{kind}-{number}") not in trials:
                    keep(name, campaign.run(kind, number))
                    progress.update(sent() - progress.n)
                number += 1
        names = [(kind, number) for kind in kinds if kind in OTHERS for number in range(given.others)]
        for kind, number in tqdm(names, desc="others", disable=not names):
            if (name := f"{kind}-{number}") not in trials and time.monotonic() < deadline:
                keep(name, OTHERS[kind](campaign, number))
    by_kind, by_stage = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for name, one in trials.items():
        for key, count in one["kills"].items():
            stage, what = key.split()
            by_kind[name.rpartition("-")[0], what] += count
            by_stage[stage, what] += count
    print(table("kind", by_kind), table("while", by_stage), sep="\n")
    problems = [f"{name}: {problem}" for name, one in trials.items() for problem in one["problems"]]
    print("\n".join([*problems, f"{len(trials)} trials, {sent()} signals, {len(problems)} problems"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
