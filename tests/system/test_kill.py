"""Processes that are killed, and processes that ask for the same: nothing is half there, nothing is made twice."""

import contextlib
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from launching import PATIENCE, REPOSITORY, artifacts_of, files_of, run, spawn

from sdd.store import SCRATCH

ASKED_BY = {
    "scores": "prune",
    "pruned": "prune",
    "rewrites": "generate",
    "targets": "generate",
    "tuned": "train",
    "evaluated": "evaluate",
}
UPSTREAM = {
    "scores": set(),
    "pruned": {"scores"},
    "rewrites": set(),
    "targets": {"rewrites"},
    "tuned": {"scores", "pruned", "rewrites", "targets"},
    "evaluated": {"scores", "pruned", "rewrites", "targets", "tuned"},
}
ALSO_MADE = {"scores": {"pruned"}, "rewrites": {"targets"}}
KEPT = {
    "scores": ["scores.safetensors"],
    "rewrites": ["000000.jsonl"],
    "tuned": ["step=3.ckpt"],
    "evaluated": ["arithmetic.jsonl"],
}
"""What a killed build leaves to be continued; of scores, nothing is left to be summed up."""


def scratch_of(root: Path, stage: str) -> list[str]:
    """The files that a stage would continue from."""
    return [path.name for path in (root / "artifacts" / ".partial" / stage).glob("*/scratch/*")]


def noted(patch: pytest.MonkeyPatch) -> list[str]:
    """The chunks and steps that are computed from now on, by the name of what they leave for a resumed build."""
    from sdd.finetuning import module
    from sdd.forward import sums
    from sdd.stages import evaluated, rewrites

    done: list[str] = []

    def note(owner: Any, function: str, name_of: Callable[..., str | None]) -> None:
        original = getattr(owner, function)

        def noting(*arguments: Any) -> Any:
            done.extend(name for name in [name_of(*arguments)] if name)
            return original(*arguments)

        patch.setattr(owner, function, noting)

    for room in (rewrites, evaluated):
        note(room, "write_jsonl", lambda path, lines: path.name if path.parent.name == SCRATCH else None)
    note(sums, "_write", lambda path, *rest: path.name)
    note(module.StudentModule, "_record", lambda student, step, *rest: f"step={step}.ckpt")
    return done


