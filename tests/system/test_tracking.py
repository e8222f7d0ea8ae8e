"""Weights & Biases offline, for real; and what artifacts must not say: secrets and places on this machine."""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import REPOSITORY, artifacts_of, run, spawn

from sdd.report.tracking import run_id

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "deadbeef",
    "HF_TOKEN": "hf_s3cr3tT0ken",
    "SDD_NOTE": "a-p1ain-n0te",
}


@pytest.fixture(scope="module")
def tracked(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which one student was trained with a tracker, and then evaluated."""
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        patch.setenv("WANDB_MODE", "offline")
        process = spawn(
            "train", *small, "logger=wandb", "logger.offline=true", "finetune=sft", cwd=folder, name="first"
        )
        outcome = process.outcome()
        assert outcome.code == 0, outcome.stderr
        assert len(outcome.lines) == 1, outcome.stdout
        outcome = run("evaluate", *small, "finetune=sft", cwd=folder)
        assert outcome.code == 0, outcome.stderr
    return folder


def runs_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("offline-run-*") if path.is_dir())


def test_a_run_is_written_under_the_artifacts_address(tracked: Path) -> None:
    (run_folder,) = runs_of(tracked)
    (tuned,) = (tracked / "artifacts" / "tuned").iterdir()
    assert run_folder.name.endswith(f"-{tuned.name}")
    (data,) = run_folder.glob("*.wandb")
    assert data.stat().st_size > 1_000
    assert tuned.name in data.name
    assert (tracked / "outputs") in run_folder.parents


def test_cached_artifact_starts_no_run(tracked: Path, small: list[str]) -> None:
    before = runs_of(tracked)
    outcome = run("train", *small, "logger=wandb", "logger.offline=true", "finetune=sft", cwd=tracked)
    assert outcome.path.name in before[0].name
    assert outcome.built == []
    assert runs_of(tracked) == before


def test_nobody_logged_in_is_said_before_any_work(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb"))
    outcome = spawn("train", *small, "finetune=sft", "logger=wandb", cwd=tmp_path).outcome()
    assert (outcome.code, outcome.stdout, outcome.built) == (2, "", []), outcome.stderr
    assert outcome.errors == [
        "error: logger=wandb, but nobody is logged in here; run: wandb login, or add logger.offline=true"
    ]
    assert artifacts_of(tmp_path / "artifacts") == {}
    plain = run("prune", *small, "metric=last", "logger=wandb", cwd=tmp_path)
    assert plain.code == 0, plain.stderr


def test_tracker_changes_no_byte_of_the_artifact(tracked: Path, small: list[str], tmp_path: Path) -> None:
    for stage in ("scores", "pruned", "targets"):
        shutil.copytree(tracked / "artifacts" / stage, tmp_path / "artifacts" / stage)
    plain = run("train", *small, "finetune=sft", cwd=tmp_path).path
    (with_tracker,) = (tracked / "artifacts" / "tuned").iterdir()
    name = f"tuned/{plain.name}"
    assert plain.name == with_tracker.name
    assert artifacts_of(tmp_path / "artifacts")[name]["files"] == artifacts_of(tracked / "artifacts")[name]["files"]


def spoken(folder: Path) -> str:
    """All that the files under a folder say, binary ones included; locks and remembered digests as well."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert paths
    return "\n".join(path.read_bytes().decode("utf-8", "replace") for path in paths)


def test_artifacts_hold_no_secret_and_no_place(tracked: Path, checkpoint: Path) -> None:
    text = spoken(tracked / "artifacts")
    assert "lora_A" in text
    assert not [value for value in SECRETS.values() if value in text]
    places = {str(tracked), str(checkpoint), str(REPOSITORY), sys.prefix, str(Path.home()), os.uname().nodename}
    assert not [place for place in places if len(place) > 5 and place in text]


def test_artifacts_of_a_plain_study_hold_no_place(study: Path, checkpoint: Path) -> None:
    text = spoken(study / "artifacts")
    places = (str(study), str(checkpoint), str(checkpoint.parent), str(REPOSITORY), sys.prefix)
    assert not [place for place in places if place in text]


def test_local_data_leaves_no_place(small: list[str], tmp_path: Path) -> None:
    place = tmp_path / "data of mine"
    place.mkdir()
    rows = [{"prompt": f"p{n}", "reference": "r", "text": f"some text {n}"} for n in range(20)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*small, "dataset=local", "calibration=local", "dataset.num_rows=null", "finetune=sft"]
    words += [f"dataset.path='{place / 'rows.jsonl'}'", f"calibration.path='{place / 'rows.jsonl'}'"]
    for script in ("prune", "generate"):
        outcome = run(script, *words, cwd=tmp_path)
        assert outcome.code == 0, outcome.stderr
    text = spoken(tmp_path / "artifacts")
    assert "data of mine" not in text
    assert str(tmp_path) not in text


def test_remembered_digests_hold_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdd.store import digests

    large, memory = tmp_path / "large.safetensors", tmp_path / "memory"
    large.write_bytes(b"x" * digests.SMALL)
    first = digests.remembered_digest(large, memory)
    assert first == digests.file_digest(large)
    assert str(tmp_path) not in spoken(memory)
    monkeypatch.setattr(digests, "file_digest", lambda path: pytest.fail("hashed again"))
    assert digests.remembered_digest(large, memory) == first


def test_secrets_are_in_no_file_of_the_run_either(tracked: Path) -> None:
    text = spoken(tracked / "outputs")
    assert not [value for value in SECRETS.values() if value in text]


def test_tensorboard_where_it_is_and_where_it_is_not(small: list[str], tracked: Path, tmp_path: Path) -> None:
    """Its package comes with an extra; where it is not installed, only the line can be looked at."""
    for stage in ("scores", "pruned", "targets"):
        shutil.copytree(tracked / "artifacts" / stage, tmp_path / "artifacts" / stage)
    outcome = run("train", *small, "finetune=sft", "logger=tensorboard", cwd=tmp_path)
    if importlib.util.find_spec("tensorboard") is None:
        assert (outcome.code, outcome.built) == (2, [])
        assert outcome.errors == ["error: logger=tensorboard needs tensorboard; run: pip install 'sdd[tensorboard]'"]
        return
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    assert events.parent == next((tmp_path / "outputs").rglob("tensorboard")) / outcome.path.name
    assert "loss" in events_of(events.parent).Tags()["scalars"]
    name = f"tuned/{outcome.path.name}"
    assert artifacts_of(tmp_path / "artifacts")[name]["files"] == artifacts_of(tracked / "artifacts")[name]["files"]
    words = ["-m", *small, "metric=last", "finetune=none", "pruning=none,n1", "hydra.sweep.dir=sweep"]
    for _ in range(2):
        outcome = run("evaluate", *words, "logger=tensorboard", cwd=tmp_path)
        assert outcome.code == 0, outcome.stderr
    (events,) = (tmp_path / "sweep").rglob("events.out.tfevents.*")
    run_folder = tmp_path / "sweep" / "report" / "tensorboard" / run_id(Path(line).name for line in outcome.lines)
    assert events.parent == run_folder
    logged, report = events_of(run_folder), tmp_path / "sweep" / "report"
    (table,) = logged.Tensors("table/text_summary")
    assert table.tensor_proto.string_val[0].decode() == (report / "table.md").read_text()
    assert set(logged.Tags()["images"]) == {path.stem for path in report.glob("*.png")} != set()


def events_of(folder: Path) -> Any:
    """What TensorBoard reads of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged = EventAccumulator(str(folder))
    logged.Reload()
    return logged


def test_a_sweep_tracks_its_report_once(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdd.report.page.write_page", lambda *parts: None)
    words = ["-m", *small, "metric=last", "finetune=none", "pruning=none,n1", "hydra.sweep.dir=sweep"]
    for _ in range(2):
        outcome = run("evaluate", *words, "logger=wandb", "logger.offline=true", cwd=tmp_path)
        assert outcome.code == 0, outcome.stderr
    (tracked,) = runs_of(tmp_path)
    addresses = [Path(line).name for line in outcome.lines]
    assert tracked.name.endswith(f"-{run_id(addresses)}")
    assert tracked.parent == tmp_path / "sweep" / "report" / "wandb"
    media = {path.name.split("_")[0] for path in tracked.rglob("files/media/*/*")}
    assert {"table", "tasks"} <= media
    (data,) = tracked.glob("*.wandb")
    assert b"report" in data.read_bytes()
