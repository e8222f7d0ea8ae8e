"""The store as its user meets it: list, verify, explain, prune, and what is said when something is missing."""

import argparse
import errno
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from launching import artifacts_of, files_of, run

from sdd.errors import UserError
from sdd.export.serving import checkpoint_for
from sdd.store import SCRATCH, Recipe, Store
from sdd.store.__main__ import main
from sdd.store.mounts import locks_only_here

Command = Callable[..., tuple[int, str, str]]


WHOLE = {"artifacts": 6, "damaged": {}, "made_from_damaged": {}, "unfinished": [], "deleted": False}
"""What `verify` says of the study."""
STUDY = {"scores", "pruned", "rewrites", "targets", "tuned", "evaluated"}


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def function(root: Path, *words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["--artifacts", str(root / "artifacts"), *words])
        return code, *capsys.readouterr()

    return function


def parsed(command: Command, root: Path, *words: str, code: int = 0) -> Any:
    found, out, _ = command(root, *words, "--json")
    assert found == code
    return json.loads(out)


def only(root: Path, stage: str) -> Path:
    (path,) = (root / "artifacts" / stage).iterdir()
    return path


def test_list(study: Path, manifests: dict, command: Command) -> None:
    rows = parsed(command, study, "list")
    assert {row["stage"]: row["address"] for row in rows} == {
        stage: manifest["address"] for stage, manifest in manifests.items()
    }
    assert all(row["bytes"] > 0 for row in rows)
    code, out, _ = command(study, "list")
    assert code == 0
    assert all(manifest["address"] in out for manifest in manifests.values())


def test_artifact_is_found_as_lists_and_logs_name_it(study: Path, tmp_path: Path) -> None:
    store, pruned = Store(study / "artifacts"), only(study, "pruned")
    for name in (pruned.name, pruned.name[:8], f"pruned/{pruned.name}", f"pruned/{pruned.name[:8]}"):
        assert store.find(name) == pruned
        assert checkpoint_for(name, argparse.Namespace(artifacts=store.root), tmp_path) == pruned
    for name in (f"tuned/{pruned.name}", f"tuned/{pruned.name[:8]}", f"elsewhere/{pruned.name}", "tuned/../pruned"):
        with pytest.raises(UserError, match="no artifact under"):
            store.find(name)


def test_verify_finds_nothing_in_a_fresh_study(study: Path, command: Command) -> None:
    assert parsed(command, study, "verify") == WHOLE


def test_verify_finds_every_kind_of_damage(copied: Path, command: Command) -> None:
    weights = only(copied, "pruned") / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (only(copied, "targets") / "summary.json").unlink()
    (only(copied, "tuned") / "adapter" / "more.txt").write_text("x")
    damaged = parsed(command, copied, "verify", code=1)["damaged"]
    text = json.dumps(damaged)
    assert len(damaged) == 3
    assert "changed model.safetensors" in text
    assert "missing summary.json" in text
    assert "not in the manifest: adapter/more.txt" in text
    code, out, _ = command(copied, "verify")
    assert code == 1
    assert "3 damaged" in out


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[: len(text) // 2], "it cannot be read"),
        (lambda text: "[]", "it cannot be read"),
        (lambda text: text.replace('"size": 2', '"size": 1'), "its recipe is pruned/"),
    ],
    ids=["cut off", "of another kind", "edited"],
)
def test_verify_reads_manifests_with_care(damage: Callable, said: str, copied: Path, command: Command) -> None:
    path = only(copied, "pruned") / "manifest.json"
    path.write_text(damage(path.read_text()))
    ((name, found),) = parsed(command, copied, "verify", code=1)["damaged"].items()
    assert name == f"pruned/{path.parent.name}"
    assert said in found[0]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("stage", "damage", "made"),
    [
        ("pruned", lambda folder: flip(folder / "model.safetensors"), ["tuned", "evaluated"]),
        ("targets", lambda folder: (folder / "manifest.json").write_text("{"), ["tuned", "evaluated"]),
        ("evaluated", lambda folder: flip(folder / "manifest.json"), []),
    ],
    ids=["a flipped bit", "a manifest cut off", "a flipped bit of a manifest"],
)
def test_what_is_damaged_is_deleted_and_built_again(
    stage: str, damage: Callable, made: list[str], copied: Path, study: Path, small: list[str], command: Command
) -> None:
    """With all that was made from it, and what a kill left unfinished, which says nowhere what it was made from."""
    root, folders = copied / "artifacts", {one: only(copied, one) for one in (stage, *made)}
    names = [f"{one}/{folder.name}" for one, folder in folders.items()]
    damage(folders[stage])
    (chunk := root / ".partial" / "answered" / ("0" * 16) / SCRATCH / "chunk").parent.mkdir(parents=True)
    chunk.write_text("from a killed build")
    before = {path for path in root.rglob("*") if path.is_file()}
    code, out, _ = command(copied, "verify")
    assert code == 1
    assert [line.split(": ")[0] for line in out.splitlines()[:-1]] == [*names, f"answered/{'0' * 16}"]
    total = f"6 artifacts, 1 damaged, {len(made)} made from these, 1 unfinished; delete them all: add --delete"
    assert out.splitlines()[-1] == total
    assert {path for path in root.rglob("*") if path.is_file()} == before

    answer = parsed(command, copied, "verify", "--delete")
    assert (list(answer["damaged"]), sorted(answer["made_from_damaged"])) == (names[:1], sorted(names[1:]))
    assert answer["deleted"]
    assert not chunk.exists()
    assert not any(folder.exists() for folder in folders.values())
    assert {name.split("/")[0] for name in artifacts_of(root)} == STUDY - {stage, *made}
    outcome = run("evaluate", *small, cwd=copied)
    assert outcome.path.is_dir()
    assert outcome.built == names
    assert files_of(root) == files_of(study / "artifacts")
    assert parsed(command, copied, "verify") == WHOLE


