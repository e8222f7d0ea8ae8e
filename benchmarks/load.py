"""How much goes through: jobs of one sweep, rows of one dataset, artifacts of one report.

    python -m benchmarks.load [jobs] [rows] [report] [--jobs 200] [--rows 1000000] [--artifacts 1000] [--out load.json]

`jobs`: a sweep by joblib of cuts of the embedded model, then the same again, when all is there. `rows`: a dataset of a
million short rows, rewritten by an engine that says what it was shown (its answers go through the journal), chosen,
once with noise, and made the training input of a student; their likelihoods, of which the bookkeeping is looked at and
none is computed; then as many rows without duplicates. Each is a process of its own, whose peak is told. Texts repeat
(but where duplicates are looked for), so that rendering them as chats, whose time is not looked at here, is remembered;
every row is held as if they did not. `report`: over artifacts of arms and seeds whose answers are copies of one
student's. Seconds are the processor's. A table goes to stdout, the numbers to --out; exit code 1 where a bound is
missed.
"""

import argparse
import contextlib
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, count
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from benchmarks.faults import adopting, descendants
from benchmarks.peak import own_peak

REPOSITORY = Path(__file__).resolve().parents[1]
BOUNDS = {"cached job": 0.3, "growth": 0.05, "report": 20.0}
BOUNDS |= dict.fromkeys(("rewrites", "targets", "noise", "training input", "surprisals", "damaged", "deduplicate"), 1.0)
"""Seconds, share of the parent's memory after a quarter of the jobs, GiB, seconds."""
SIZES = 4
ARMS = 12
"""Two ways of fine-tuning at six rates; the artifacts are seeds of these."""
TEXTS = 5
EVALUATED = [
    *("calibration.num_texts=8", "calibration.max_length=64", "dataset.num_rows=140", "engine.max_new_tokens=4"),
    *("finetune.validation_rows=4", "finetune.num_rows=12", "finetune.epochs=1", "adapter.rank=1"),
    *("evaluation.limit=20", "evaluation.max_new_tokens=4", "trainer.threads=1"),
]


def result(what: str, measured: float, unit: str, **facts: Any) -> dict[str, Any]:
    bound = BOUNDS[what]
    return {"what": what, "measured": measured, "unit": unit, "bound": bound, "good": measured <= bound, **facts}


def command(folder: Path, *words: str) -> "subprocess.Popen[str]":
    temporary = folder / "temporary"
    temporary.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=(folder / "stderr").open("w"),
        text=True,
    )


# ---- jobs ---------------------------------------------------------------------------------------------------------


def watched(folder: Path, words: Sequence[str], jobs: int) -> tuple[float, list[tuple[int, float, int]]]:
    """Processor seconds of a sweep, and (jobs done, MiB, handles of the parent) as it went; it must leave nothing."""
    shared = set(Path("/dev/shm").iterdir())
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    seen: list[tuple[int, float, int]] = []
    process = command(folder, "-m", "sdd", "prune", *words)
    family = {process.pid}
    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError, psutil.Error):
            family |= {one.pid for one in psutil.Process(process.pid).children(recursive=True)}
            status = Path(f"/proc/{process.pid}/status").read_text()
            memory = int(status.split("VmRSS:")[1].split()[0]) / 1024
            done = len(list((folder / "sweep").glob("*/result.json")))
            seen.append((done, memory, len(list(Path(f"/proc/{process.pid}/fd").iterdir()))))
        time.sleep(0.5)
    assert process.stdout is not None
    assert process.returncode == 0, (folder / "stderr").read_text()[-2000:]
    assert len(process.stdout.read().splitlines()) == jobs
    deadline = time.monotonic() + 15
    while (left := descendants()) and time.monotonic() < deadline:
        time.sleep(0.1)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    for what, found in {
        "processes": list(left.values()),
        "temporary files": [path for path in (folder / "temporary").iterdir() if not is_torchs(path)],
        "shared memory": [path for path in set(Path("/dev/shm").iterdir()) - shared if is_of(path, family)],
        "partial artifacts": [p for p in (folder / "artifacts" / ".partial").glob("*/*") if p.suffix != ".lock"],
    }.items():
        assert not found, f"left by the sweep: {what}: {found}"
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, seen


def is_of(path: Path, family: set[int]) -> bool:
    """Whether one of these processes made it, by the numbers in its name; other programs of this machine do too."""
    return any(int(number) in family for number in re.findall(r"\d+", path.name))


def is_torchs(path: Path) -> bool:
    """The one folder of a user's that torch makes where it is imported, for kernels; nothing here compiles any."""
    return path.name.startswith("torchinductor_") and not any(path.iterdir())


