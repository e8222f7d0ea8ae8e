"""Multiruns: each distinct artifact once, one line a job, a failing job stops no other, and the exit code says so."""

import importlib.util
import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from launching import PATIENCE, REPOSITORY, artifacts_of, run, spawn, subprocess_run
from omegaconf import DictConfig, OmegaConf

from sdd.stages import pruned
from sdd.store.store import log
from sdd.study import Study


def records_of(folder: Path) -> dict[int, dict]:
    return {int(path.parent.name): json.loads(path.read_text()) for path in folder.glob("*/result.json")}


def state_of(root: Path) -> dict[str, tuple]:
    """Everything that a rebuild would change: the moment of making and the modification times."""
    return {
        name: (manifest["created"], sorted((p.name, p.stat().st_mtime_ns) for p in (root / name).rglob("*")))
        for name, manifest in artifacts_of(root).items()
    }


@pytest.mark.slow
def test_each_distinct_artifact_once(small: list[str], tmp_path: Path) -> None:
    words = ["-m", *small, "hydra.sweep.dir=sweep", "pruning=n1,n2", "finetune=none,sft"]
    outcome = run("evaluate", *words, cwd=tmp_path)
    assert outcome.code == 0, outcome.stderr
    assert len(outcome.built) == len(set(outcome.built))
    counts = Counter(name.split("/")[0] for name in outcome.built)
    assert counts == {"scores": 1, "pruned": 2, "targets": 1, "tuned": 2, "evaluated": 4}
    assert len(set(outcome.lines)) == len(outcome.lines) == 4
    assert all(Path(line).is_dir() and Path(line).parent.name == "evaluated" for line in outcome.lines)
    records = records_of(tmp_path / "sweep")
    assert [records[n]["path"] for n in range(4)] == outcome.lines
    bars = (tmp_path / "sweep" / "1" / "progress.log").read_text()
    assert "tune:" in bars and "tune:" not in outcome.stderr
    assert [f"#{n} average " in outcome.stderr for n in range(4)] == [True] * 4
    assert (tmp_path / "sweep" / "report" / "table.json").is_file()

    before = state_of(tmp_path / "artifacts")
    without = [*words, "hydra.sweep.dir=other", "hydra.callbacks.sweep_end.report=false"]
    again = run("evaluate", *without, cwd=tmp_path)
    assert again.built == [] and not (tmp_path / "other" / "report").exists()
    assert again.stdout == outcome.stdout
    assert state_of(tmp_path / "artifacts") == before