@pytest.mark.parametrize("stage", ASKED_BY)
def test_killed_in_the_middle_then_run_again(
    stage: str, small: list[str], study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command completes, with the same bytes as an uninterrupted run, and redoes no finished chunk."""
    for upstream in UPSTREAM[stage]:
        shutil.copytree(study / "artifacts" / upstream, tmp_path / "artifacts" / upstream)
    process = spawn(ASKED_BY[stage], *small, cwd=tmp_path, hold=stage)
    process.until_holding(stage)
    process.kill()
    assert {name.split("/")[0] for name in artifacts_of(tmp_path / "artifacts")} == UPSTREAM[stage]
    assert list((tmp_path / "artifacts" / ".partial" / stage).glob("[0-9a-f]*"))
    assert sorted(scratch_of(tmp_path, stage)) == KEPT.get(stage, [])

    computed = noted(monkeypatch)
    assert run(ASKED_BY[stage], *small, cwd=tmp_path).path.is_dir()
    assert bool(computed) is (stage in KEPT and stage != "scores")
    assert not set(computed) & set(KEPT.get(stage, []))
    made = UPSTREAM[stage] | {stage} | ALSO_MADE.get(stage, set())
    whole = {name: digest for name, digest in files_of(study / "artifacts").items() if name.split("/")[0] in made}
    assert files_of(tmp_path / "artifacts") == whole
    assert not scratch_of(tmp_path, stage)


def test_killed_at_random(checkpoint: Path, tmp_path: Path) -> None:
    """The short form of `python -m benchmarks.faults`, which kills all stages a thousand times."""
    from benchmarks import faults

    words = ["model=local", f"model.path={checkpoint}", "model.dtype=float32"]
    with faults.adopting(), contextlib.closing(faults.Campaign(tmp_path, 1, words)) as campaign:
        for numbers, at_steps in (([10], True), (range(11, 14), False)):
            kills = Counter[str]()
            for number in numbers:  # a stage that ends before its signal ends a trial
                trial = campaign.run("drafted", number)
                assert trial.problems == []
                kills += trial.kills
                if kills.total() >= 2:
                    break
            assert kills.total() >= 2
            assert all(what.endswith("-step") is at_steps for what in kills)


def test_killed_while_writing_a_checkpoint(small: list[str], study: Path, tmp_path: Path) -> None:
    """Half a checkpoint is not resumed from; the one before it is."""
    for upstream in UPSTREAM["tuned"]:
        shutil.copytree(study / "artifacts" / upstream, tmp_path / "artifacts" / upstream)
    process = spawn("train", *small, cwd=tmp_path, hold="checkpoint")
    process.until_holding("checkpoint")
    process.kill()
    assert [name for name in scratch_of(tmp_path, "tuned") if name.endswith(".ckpt")] == ["step=2.ckpt"]
    run("train", *small, cwd=tmp_path)
    made = files_of(tmp_path / "artifacts")
    assert made == {name: files_of(study / "artifacts")[name] for name in made}
    assert any(name.startswith("tuned/") for name in made)


def test_same_artifact_asked_for_twice_at_once_is_built_once(small: list[str], study: Path, tmp_path: Path) -> None:
    first = spawn("prune", *small, cwd=tmp_path, name="first", hold="scores")
    first.until_holding("scores")
    second = spawn("prune", *small, cwd=tmp_path, name="second")
    second.until(lambda: "is being built by another process; waiting" in second.stream("stderr"))
    (tmp_path / "go").touch()
    outcomes = [first.outcome(), second.outcome()]
    assert outcomes[0].path == outcomes[1].path
    built = outcomes[0].built + outcomes[1].built
    assert len(built) == len(set(built)) == 2
    assert outcomes[0].built[0].startswith("scores/")


def test_lock_of_a_killed_builder_blocks_nobody(small: list[str], study: Path, tmp_path: Path) -> None:
    first = spawn("prune", *small, cwd=tmp_path, name="first", hold="scores")
    first.until_holding("scores")
    second = spawn("prune", *small, cwd=tmp_path, name="second")
    second.until(lambda: "waiting for it" in second.stream("stderr"))
    first.kill()
    outcome = second.outcome()
    assert outcome.path.is_dir()
    assert [name.split("/")[0] for name in outcome.built] == ["scores", "pruned"]


def test_deletion_cut_short_is_repaired(small: list[str], copied: Path) -> None:
    """A folder without its manifest counts as absent and is replaced."""
    (folder,) = (copied / "artifacts" / "pruned").iterdir()
    before = files_of(copied / "artifacts")
    (folder / "manifest.json").unlink()
    (folder / "stray.txt").write_text("x")
    outcome = run("prune", *small, cwd=copied)
    assert outcome.path == folder
    assert outcome.built == [f"pruned/{folder.name}"]
    assert files_of(copied / "artifacts") == before
    assert not (folder / "stray.txt").exists()


def test_many_at_once_on_an_empty_folder(small: list[str], study: Path, tmp_path: Path) -> None:
    """Two sweeps and a command that share inputs, started together: each artifact once."""
    words = {"a": ["evaluate", "-m", "seed=0,1"], "b": ["train"], "c": ["evaluate", "-m", "seed=1,0"]}
    running = [spawn(script, *small, *more, cwd=tmp_path, name=name) for name, (script, *more) in words.items()]
    outcomes = [process.outcome() for process in running]
    assert [outcome.code for outcome in outcomes] == [0, 0, 0]
    assert [len(outcome.lines) for outcome in outcomes] == [2, 1, 2]
    built = [name for outcome in outcomes for name in outcome.built]
    assert len(built) == len(set(built)) == 8
    assert files_of(study / "artifacts").items() <= files_of(tmp_path / "artifacts").items()


SWEEP = """
import time
from joblib import Parallel, delayed
from sdd.cli.workers import watched_workers

def job(data):
    time.sleep(600)

watched_workers()
Parallel(n_jobs=2)(delayed(job)(bytes(1 << 20)) for _ in range(2))
"""


def test_workers_end_with_a_sweep_that_is_killed_while_it_hands_them_their_jobs(tmp_path: Path) -> None:
    """A job is longer than a pipe holds: its worker, which begins later, reads what there is and waits for the rest."""
    sweep = psutil.Popen([sys.executable, "-c", SWEEP], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    deadline = time.monotonic() + PATIENCE
    while len(sweep.children()) < 3 and time.monotonic() < deadline:  # two workers and their tracker
        time.sleep(0.01)
    time.sleep(0.1)
    begun = sweep.children()
    sweep.kill()
    sweep.wait()
    assert len(begun) >= 3
    assert psutil.wait_procs(begun, 60)[1] == []