def measure_jobs(folder: Path, jobs: int) -> list[dict[str, Any]]:
    seeds = jobs // SIZES
    few = ("calibration.num_texts=4", "calibration.max_length=64", "hydra.sweep.dir=sweep")
    words = ["-m", *few, "metric=random", f"metric.seed=range({seeds})", "pruning.size=1,2,3,4"]
    words += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "trainer.threads=1"]
    _, seen = watched(folder, words, jobs)
    logs = [path.read_text() for path in (folder / "sweep").glob("*/*.log")]
    built = Counter(line.split("building ")[1] for log in logs for line in log.splitlines() if "building " in line)
    wanted = seeds + jobs
    assert len(built) == wanted, f"{len(built)} artifacts built, {wanted} asked for"
    assert set(built.values()) == {1}, f"built twice: {[name for name, count in built.items() if count > 1]}"
    quarter = [(memory, handles) for done, memory, handles in seen if jobs / 4 <= done < jobs / 2]
    last = [(memory, handles) for done, memory, handles in seen if done >= 3 * jobs / 4]
    growth = max(memory for memory, _ in last) / max(memory for memory, _ in quarter) - 1
    handles = max(handles for _, handles in last) - max(handles for _, handles in quarter)
    assert handles <= 2, f"{handles} more handles are open at the end than after a quarter"
    shutil.rmtree(folder / "sweep")
    many, _ = watched(folder, words, jobs)
    shutil.rmtree(folder / "sweep")
    one, _ = watched(folder, [*words[:4], "metric=random", "metric.seed=0", "pruning.size=1", *words[-3:]], 1)
    facts = {"jobs": jobs, "artifacts": wanted, "MiB": round(max(memory for memory, _ in last)), "handles": handles}
    return [
        result("growth", growth, "of all", **facts),
        result("cached job", (many - one) / (jobs - 1), "s", jobs=jobs),
    ]


# ---- rows ---------------------------------------------------------------------------------------------------------


class Echo:
    """An engine that says the end of what it was shown."""

    kind, asks_alone, tries = "echo", True, 1

    def __init__(self, **settings: Any) -> None: ...

    def open(self, *given: Any) -> None: ...

    def complete(self, requests: Sequence[Any]) -> Iterator[Any]:
        from sdd.rewriting.engines import Completion

        return (Completion(request.id, request.prompt[-150:].strip(), "stop") for request in requests)


def write_rows(path: Path, rows: int) -> None:
    """120 and 150 characters of task and answer, as word problems have them."""
    with path.open("w") as file:
        for number in range(rows):
            kind = number % TEXTS
            prompt = (
                f"{kind} children have {kind + 3} clips each and give away half of them, how many are left? ".ljust(
                    120, "."
                )
            )
            reference = (
                f"They have {kind * (kind + 3)} clips, and then half of them. ".ljust(140, ".") + f"\n#### {kind}"
            )
            file.write(json.dumps({"id": f"row-{number}", "prompt": prompt, "reference": reference}) + "\n")


def recipe_of_rewrites(path: Path) -> Any:
    from sdd.data.local import LocalRows
    from sdd.models.chats import REWRITE_TEMPLATE
    from sdd.store import Recipe

    dataset = {"_target_": "sdd.data.local.LocalRows", **LocalRows(str(path)).spec()}
    spec = {"teacher": "teacher's", "dtype": "float32", "dataset": dataset, "template": REWRITE_TEMPLATE}
    return Recipe("rewrites", 1, spec | {"system_prompt": None, "engine": {"kind": "echo"}})


def rewrite(folder: Path) -> None:
    from sdd.stages import rewrites
    from sdd.stages.runtime import Runtime

    recipe = recipe_of_rewrites(folder / "rows.jsonl")
    rewrites._engine = lambda kind: Echo  # type: ignore[assignment, return-value]
    sources = {recipe.spec["dataset"]["digest"]: folder / "rows.jsonl", "teacher's": REPOSITORY / "sdd/tiny/teacher"}
    (folder / "rewrites").mkdir()
    rewrites.build(Runtime(sources=sources), recipe, {}, folder / "rewrites")


def choose(folder: Path, **noise: float) -> None:
    from sdd.models.chats import LEAK_PHRASES
    from sdd.stages import targets
    from sdd.stages.runtime import Runtime
    from sdd.store import Recipe

    upstream = recipe_of_rewrites(folder / "rows.jsonl")
    how = {"rule": "gsm8k", "leak_phrases": list(LEAK_PHRASES), "select": True, "gold_share": 0.0, **noise}
    recipe = Recipe("targets", 1, {"mode": "self_distill", **how}, {"rewrites": upstream})
    runtime = Runtime(sources={upstream.spec["dataset"]["digest"]: folder / "rows.jsonl"})
    made = folder / ("noise" if noise else "targets")
    made.mkdir()
    targets.build(runtime, recipe, {"rewrites": folder / "rewrites"}, made)