def test_jobs_side_by_side_see_a_gpu_each(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By names of GPUs that nobody has: each job has chosen one when it asks whether there is any, and ends."""
    names = [f"GPU-{uuid.uuid4()}" for _ in range(2)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(names))
    folders = [tmp_path / "one", tmp_path / "other"]
    words = ["-m", *small, "trainer=gpu", "hydra.sweep.dir=sweep"]
    jobs = [spawn("prune", *words, cwd=folder, hold="gpu") for folder in folders]
    for job in jobs:
        job.until_holding("gpu")
    for folder in folders:
        (folder / "go").touch()
    for job in jobs:
        outcome = job.outcome()
        assert (outcome.code, outcome.built) == (2, []), outcome.stderr
        assert outcome.errors[0] == "error: trainer.accelerator=gpu, but no GPU is visible here; choose trainer=cpu"
    assert sorted((folder / "holding-gpu").read_text() for folder in folders) == sorted(names)


def test_a_job_that_would_wait_builds_for_another_one(
    small: list[str], composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    """Another sweep, whose part the test plays, holds the scores of the first jobs until the others have theirs."""
    scores = pruned.recipe(Study(composed("pruning.size=1"), tmp_path)).inputs["scores"]
    stage = tmp_path / "artifacts" / ".partial" / "scores"
    stage.mkdir(parents=True)
    lock = FileLock(stage / f"{scores.address}.lock", thread_local=False)
    lock.acquire()

    def other_sweep() -> None:
        deadline = time.monotonic() + PATIENCE
        while len(list((tmp_path / "artifacts").glob("pruned/*/manifest.json"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        lock.release()

    thread = threading.Thread(target=other_sweep)
    thread.start()
    words = ["-m", *small, "hydra.sweep.dir=sweep", "metric=angular,random", "pruning.size=1,2,9"]
    outcome = run("prune", *words, cwd=tmp_path)
    thread.join()
    assert (outcome.code, len(outcome.lines)) == (2, 4), outcome.stderr
    assert len(outcome.built) == len(set(outcome.built)) == 6
    order = [name.split("/")[0] for name in outcome.built]
    assert order == ["scores", "pruned", "pruned", "scores", "pruned", "pruned"]
    assert outcome.built[3] == f"scores/{scores.address}"
    records = records_of(tmp_path / "sweep")
    assert [records[n].get("path") for n in (0, 1, 3, 4)] == outcome.lines
    asked = [artifacts_of(tmp_path / "artifacts")["/".join(Path(line).parts[-2:])]["command"] for line in outcome.lines]
    assert ["metric=random" in command for command in asked] == [False, False, True, True]


def test_where_missing_raises_a_job_that_waits_builds_what_was_asked_for_and_no_input(
    small: list[str], composed: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scores by angle are there, and another process, whose part the test plays, holds the first cut."""
    assert run("prune", *small, "pruning.size=3", cwd=tmp_path).code == 0
    there = artifacts_of(tmp_path / "artifacts")
    first, second = (pruned.recipe(Study(composed(f"pruning.size={size}"), tmp_path)) for size in (1, 2))
    stage = tmp_path / "artifacts" / ".partial" / "pruned"
    stage.mkdir(parents=True, exist_ok=True)
    lock = FileLock(stage / f"{first.address}.lock")
    lock.acquire()
    info, made = log.info, []

    def told(message: str, *given: object) -> None:
        info(message, *given)
        if "is being built by another process" in message:
            made.extend(artifacts_of(tmp_path / "artifacts").keys() - there.keys())
            lock.release()

    monkeypatch.setattr(log, "info", told)
    words = ["-m", *small, "hydra.sweep.dir=sweep", "pruning.size=1,2", "metric=angular,random"]
    outcome = run("prune", *words, "store.missing=raise", cwd=tmp_path)
    assert made == [f"pruned/{second.address}"], outcome.stderr
    assert outcome.built == [f"pruned/{second.address}", f"pruned/{first.address}"]
    assert (outcome.code, len(outcome.lines)) == (2, 2)
    assert outcome.stderr.count("is missing and store.missing=raise") >= 2


def test_failing_job_stops_no_other(small: list[str], tmp_path: Path) -> None:
    words = ["-m", *small, "hydra.sweep.dir=sweep", "metric=last", "pruning.size=1,4,9,2,1"]
    outcome = run("prune", *words, cwd=tmp_path)
    assert outcome.code == 2
    assert len(outcome.lines) == 3
    assert outcome.lines[0] == outcome.lines[2] != outcome.lines[1]
    assert len(outcome.built) == 3
    records = records_of(tmp_path / "sweep")
    assert ["error" in records[n] for n in range(5)] == [False, True, True, False, False]
    assert [records[n].get("code") for n in (1, 2)] == [2, 2]
    end = outcome.stderr[outcome.stderr.index("2 of 5 jobs failed") :]
    assert "#1 " in end and "pruning.size=4 removes all 4 blocks" in end
    assert "#2 " in end and "pruning.size=9 is more than the 4 blocks" in end


def test_earlier_sweep_in_the_same_folder_is_left_out(small: list[str], tmp_path: Path) -> None:
    """Jobs with folders of their own choosing, in a folder where another sweep failed before."""
    words = ["-m", *small, "hydra.sweep.dir=sweep", "hydra.sweep.subdir=size/${pruning.size}", "metric=last"]
    first = run("prune", *words, "pruning.size=1,4,5", cwd=tmp_path)
    assert first.code == 2
    assert "2 of 3 jobs failed" in first.stderr
    second = run("prune", *words, "pruning.size=2,1", cwd=tmp_path)
    assert second.code == 0
    assert "jobs failed" not in second.stderr
    third = run("prune", *words, "pruning.size=4,1", cwd=tmp_path)
    assert third.code == 2
    assert "1 of 2 jobs failed" in third.stderr


def test_failure_that_is_not_the_users_makes_it_1(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    original = pruned.recipe

    def sometimes(study: Study) -> object:
        if study.config.pruning.size == 2:
            raise RuntimeError("something broke")
        return original(study)

    monkeypatch.setattr(pruned, "recipe", sometimes)
    outcome = run("prune", "-m", *small, "metric=last", "pruning.size=4,2,1", cwd=tmp_path)
    assert outcome.code == 1
    assert len(outcome.lines) == 1
    assert "2 of 3 jobs failed" in outcome.stderr
    assert "RuntimeError: something broke" in outcome.stderr


def test_wrong_value_in_a_sweep_is_refused_before_the_first_job(small: list[str], tmp_path: Path) -> None:
    outcome = run("prune", "-m", *small, "metric=last,lst", cwd=tmp_path)
    assert outcome.code == 2
    assert "lst" in outcome.stderr
    assert outcome.stdout == ""
    assert not (tmp_path / "artifacts").exists()


def test_two_sweeps_at_once_have_folders_of_their_own(small: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        assert run("prune", "-m", *small, "metric=last", "pruning=n1", "dry_run=true", cwd=tmp_path).code == 0
    folders = list((tmp_path / "outputs").glob("*sweep/*/*"))
    assert len(folders) == 2


@pytest.mark.slow
def test_side_by_side_each_distinct_artifact_once(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes that share inputs and both meet failing jobs; afterwards one process finds everything there.

    They record in the sweep's own folder, though its name holds the process id: of the process that began the sweep.
    With a tracker, offline: one run a trained student, under its address, and the account's key in no file.
    """
    monkeypatch.setenv("WANDB_API_KEY", key := "0123456789abcdef" * 2 + "deadbeef")
    words = [str(REPOSITORY / "train.py"), "-m", *small, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    words += ["finetune=sft", "pruning.size=1,4,2", "seed=0,1", "logger=wandb", "logger.offline=true"]
    outcome = subprocess_run(words, tmp_path)
    assert outcome.code == 2, outcome.stderr
    assert len(outcome.built) == len(set(outcome.built)) == 1 + 2 + 1 + 4
    assert len(set(outcome.lines)) == len(outcome.lines) == 4
    assert all(Path(line).parent.name == "tuned" and Path(line).is_dir() for line in outcome.lines)
    (folder,) = (tmp_path / "outputs").glob("*sweep/*/*")
    records = records_of(folder)
    assert sorted(records) == list(range(6))
    assert {record["path"] for record in records.values() if "path" in record} == set(outcome.lines)
    assert "2 of 6 jobs failed" in outcome.stderr
    assert outcome.stderr.count("error: pruning.size=4 removes all 4 blocks") == 2
    assert "Traceback" not in outcome.stderr
    tracked = [path.name for path in folder.rglob("offline-run-*") if path.is_dir()]
    students = [Path(line).name for line in outcome.lines]
    assert sorted(name.rpartition("-")[2] for name in tracked if "report" not in name) == sorted(students)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
    assert key not in outcome.stdout + outcome.stderr

    before = state_of(tmp_path / "artifacts")
    again = run("train", "-m", *small, "finetune=sft", "pruning.size=1,2", "seed=0,1", cwd=tmp_path)
    assert (again.code, again.built) == (0, [])
    assert sorted(again.lines) == sorted(outcome.lines)
    assert state_of(tmp_path / "artifacts") == before


@pytest.mark.peer
@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="needs the package hydra-optuna-sweeper")
def test_a_search_finds_the_job_of_the_highest_average(small: list[str], tmp_path: Path) -> None:
    """By the settings of `docs/sweeps.md`, and blocks beside them."""
    words = ["hydra/sweeper=optuna", "hydra.sweeper.direction=maximize", "hydra.sweeper.n_trials=4"]
    words += ["hydra.sweeper.sampler.seed=0", "pruning.size=choice(1, 2, 3)", "evaluation.limit=20"]
    words += ["finetune.learning_rate=tag(log, interval(1e-4, 1e-2))", "evaluation.split=dev", "finetune=sft"]
    outcome = run("evaluate", "-m", *small, *words, "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert (outcome.code, len(set(outcome.lines))) == (0, 4), outcome.stderr
    averages = [json.loads((Path(line) / "results.json").read_text())["average"] for line in outcome.lines]
    assert len(set(averages)) > 1
    best = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    assert best.best_value == max(averages)
    overrides = records_of(tmp_path / "sweep")[averages.index(max(averages))]["overrides"]
    assert {f"{key}={value}" for key, value in best.best_params.items()} <= set(overrides)
