"""A folder of artifacts of a stranger's: looking at it hangs nowhere, and deleting from it stays within it."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from canaries import Canaries

from sdd.store.__main__ import main

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
