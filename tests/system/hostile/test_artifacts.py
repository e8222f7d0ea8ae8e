"""A folder of artifacts of a stranger's: looking at it hangs nowhere, and deleting from it stays within it."""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from canaries import SECRET, Canaries
from launching import Outcome

from sdd.errors import UserError
from sdd.export.checkpoint import export
from sdd.export.checkpoint import main as exporting
from sdd.stages.__main__ import main as stages
from sdd.stages.runtime import Runtime
from sdd.store import Recipe, Store, read_manifest
from sdd.store.__main__ import delete, main
from sdd.store.files import read_facts, read_jsonl
from sdd.store.recipe import address_of

ADDRESS = "0123456789abcdef"


def manifest(**changed: object) -> str:
    whole = {"stage": "scores", "address": ADDRESS, "version": 1, "spec": {}, "inputs": {}, "labels": {}}
    return json.dumps(whole | {"files": {}, "seconds": 1.0, "created": "2026"} | changed)


MANIFESTS: dict[str, str] = {
    "absolute address": manifest(address="/OUTSIDE"),
    "address above": manifest(address="../../outside"),
    "stage above": manifest(stage="../.."),
    "another stage": manifest(stage="tuned"),
    "another address": manifest(address="f" * 16),
    "no stage": json.dumps({"address": ADDRESS}),
    "inputs as text": manifest(inputs="OUTSIDE"),
    "input above": manifest(inputs={"scores": "../../x"}),
    "deep": "[" * 100_000,
    "a list": "[]",
    "not text": "\udcff",
}