def test_nothing_damaged_is_deleted_while_something_is_built(copied: Path, command: Command) -> None:
    """It may be made from what is damaged, and would be there as whole afterwards."""
    flip(only(copied, "scores") / "scores.json")
    partial = copied / "artifacts" / ".partial" / "answered" / ("0" * 16)
    partial.mkdir(parents=True)
    before = artifacts_of(copied / "artifacts")
    with FileLock(partial.with_suffix(".lock")):
        code, out, err = command(copied, "verify", "--delete")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: nothing was deleted: end the building of answered/{partial.name} first")
    assert partial.is_dir()
    assert artifacts_of(copied / "artifacts") == before


def test_deletion_of_what_is_damaged_can_be_cut_short(
    copied: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any point, what is left is damaged, or was not made from it."""
    from sdd.store import __main__ as commands

    flip(only(copied, "scores") / "scores.json")
    left, deleted = 0, []
    original = commands.delete

    def cut_short(root: Path, folder: Path) -> None:
        if len(deleted) == left:
            raise UserError("killed")
        original(root, folder)
        deleted.append(folder.parent.name)

    with monkeypatch.context() as patch:
        patch.setattr(commands, "delete", cut_short)
        for left in range(1, 4):
            assert command(copied, "verify", "--delete")[0] == 2
            assert parsed(command, copied, "verify", code=1)["artifacts"] == 6 - left
    assert parsed(command, copied, "verify", "--delete")["deleted"]
    assert deleted == ["evaluated", "tuned", "pruned"]
    assert {name.split("/")[0] for name in artifacts_of(copied / "artifacts")} == {"rewrites", "targets"}


def test_verify_finds_every_flipped_byte_of_a_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the fields that decide nothing too; a manifest without a digest, as they once were, is whole."""
    monkeypatch.setattr("sdd.store.store.installed_versions", lambda: {"torch": "2.8"})  # a hundred bytes a package

    def build(recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
        (folder / "scores.json").write_text("{}")

    words = {"command": "python prune.py metric=last", "config": {"seed": 0, "names": {2: "é", 10: 1e-05}}}
    store = Store(tmp_path, lambda: words)
    folder = store.ensure(RECIPE, build)
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        assert store.verify(folder), f"byte {at} of {whole.decode()}"
    old = json.loads(whole)
    assert old.pop("digest")
    path.write_text(json.dumps(old))
    assert store.verify(folder) == []


def test_damaged_manifest_is_one_line_elsewhere(copied: Path, command: Command) -> None:
    (only(copied, "pruned") / "manifest.json").write_text("{")
    code, out, err = command(copied, "list")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "manifest.json is damaged" in err


def test_explain_names_the_setting_upstream(copied: Path, small: list[str], command: Command) -> None:
    first = only(copied, "pruned").name
    other = run("prune", *small, "calibration.num_texts=5", cwd=copied).path.name
    changed = parsed(command, copied, "explain", first, other)
    assert [row["where"] for row in changed] == ["pruned.scores.texts"]
    bigger = run("prune", *small, "pruning=n1", cwd=copied).path.name
    assert parsed(command, copied, "explain", first, bigger) == [{"where": "pruned.size", "a": 2, "b": 1}]
    code, out, _ = command(copied, "explain", first[:6], bigger)
    assert (code, out) == (0, "pruned.size: 2 | 1\n")
    assert command(copied, "explain", first, first)[1] == "the same recipe\n"


def test_explain_across_three_stages(copied: Path, small: list[str], command: Command) -> None:
    first = only(copied, "targets").name
    words = [*small, "engine.max_new_tokens=3", "dataset.num_rows=8", "dataset.answer_rule=none"]
    other = run("generate", *words, cwd=copied).path.name
    changed = {row["where"]: (row["a"], row["b"]) for row in parsed(command, copied, "explain", first, other)}
    assert changed["targets.rewrites.engine.max_new_tokens"] == (4, 3)
    assert changed["targets.rewrites.dataset.num_rows"] == (140, 8)
    assert changed["targets.rule"] == ("anywhere", "none")


def test_unknown_or_ambiguous_address_is_one_line(study: Path, command: Command) -> None:
    for words in (["explain", "ffffffffffff", "eeeeeeeeeeee"], ["explain", "", ""]):
        code, out, err = command(study, *words)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1


def test_folder_that_is_not_there(tmp_path: Path, command: Command) -> None:
    code, _, err = command(tmp_path, "list")
    assert code == 2
    assert "no such folder" in err


def test_prune_says_first_and_keeps_what_an_evaluation_stands_on(
    copied: Path, small: list[str], command: Command
) -> None:
    needed = artifacts_of(copied / "artifacts")
    spare = run("prune", *small, "pruning=n1", cwd=copied).path
    before = artifacts_of(copied / "artifacts")
    answer = parsed(command, copied, "prune")
    assert [row["address"] for row in answer["artifacts"]] == [spare.name]
    assert not answer["deleted"]
    assert "add --yes" in command(copied, "prune")[1]
    assert artifacts_of(copied / "artifacts") == before
    assert parsed(command, copied, "prune", "--yes")["deleted"]
    assert artifacts_of(copied / "artifacts") == needed
    assert parsed(command, copied, "verify") == WHOLE
    assert parsed(command, copied, "prune", "--yes")["artifacts"] == []


def test_pruned_evaluation_frees_everything(copied: Path, command: Command) -> None:
    shutil.rmtree(only(copied, "evaluated"))
    assert len(parsed(command, copied, "prune", "--yes")["artifacts"]) == 5
    assert artifacts_of(copied / "artifacts") == {}


def test_missing_input_names_the_command(tmp_path: Path, copied: Path, small: list[str]) -> None:
    for script, gone, stage in (
        ("evaluate", ["evaluated", "tuned"], "train.py"),
        ("train", ["tuned", "targets"], "generate.py"),
        ("generate", ["targets", "rewrites"], "generate.py"),
        ("prune", ["pruned", "scores"], "prune.py"),
    ):
        for one in gone:
            shutil.rmtree(copied / "artifacts" / one, ignore_errors=True)
        outcome = run(script, *small, "store.missing=raise", cwd=copied)
        assert outcome.code == 2
        assert f"{gone[1]}/" in outcome.errors[0]
        assert f"python {stage}" in outcome.errors[0]
    assert artifacts_of(copied / "artifacts") == {}


def test_present_inputs_are_used_when_missing_raises(copied: Path, small: list[str]) -> None:
    shutil.rmtree(copied / "artifacts" / "targets")
    outcome = run("generate", *small, "store.missing=raise", cwd=copied)
    assert outcome.code == 0
    assert len(outcome.built) == 1


def test_manifest_says_what_made_it(manifests: dict[str, dict]) -> None:
    for stage, manifest in manifests.items():
        named = {"stage", "address", "version", "spec", "inputs", "files", "seconds", "created", "commit", "versions"}
        assert named <= set(manifest)
        assert manifest["stage"] == stage
        assert manifest["files"]
        assert "manifest.json" not in manifest["files"]
        assert {"python", "torch", "transformers"} <= set(manifest["versions"])
    assert manifests["tuned"]["inputs"] == {
        "targets": manifests["targets"]["address"],
        "pruned": manifests["pruned"]["address"],
    }


# ---- builders that fail, without a model --------------------------------------------------------------------------

RECIPE, RESUMABLE = Recipe("pruned", 1, {"a": 1}), Recipe("rewrites", 1, {"a": 1})


def failing(recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    (folder / SCRATCH).mkdir(exist_ok=True)
    (folder / SCRATCH / "chunk").write_text("done")
    (folder / "half.json").write_text("{")
    raise RuntimeError("broken")


@pytest.mark.parametrize(("resumable", "kept"), [(False, False), (True, True)])
def test_failing_build_publishes_nothing(resumable: bool, kept: bool, tmp_path: Path) -> None:
    store, recipe = Store(tmp_path), RESUMABLE if resumable else RECIPE
    with pytest.raises(RuntimeError):
        store.ensure(recipe, failing)
    assert not store.has(recipe)
    assert artifacts_of(tmp_path) == {}
    assert (tmp_path / ".partial" / recipe.stage / recipe.address / SCRATCH / "chunk").exists() is kept


@pytest.mark.parametrize("resumable", [False, True])
def test_a_manifest_that_cannot_be_written_costs_only_what_cannot_be_continued(
    resumable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
        (folder / SCRATCH).mkdir(exist_ok=True)
        (folder / SCRATCH / "chunk").write_text("done")
        (folder / "scores.json").write_text("{}")

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    store, recipe = Store(tmp_path), RESUMABLE if resumable else RECIPE
    partial = tmp_path / ".partial" / recipe.stage / recipe.address
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("sdd.store.store.write_atomically", full)
        store.ensure(recipe, build)
    assert not store.has(recipe)
    assert (partial / SCRATCH / "chunk").exists() is resumable
    assert partial.exists() is resumable
    (partial / "manifest.json").parent.mkdir(exist_ok=True)
    (partial / "manifest.json").write_text("of a publication that was cut short")
    folder = store.ensure(recipe, build)
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "scores.json"}
    assert store.verify(folder) == []


def test_what_a_kill_left_half_written_is_not_published(tmp_path: Path) -> None:
    """A kill between a file's first byte and its rename leaves it under another name."""

    def build(recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
        assert [path.name for path in (folder / SCRATCH).iterdir()] == ["chunk"], "finished work goes on"
        (folder / "rewrites.jsonl").write_text("{}")

    store = Store(tmp_path)
    partial = tmp_path / ".partial" / RESUMABLE.stage / RESUMABLE.address
    (partial / SCRATCH).mkdir(parents=True)
    (partial / "samples").mkdir()
    for name in ("scratch/chunk", "scratch/.chunk.a1b2", ".rewrites.jsonl.c3d4", ".manifest.json.e5", "samples/x"):
        (partial / name).write_text("half")
    folder = store.ensure(RESUMABLE, build)
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "rewrites.jsonl"}
    assert store.verify(folder) == []


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES])
def test_a_folder_that_only_can_be_read_is_one_line(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m benchmarks.faults read-only` mounts one; that takes root."""

    def refused(*given: Any, **named: Any) -> None:
        raise OSError(error, "no", "/there")

    monkeypatch.setattr("filelock.FileLock.acquire", refused)
    with pytest.raises(UserError, match=r"paths\.artifacts=.* cannot be used: no: /there"):
        Store(tmp_path).ensure(RECIPE, failing)


def test_a_group_may_read_what_it_may_enter(tmp_path: Path) -> None:
    def build(recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
        (folder / "below").mkdir()
        (folder / "below" / "weights").write_text("w")
        (folder / "below" / "weights").chmod(0o600)

    store = Store(tmp_path)
    folder = store.ensure(RECIPE, build)
    expected = folder.stat().st_mode & 0o666
    for name in ("manifest.json", "below/weights"):
        assert (folder / name).stat().st_mode & 0o777 == expected, name


def test_stale_work_of_a_stage_that_cannot_resume_is_dropped(tmp_path: Path) -> None:
    store, seen = Store(tmp_path), []
    stale = tmp_path / ".partial" / RECIPE.stage / RECIPE.address / "old.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("from a killed build")

    def builder(recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
        seen.extend(folder.iterdir())
        (folder / "scores.json").write_text("{}")

    folder = store.ensure(RECIPE, builder)
    assert seen == []
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "scores.json"]


# ---- what others build ------------------------------------------------------------------------------------------

INPUTS = {"first": Recipe("rewrites", 1, {"b": 1}), "second": Recipe("rewrites", 1, {"b": 2})}
OF_BOTH = Recipe("targets", 1, {"c": 1}, INPUTS)


def test_what_others_build_is_come_back_to(tmp_path: Path) -> None:
    """The other input is built, then there is other work; a builder that dies leaves its artifact to this process."""
    done: list[str] = []

    def build(recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
        done.append(recipe.address)
        (folder / "rows.json").write_text("{}")

    def meanwhile() -> bool:
        done.append("other work")
        if len(done) == 3:
            lock.release()
        return True

    store, (first, second) = Store(tmp_path), INPUTS.values()
    path = tmp_path / ".partial" / "rewrites" / f"{first.address}.lock"
    path.parent.mkdir(parents=True)
    lock = FileLock(path)
    lock.acquire()
    store.ensure(OF_BOTH, build, meanwhile=meanwhile)
    assert done == [second.address, "other work", "other work", first.address, OF_BOTH.address]
    assert not store.advance(OF_BOTH, build)


# ---- locks that keep nobody out ---------------------------------------------------------------------------------

MOUNTS = """\
/dev/sda / ext4 rw 0 0
server:/all SHARED nfs4 rw,vers=4.2,local_lock=none 0 0
server:/alone SHARED/alone\\040here nfs rw,nolock,vers=3 0 0
me@far: SHARED/far fuse.sshfs rw,user_id=0 0 0
lustre SHARED/flocked lustre rw,flock 0 0
lustre SHARED/local lustre rw,localflock 0 0
broken line
"""


@pytest.mark.parametrize(
    ("place", "mount"),
    [
        ("", None),
        ("alone here/artifacts", "nfs mounted with nolock"),
        ("alone", None),
        ("far/away", "fuse.sshfs"),
        ("flocked", None),
        ("local", "lustre mounted with localflock"),
    ],
)
def test_mounts_whose_locks_are_of_one_machine(place: str, mount: str | None, tmp_path: Path) -> None:
    table = tmp_path / "mounts"
    table.write_text(MOUNTS.replace("SHARED", str(tmp_path / "shared")))
    assert locks_only_here(tmp_path / "shared" / place, table) == mount
    assert locks_only_here(tmp_path, tmp_path / "no such file") is None


def test_a_build_warns_once_of_locks_that_are_of_one_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def build(recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
        (folder / "rows.json").write_text("{}")

    alone, across = tmp_path / "alone", tmp_path / "across"
    mounts = {alone: "nfs4 mounted with nolock", across: None}
    monkeypatch.setattr("sdd.store.store.locks_only_here", mounts.__getitem__)
    for root in mounts:
        Store(root).ensure(OF_BOTH, build)  # three builds
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert warning.getMessage().startswith(
        f"paths.artifacts={alone} lies on nfs4 mounted with nolock: its locks keep out processes of this machine only"
    )


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_said_in_a_line(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Lustre without `flock` says it; no such file system is at hand."""

    def refused(*_: object) -> None:
        raise OSError(number, "No locks available")

    monkeypatch.setattr("fcntl.flock", refused)
    with pytest.raises(UserError, match=r"^paths\.artifacts=\S+ lies on a file system that has no locks, without"):
        Store(tmp_path).ensure(RECIPE, failing)