def unlikely(
    model: Any, rows: Sequence[Any], batch_size: int, of_row: Callable[[list[float]], float], kept: Path
) -> list[float]:
    """A nat a token, in place of a pass; rows are kept as those of a pass are."""
    import torch

    from sdd.forward import teacher_forcing

    def states(model: Any, rows: Sequence[Any], batch_size: int, known: frozenset[int]) -> Iterator[Any]:
        return ((index, torch.ones(len(row[1]))) for index, row in enumerate(rows) if index not in known)

    teacher_forcing.answer_states = states  # type: ignore[assignment]
    teacher_forcing.checkpoints.head_logits = lambda model, states: states  # type: ignore[assignment]
    return teacher_forcing.per_token(lambda _, logits: logits, rows, batch_size, model, of_row=of_row, kept=kept)


def look_at(stage: str, folder: Path) -> None:
    """Likelihoods of all targets as `sdd.stages.surprisals` and `damaged` hold them; the model is there, and idle."""
    from sdd.analysis import shift
    from sdd.stages import damaged, surprisals
    from sdd.stages.runtime import Runtime
    from sdd.store import Recipe

    numbers = count()
    shift.token_nll = unlikely
    surprisals.task_text = lambda prompt, before: f"{next(numbers)} {prompt}"  # no two tasks are the same
    (folder / stage).mkdir()
    teacher = REPOSITORY / "sdd/tiny/teacher"
    runtime, spec = Runtime(sources={"teacher's": teacher}), {"dtype": "float32", "system_prompt": None}
    inputs = {"targets": folder / "targets", "surprisals": folder / "surprisals", "pruned": teacher}
    if stage == "surprisals":
        recipe = Recipe(stage, 1, spec | {"model": "teacher's", "max_length": 256})
        surprisals.build(runtime, recipe, inputs, folder / stage)
    else:
        damaged.build(runtime, Recipe(stage, 1, spec), inputs, folder / stage)


def take_in(folder: Path) -> None:
    """The training input as `sdd.stages.tuned.build` makes it."""
    from sdd.models.checkpoints import Checkpoint
    from sdd.stages import draws
    from sdd.stages.tuned import tokenized
    from sdd.store.files import Lines

    tokenizer = Checkpoint(REPOSITORY / "sdd/tiny/teacher").tokenizer()
    rows = Lines(folder / "targets" / "train.jsonl")
    drawn, _ = draws.drawn({"validation_rows": 100, "num_rows": None}, 0, rows, None, {})
    training, _ = tokenized(tokenizer, drawn, None, 256)
    ids = [row["id"] for row in drawn]
    assert len(training) == len(ids) == len(rows) - 100
    print(sum(len(row.ids) for row in training) / len(training))


def deduplicate(folder: Path) -> None:
    """Rows of words drawn as a language has them, every tenth of which says again what the one before it says."""
    from sdd.data.draws import split_rows
    from sdd.stages import draws
    from sdd.store.files import Lines

    with (folder / "rows.jsonl").open() as file:
        number = sum(1 for _ in file)
    draw = random.Random(0)
    words = [f"w{n}" for n in range(20_000)]
    often = list(accumulate(1 / (n + 1) for n in range(len(words))))
    with (folder / "words.jsonl").open("w") as file:
        for index in range(number):
            if index % 10 != 9:
                said = draw.choices(words, cum_weights=often, k=50)
            row = {"id": f"row-{index}", "prompt": " ".join(said[:20]), "reference": " ".join(said[20:])}
            file.write(json.dumps(row) + "\n")
    rows = Lines(folder / "words.jsonl")
    pool, held_out = split_rows(range(len(rows)), 100, None, 0)
    left = draws._deduplicated(rows, pool, held_out, {"deduplicate": 0.7, "num_rows": None})
    assert len({place - (place % 10 == 9) for place in left}) == len(left)
    assert abs(len(left) - 0.9 * number) <= 100


PHASES: Mapping[str, Callable[[Path], None]] = {
    "rewrites": rewrite,
    "targets": choose,
    "noise": partial(choose, noise_share=0.1),
    "training input": take_in,
    "surprisals": partial(look_at, "surprisals"),
    "damaged": partial(look_at, "damaged"),
    "deduplicate": deduplicate,
}
WRITTEN = {
    "rewrites": "rewrites/rewrites.jsonl",
    "targets": "targets/train.jsonl",
    "noise": "noise/train.jsonl",
    "surprisals": "surprisals/rows.jsonl",
    "damaged": "damaged/rows.jsonl",
}
"""By phase, its file with a line for every row."""