@pytest.mark.parametrize("text", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_manifest_of_a_stranger_deletes_nothing(text: str, canaries: Canaries, capsys: pytest.CaptureFixture) -> None:
    folder = canaries.work / "scores" / ADDRESS
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_bytes(canaries.fill(text).encode("utf-8", "surrogateescape"))
    (canaries.work.parent / "outside").mkdir()
    assert main(["--artifacts", str(canaries.work), "prune", "--yes"]) == 2
    assert (canaries.work.parent / "outside").is_dir()
    assert folder.is_dir()
    assert len(capsys.readouterr().err.splitlines()) == 1
    canaries.check()


def _link_artifact(work: Path, elsewhere: Path) -> None:
    (work / "scores").mkdir()
    (work / "scores" / ADDRESS).symlink_to(elsewhere / "scores" / ADDRESS)


def _link_stage(work: Path, elsewhere: Path) -> None:
    (work / "scores").symlink_to(elsewhere / "scores")


@pytest.mark.parametrize("link", [_link_artifact, _link_stage], ids=lambda f: f.__name__)
def test_link_is_no_artifact(link: Callable, canaries: Canaries) -> None:
    theirs = canaries.work.parent / "elsewhere" / "scores" / ADDRESS
    theirs.mkdir(parents=True)
    (theirs / "manifest.json").write_text(manifest())
    link(canaries.work, canaries.work.parent / "elsewhere")
    assert main(["--artifacts", str(canaries.work), "prune", "--yes"]) == 0
    assert (theirs / "manifest.json").is_file()


@pytest.mark.parametrize("command", ["list", "verify", "prune"])
def test_pipe_in_place_of_a_manifest_does_not_hang(command: str, canaries: Canaries) -> None:
    folder = canaries.work / "scores" / ADDRESS
    folder.mkdir(parents=True)
    os.mkfifo(folder / "manifest.json")
    assert main(["--artifacts", str(canaries.work), command]) in (1, 2)


def test_control_characters_are_printed_as_text(canaries: Canaries, capsys: pytest.CaptureFixture) -> None:
    folder = canaries.work / "scores" / ADDRESS
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(manifest(labels={"\x1b[2J": "\x9b31m\u202e"}, created="\x07"))
    assert main(["--artifacts", str(canaries.work), "list"]) == 0
    assert all(c.isprintable() or c == "\n" for c in capsys.readouterr().out)


# ---- one reader of manifests ----------------------------------------------------------------------------------------

FIELDS: dict[str, dict[str, Any]] = {
    "file above": {"files": {"../../x": "0"}},
    "file absolute": {"files": {"/etc/passwd": "0"}},
    "file of two roots": {"files": {"a//b": "0"}},
    "file of another system": {"files": {"C:\\x": "0"}},
    "file of a drive": {"files": {"C:x": "0"}},
    "file dot": {"files": {"./x": "0"}},
    "file empty": {"files": {"": "0"}},
    "file with a newline": {"files": {"a\nb": "0"}},
    "file that steers": {"files": {"\x1b[2J": "0"}},
    "file reversed": {"files": {"\u202ex": "0"}},
    "digest a number": {"files": {"x": 0}},
    "files a list": {"files": ["x"]},
    "seconds a text": {"seconds": "1"},
    "seconds too many": {"seconds": 10**30},
    "seconds true": {"seconds": True},
    "created a number": {"created": 2026},
    "label a list": {"labels": {"a": [1]}},
    "labels null": {"labels": None},
    "versions a list": {"versions": ["torch"]},
    "version a text": {"version": "1"},
    "spec a list": {"spec": [1]},
    "spec too deep": {"spec": json.loads('{"a":' * 100 + "1" + "}" * 100)},
    "spec of no number": {"spec": {"a": [float("nan")]}},
    "spec without an end": {"spec": {"a": float("inf")}},
    "input of itself": {"inputs": {"scores": ADDRESS}},
    "input of upper case": {"inputs": {"scores": "ABCDEF0123456789"}},
    "input with a newline": {"inputs": {"scores": f"{ADDRESS}\n"}},
    "input a list": {"inputs": {"scores": [ADDRESS]}},
    "command a list": {"command": ["rm"]},
    "config a text": {"config": "x"},
    "commit a number": {"commit": 5},
    "stage a list": {"stage": ["scores"]},
    "address a number": {"address": 123},
}


def put(root: Path, text: str, address: str = ADDRESS, stage: str = "scores") -> Path:
    folder = root / stage / address
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(text)
    return folder


def genuine(root: Path, stage: str = "scores", **parts: Any) -> Path:
    """An artifact whose address is that of its recipe."""
    key = {"version": 1, "spec": {}, "inputs": {}} | parts
    address = address_of(stage, key["version"], key["spec"], key["inputs"])
    return put(root, manifest(stage=stage, address=address, **key), address, stage)


def answered(capsys: pytest.CaptureFixture[str], main: Callable, *words: str) -> Outcome:
    code = main(list(words))
    return Outcome(code, *capsys.readouterr())


@pytest.mark.parametrize("case", FIELDS)
def test_manifests_are_read_in_one_way(case: str, canaries: Canaries, capsys: pytest.CaptureFixture[str]) -> None:
    folder = put(canaries.work, manifest(**FIELDS[case]))
    with pytest.raises(UserError, match="is damaged"):
        read_manifest(folder)
    root = ["--artifacts", str(canaries.work)]
    canaries.check_refused(answered(capsys, main, *root, "list"))
    canaries.check_refused(answered(capsys, main, *root, "prune", "--yes"))
    canaries.check_refused(answered(capsys, main, *root, "explain", ADDRESS, ADDRESS[:4] + "x"))
    outcome = answered(capsys, main, *root, "verify", "--json")
    assert list(json.loads(outcome.stdout)["damaged"]) == [f"scores/{ADDRESS}"]
    assert folder.is_dir()


def test_a_manifest_that_is_a_link_or_a_folder(canaries: Canaries, capsys: pytest.CaptureFixture[str]) -> None:
    folder = canaries.work / "scores" / ADDRESS
    folder.mkdir(parents=True)
    (canaries.work.parent / "theirs.json").write_text(manifest())
    (folder / "manifest.json").symlink_to(canaries.work.parent / "theirs.json")
    canaries.check_refused(answered(capsys, main, "--artifacts", str(canaries.work), "list"))
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()
    canaries.check_refused(answered(capsys, main, "--artifacts", str(canaries.work), "list"))


# ---- verify ---------------------------------------------------------------------------------------------------------


def test_verify_tells_a_forged_address(canaries: Canaries, capsys: pytest.CaptureFixture[str]) -> None:
    put(canaries.work, manifest(spec={"forged": True}))
    genuine(canaries.work, spec={"genuine": True})
    outcome = answered(capsys, main, "--artifacts", str(canaries.work), "verify")
    assert outcome.code == 1
    assert f"scores/{ADDRESS}: changed manifest.json: its recipe is scores/" in outcome.stdout
    assert "2 artifacts, 1 damaged" in outcome.stdout


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "pipe": lambda path, outside: os.mkfifo(path),
    "link out": lambda path, outside: path.symlink_to(outside),
    "link nowhere": lambda path, outside: path.symlink_to("nowhere"),
    "link to itself": lambda path, outside: path.symlink_to(path.name),
    "link to a device": lambda path, outside: path.symlink_to("/dev/zero"),
    "folder": lambda path, outside: path.mkdir(),
    "link to a folder": lambda path, outside: path.symlink_to(outside.parent),
}


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "not listed"])
@pytest.mark.parametrize("case", DAMAGES)
def test_verify_reads_regular_files_only(
    case: str, listed: bool, canaries: Canaries, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = hashlib.sha256(canaries.outside.read_bytes()).hexdigest()
    folder = genuine(canaries.work, files={"scores.json": digest} if listed else {})
    DAMAGES[case](folder / "scores.json", canaries.outside)
    outcome = answered(capsys, main, "--artifacts", str(canaries.work), "verify")
    nothing_there = case == "folder" and not listed
    assert (outcome.code, outcome.stderr) == (0 if nothing_there else 1, "")
    assert nothing_there or "scores.json" in outcome.stdout
    canaries.check(outcome.stdout)


def test_names_of_files_are_printed_as_text(canaries: Canaries, capsys: pytest.CaptureFixture[str]) -> None:
    folder = genuine(canaries.work)
    for name in ("\x1b[2J", "a\nb", "\u202ex"):
        (folder / name).write_text("x")
    for words in (["verify"], ["list"], ["prune"]):
        outcome = answered(capsys, main, "--artifacts", str(canaries.work), *words)
        assert all(c.isprintable() or c == "\n" for c in outcome.stdout + outcome.stderr)
        assert "\nb" not in outcome.stdout


@pytest.mark.parametrize("words", [["list"], ["verify"], ["prune"], ["prune", "--yes"]], ids=" ".join)
def test_folders_in_folders(words: list[str], canaries: Canaries, capsys: pytest.CaptureFixture[str]) -> None:
    folder, here = genuine(canaries.work), Path.cwd()
    os.chdir(folder)
    for _ in range(1_200):
        Path("d").mkdir()
        os.chdir("d")
    os.chdir(here)
    outcome = answered(capsys, main, "--artifacts", str(canaries.work), *words)
    subprocess.run(["rm", "-rf", folder / "d"], check=True)
    canaries.check_refused(outcome)


PATTERNS = ["*", "?" * 16, "[0-9]*", "../scores", "/", "", "scores/", ".", "\x1b[2J", "0123456789abcdeF", "a/b"]


@pytest.mark.parametrize("address", PATTERNS, ids=ascii)
def test_addresses_are_no_patterns(address: str, canaries: Canaries, capsys: pytest.CaptureFixture[str]) -> None:
    genuine(canaries.work)
    root = ["--artifacts", str(canaries.work)]
    canaries.check_refused(answered(capsys, main, *root, "explain", address, address))
    canaries.check_refused(answered(capsys, stages, "rerun", address, *root))
    canaries.check_refused(answered(capsys, exporting, address, str(canaries.work / "new"), *root))


# ---- inputs without an end ------------------------------------------------------------------------------------------


def test_inputs_in_a_circle_or_doubling(canaries: Canaries, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--artifacts", str(canaries.work)]
    names = [f"{n:016x}" for n in range(80)]
    for n, name in enumerate(names):
        nexts = [names[(n + 2) % 80], names[(n + 3 - 2 * (n % 2)) % 80]]
        text = manifest(stage="pruned", address=name, inputs={"a": nexts[0], "b": nexts[1]})
        put(canaries.work, text, name, "pruned")
    canaries.check_refused(answered(capsys, main, *root, "explain", names[0], names[1]))
    canaries.check_refused(answered(capsys, stages, "rerun", names[0], *root))
    assert answered(capsys, main, *root, "prune").code == 0


def test_rerun_refuses_a_doubling_chain_of_genuine_addresses(
    canaries: Canaries, capsys: pytest.CaptureFixture[str]
) -> None:
    last = genuine(canaries.work, "pruned", spec={"n": -1}).name
    for n in range(40):
        last = genuine(canaries.work, "pruned", spec={"n": n}, inputs={"a": last, "b": last}).name
    outcome = answered(capsys, stages, "rerun", last, "--artifacts", str(canaries.work))
    canaries.check_refused(outcome)
    assert "without an end" in outcome.stderr


# ---- deletion -------------------------------------------------------------------------------------------------------


def test_deletion_refuses_what_is_no_artifact_of_the_root(canaries: Canaries) -> None:
    theirs = genuine(canaries.work.parent / "elsewhere")
    root = canaries.work / "artifacts"
    root.mkdir()
    (root / "scores").symlink_to(theirs.parent)
    for folder in (theirs, root / "scores" / theirs.name, root / "scores" / ".." / "x", root, root / "other" / "x"):
        with pytest.raises(UserError):
            delete(root, folder)
    assert (theirs / "manifest.json").is_file()


@pytest.mark.parametrize("swapped", ["stage", "artifact"])
def test_a_link_put_in_place_meanwhile_is_not_followed(
    swapped: str, canaries: Canaries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the check and the deletion."""
    folder = genuine(canaries.work)
    theirs = genuine(canaries.work.parent / "elsewhere")

    def swap(place: Path) -> bool:
        moved = place if swapped == "artifact" else place.parent
        shutil.move(moved, canaries.work.parent / "moved")
        moved.symlink_to(theirs if swapped == "artifact" else theirs.parent)
        return True

    monkeypatch.setattr("sdd.store.__main__.is_place", swap)
    with pytest.raises(UserError, match="could not be deleted"):
        delete(canaries.work, folder)
    assert (theirs / "manifest.json").is_file()


def test_links_inside_an_artifact_are_deleted_and_not_followed(
    canaries: Canaries, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = genuine(canaries.work)
    (folder / "outside").symlink_to(canaries.outside)
    (folder / "above").symlink_to(canaries.work.parent)
    assert answered(capsys, main, "--artifacts", str(canaries.work), "prune", "--yes").code == 0
    assert not folder.exists()
    canaries.check()


# ---- what stages read, export and rerun -----------------------------------------------------------------------------

ROWS = ["[1]", "5", '"x"', "{", "[" * 100_000, "\x00", '{"a": ' + "9" * 5000 + "}", '{"a": 1}\n[]']


@pytest.mark.parametrize("text", ROWS, ids=lambda text: text[:12])
def test_rows_that_are_none(text: str, canaries: Canaries) -> None:
    (canaries.work / "rows.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"rows\.jsonl, line [12]"):
        list(read_jsonl(canaries.work / "rows.jsonl"))
    with pytest.raises(UserError, match=r"rows\.jsonl"):
        read_facts(canaries.work / "rows.jsonl")


@pytest.mark.parametrize("case", ["pipe", "link nowhere", "link to a device", "folder", "link to a folder"])
def test_rows_in_files_that_are_none(case: str, canaries: Canaries) -> None:
    DAMAGES[case](canaries.work / "rows.jsonl", canaries.outside)
    for read in (lambda path: list(read_jsonl(path)), read_facts):
        with pytest.raises(UserError, match=r"rows\.jsonl"):
            read(canaries.work / "rows.jsonl")


def test_a_row_without_an_end_is_not_held(canaries: Canaries) -> None:
    path = canaries.work / "rows.jsonl"
    path.touch()
    os.truncate(path, 1 << 30)
    with pytest.raises(UserError, match="more than"):
        list(read_jsonl(path))
    path.unlink()


def test_targets_of_an_export(canaries: Canaries, capsys: pytest.CaptureFixture[str]) -> None:
    root = canaries.work / "artifacts"
    address = genuine(root, "pruned", spec={"model": "m" * 20}).name
    there, link, file = (canaries.work / name for name in ("there", "link", "file"))
    there.mkdir()
    link.symlink_to("nowhere")
    file.write_text("x")
    inside = [root / "pruned" / "new", root / "new", there / ".." / "artifacts" / "new", root]
    for target in (there, link, file, file / "below", *inside):
        outcome = answered(capsys, exporting, address, str(target), "--artifacts", str(root))
        canaries.check_refused(outcome)
    assert not list(there.iterdir()) and not (canaries.work / "nowhere").exists() and file.read_text() == "x"
    assert {path.name for path in root.iterdir()} == {"pruned", ".digests"}


def test_an_exported_artifact_is_no_link_and_copies_none(canaries: Canaries) -> None:
    root = canaries.work / "artifacts"
    folder = genuine(root, "pruned", spec={"model": "m" * 20})
    for name in ("config.json", "tokenizer_config.json", "model.safetensors"):
        (folder / name).symlink_to(canaries.outside)
    with pytest.raises(UserError):
        export(Store(root), folder.name, canaries.work / "new", Runtime())
    shutil.move(folder, canaries.work.parent / "elsewhere")
    folder.symlink_to(canaries.work.parent / "elsewhere")
    with pytest.raises(UserError, match="no artifact"):
        export(Store(root), folder.name, canaries.work / "new", Runtime())
    assert not (canaries.work / "new").exists()


LABELS = ["[]", "{", '{"_target_": ["os.system"]}', '{"_target_": "os.system"}', "[" * 100_000, '{"a": 1}']


@pytest.mark.parametrize("label", LABELS, ids=lambda text: text[:30])
def test_a_label_names_no_other_class(label: str, canaries: Canaries, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Recipe("scores", 1, {"texts": "t" * 16, "metric": {}}, labels={"calibration": label})
    put(canaries.work, manifest(address=recipe.address, spec=recipe.spec, labels=recipe.labels), recipe.address)
    (canaries.work / "scores" / recipe.address / "scores.json").write_text('{"num_texts": 3}')
    (canaries.work.parent / "texts.jsonl").write_text('{"text": "x"}\n')
    words = ["--artifacts", str(canaries.work), "--source", f"{'t' * 16}={canaries.work.parent / 'texts.jsonl'}"]
    canaries.check_refused(answered(capsys, stages, "rerun", recipe.address, *words))


@pytest.mark.parametrize("text", ["{}", '{"num_texts": "3"}', '{"num_texts": 1e400}', "[]", "[" * 100_000])
def test_rerun_reads_scores_with_care(text: str, canaries: Canaries, capsys: pytest.CaptureFixture[str]) -> None:
    folder = genuine(canaries.work, spec={"texts": "t" * 16, "note": SECRET[:0]})
    (folder / "scores.json").write_text(text)
    canaries.check_refused(answered(capsys, stages, "rerun", folder.name, "--artifacts", str(canaries.work)))


CONFIGS = [{}, {"trainer": 1}, {"trainer": {}, "engine": {}, "evaluation": {}}, {"engine": []}]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_rerun_reads_configs_with_care(
    config: dict[str, Any], canaries: Canaries, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = genuine(canaries.work, config=config)
    canaries.check_refused(answered(capsys, stages, "rerun", folder.name, "--artifacts", str(canaries.work)))
