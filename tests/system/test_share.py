"""A study as one file, and repeated from it by somebody else, whose places are others."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
from launching import files_of

from sdd.report.__main__ import report
from sdd.share import main as share
from sdd.share import rerun
from sdd.share.gathering import members_of


@pytest.fixture(scope="module")
def shared(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the study's one job with its report."""
    folder = tmp_path_factory.mktemp("shared") / "sweep"
    shutil.copytree(study / "outputs", folder)
    report([folder], folder / "report")
    return folder


@pytest.fixture(scope="module")
def bundle(shared: Path) -> Path:
    path = shared.parent / "study.zip"
    assert share([str(shared), "--out", str(path)]) == 0
    return path


def test_bundle_holds_what_was_asked_and_what_came_out(bundle: Path, shared: Path, manifests: dict) -> None:
    with zipfile.ZipFile(bundle) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
        entries = archive.infolist()
    assert list(contents) == sorted(contents)
    assert {(e.date_time, e.external_attr >> 16, e.create_system) for e in entries} == {
        ((1980, 1, 1, 0, 0, 0), 0o100644, 3)
    }
    expected = {f"artifacts/{stage}/{m['address']}/manifest.json" for stage, m in manifests.items()}
    expected |= {
        "study.json",
        "jobs/0/config.yaml",
        "given/experiment/small.yaml",
        "installed.txt",
        "requirements.lock",
    }
    assert expected <= contents.keys()
    assert {"report/report.html", "report/table.json", "report/table.md"} <= contents.keys()
    assert not [name for name in contents if name.endswith((".safetensors", ".jsonl"))]
    (job,) = json.loads(contents["study.json"])["jobs"]
    assert job == {
        "script": "evaluate",
        "overrides": ["experiment=small"],
        "stage": "evaluated",
        "address": manifests["evaluated"]["address"],
    }
    assert contents["given/experiment/small.yaml"].startswith(
        b"# @package _global_\ndefaults:\n- override /model: local"
    )
    assert not [name for name, content in contents.items() if str(shared.parents[1]).encode() in content]
    assert json.loads(contents["report/table.json"]) == json.loads((shared / "report" / "table.json").read_text())


def test_the_same_folder_gives_the_same_bytes_and_weights_only_when_asked(bundle: Path, shared: Path) -> None:
    again = bundle.with_name("again.zip")
    assert share([str(shared), "--out", str(again)]) == 0
    assert again.read_bytes() == bundle.read_bytes()
    with_weights = members_of(shared, weights=True).keys() - members_of(shared).keys()
    assert {name.rpartition("/")[2] for name in with_weights} >= {"model.safetensors", "adapter_model.safetensors"}


def test_somebody_else_looks_repeats_and_compares(
    bundle: Path,
    study: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert rerun([str(bundle)]) == 2
    outcome = capsys.readouterr()
    assert outcome.out == "" and outcome.err.startswith("error: job 0: ") and "model.path" in outcome.err

    assert rerun([str(bundle), f"model.path={checkpoint}", "seed=1"]) == 1
    told = capsys.readouterr().out
    assert "addresses: 0 of 1 jobs lead to the same" in told
    assert "evaluated.tuned.seed: 0 | 1" in told
    assert not (tmp_path / "artifacts" / "scores").exists()

    assert rerun([str(bundle), f"model.path={checkpoint}"]) == 0
    told = capsys.readouterr().out
    for line in ("packages: the same", "stages: the same", "settings: the same", "addresses: 1 of 1", "6 artifacts to"):
        assert line in told
    assert not (tmp_path / "artifacts" / "scores").exists()

    assert rerun([str(bundle), f"model.path={checkpoint}", "--yes", "--out", "new"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-3:] == ["artifacts: 6 of 6 are the same to the byte", "table: the same", "new"]
    assert files_of(tmp_path / "artifacts") == files_of(study / "artifacts")
    assert (tmp_path / "new" / "report.html").is_file()


def test_folder_that_cannot_be_shared(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(message: str) -> None:
        assert share([str(tmp_path / "sweep"), "--out", str(tmp_path / "study.zip")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1, error
        assert not list(tmp_path.glob("*.zip"))

    refused("is not a folder")
    shutil.copytree(shared, tmp_path / "sweep")
    (tmp_path / "sweep" / "report" / "figure.png").symlink_to(tmp_path)
    refused("a link")
    (tmp_path / "sweep" / "report" / "figure.png").unlink()
    table = tmp_path / "sweep" / "report" / "table.md"
    text = table.read_text()
    table.write_text(f"{text} {Path.cwd()}/x")
    refused("names a folder of this machine")
    shutil.rmtree(tmp_path / "sweep" / "report")
    refused("holds no report; run: python -m sdd.report")
    (record,) = (tmp_path / "sweep").rglob("result.json")
    config = record.parent / ".hydra" / "config.yaml"
    config.write_text(config.read_text().replace("num_texts: 6", "num_texts: 7"))
    refused("calibration is composed otherwise than when it ran")
    record.unlink()
    refused("holds no job")