def measure_rows(folder: Path, rows: int) -> Iterator[dict[str, Any]]:
    write_rows(folder / "rows.jsonl", rows)
    for phase in PHASES:
        words = ["-m", "benchmarks.load", "--phase", phase, "--folder", str(folder)]
        process = command(folder, *words)
        out = process.communicate()[0]
        assert process.returncode == 0, (folder / "stderr").read_text()[-2000:]
        told = json.loads(out.splitlines()[-1])
        if phase in WRITTEN:
            with (folder / WRITTEN[phase]).open() as file:
                ids = [json.loads(line)["id"] for line in file]
            assert ids == [f"row-{number}" for number in range(rows)], f"{WRITTEN[phase]}: rows lost, doubled or moved"
        yield result(phase, told["gib"], "GiB", rows=rows, before=told["before"], seconds=told["seconds"])


def phase(name: str, folder: Path) -> None:
    """One step in this process: its peak in GiB, that of its imports alone, and its seconds."""
    from sdd.models import checkpoints  # noqa: F401
    from sdd.stages import rewrites, targets, tuned  # noqa: F401

    before, started = own_peak(), time.process_time()
    PHASES[name](folder)
    gib, seconds = 1 << 30, time.process_time() - started
    print(json.dumps({"gib": own_peak() / gib, "before": before / gib, "seconds": seconds}))


# ---- artifacts ----------------------------------------------------------------------------------------------------


def multiplied(root: Path, number: int) -> None:
    """So many evaluated artifacts more, as if of other arms and seeds; their answers are copies of one student's."""
    from sdd.stages.__main__ import recipe_of
    from sdd.store import Recipe, Store

    store = Store(root)
    (manifest,) = (one for one in store.manifests() if one["stage"] == "tuned")
    tuned = recipe_of(store, manifest)
    (manifest,) = (one for one in store.manifests() if tuned.address in one["inputs"].values())
    evaluated = recipe_of(store, manifest)
    originals = {one.stage: store.folder(one) for one in evaluated.walk()}

    def copied(recipe: Recipe, inputs: Any, folder: Path) -> None:
        shutil.copytree(originals[recipe.stage], folder, dirs_exist_ok=True)
        (folder / "manifest.json").unlink()

    def like(one: Recipe, inputs: dict[str, Recipe], **spec: Any) -> Recipe:
        return Recipe(one.stage, one.version, one.spec | spec, one.inputs | inputs, one.labels)

    for made in range(number):
        seed, arm = divmod(made, ARMS)
        targets = like(tuned.inputs["targets"], {}, mode=("sft", "gold")[arm % 2])
        finetune = tuned.spec["finetune"] | {"learning_rate": 1e-4 * (1 + arm // 2)}
        student = like(tuned, {"targets": targets}, finetune=finetune, seed=1000 + seed)
        store.ensure(like(evaluated, {"model": student}), copied)


def measure_report(folder: Path, artifacts: int) -> list[dict[str, Any]]:
    for more in (["-m", "pruning=none,n1", "finetune=none"], ["-m", "pruning=n1", "finetune=sft"]):
        process = command(folder, "-m", "sdd", "evaluate", *more, *EVALUATED)
        process.communicate()
        assert process.returncode == 0, (folder / "stderr").read_text()[-2000:]
    root = folder / "artifacts"
    multiplied(root, artifacts - len(list((root / "evaluated").iterdir())))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = command(folder, "-m", "sdd.report", str(root), "--out", str(folder / "report"))
    process.communicate()
    assert process.returncode == 0, (folder / "stderr").read_text()[-2000:]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    rows = sum(path.read_bytes().count(b"\n") for path in (root / "evaluated").glob("*/samples/*.jsonl"))
    return [result("report", seconds, "s", artifacts=artifacts, arms=ARMS + 2, answers=rows)]


MEASURED = {
    "jobs": lambda folder, given: measure_jobs(folder, given.jobs),
    "rows": lambda folder, given: measure_rows(folder, given.rows),
    "report": lambda folder, given: measure_report(folder, given.artifacts),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(MEASURED)}; default: all")
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--artifacts", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="where what is made stays")
    parser.add_argument("--out", type=Path, help="write the numbers into this JSON file")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.phase:
        phase(given.phase, given.folder)
        return 0
    if unknown := [part for part in given.parts if part not in MEASURED]:
        parser.error(f"{unknown[0]} is no part; choose from {', '.join(MEASURED)}")
    found = []
    print("| what | measured | at most | beside it |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="load-") as temporary, adopting():
        for part in given.parts or MEASURED:
            folder = (given.folder or Path(temporary)) / part
            folder.mkdir(parents=True)
            for one in MEASURED[part](folder, given):
                beside = ", ".join(f"{key} {one[key]:.4g}" for key in list(one)[5:])
                missed = "" if one["good"] else ": NOT so"
                measured, bound = f"{one['measured']:.3g} {one['unit']}", f"{one['bound']:g}{missed}"
                print(f"| {one['what']} | {measured} | {bound} | {beside} |", flush=True)
                found.append(one)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(one["good"] for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
