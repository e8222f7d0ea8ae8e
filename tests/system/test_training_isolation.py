"""A run of training sees nothing but its own scratch folder, opens no pickle, and leaves no model alive."""

import gc
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from launching import artifacts_of, run, spawn
from transformers import PreTrainedModel

SLURM = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
SLURM |= {"SLURM_JOB_NAME": "sdd", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NODELIST": "localhost"}


@pytest.fixture
def prepared(small: list[str], copied: Path) -> list[str]:
    """Words of a run whose inputs are there, in `tmp_path`."""
    for stage in ("tuned", "evaluated"):
        shutil.rmtree(copied / "artifacts" / stage)
    return small


def test_another_runs_checkpoint_is_not_loaded_under_slurm(
    prepared: list[str], manifests: dict[str, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in SLURM.items():
        monkeypatch.setenv(key, value)
    torch.save({"global_step": 5, "state_dict": {}, "history": [{"loss": 0.0}] * 5}, tmp_path / "hpc_ckpt_1.ckpt")
    again = json.loads((run("train", *prepared, cwd=tmp_path).path / "manifest.json").read_text())
    assert again["files"] == manifests["tuned"]["files"]


def test_slurms_signal_writes_no_checkpoint(
    prepared: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a handler of Lightning's the signal ends the process, as it ends any; the next one continues."""
    for key, value in SLURM.items():
        monkeypatch.setenv(key, value)
    running = spawn("train", *prepared, cwd=tmp_path, hold="tuned")
    running.until_holding("tuned")
    os.kill(running.process.pid, signal.SIGUSR1)
    running.process.join(60)
    assert running.process.exitcode == -signal.SIGUSR1
    assert not list(tmp_path.glob("hpc_ckpt*"))
    assert run("train", *prepared, cwd=tmp_path).code == 0


def test_pickle_in_a_scratch_folder_is_not_opened(prepared: list[str], tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    planned = run("train", *prepared, "dry_run=true", cwd=tmp_path)
    address = re.findall(r"tuned/([0-9a-f]{16})", planned.stdout)[0]
    scratch = tmp_path / "artifacts" / ".partial" / "tuned" / address / "scratch"
    scratch.mkdir(parents=True)
    torch.save({"state_dict": {}, "evil": Payload()}, scratch / "step=1.ckpt")
    outcome = run("train", *prepared, cwd=tmp_path)
    assert (outcome.code, len(outcome.errors)) == (2, 1), outcome.stderr
    assert not (tmp_path / "ran").exists()


def test_no_model_outlives_its_stage(small: list[str], tmp_path: Path) -> None:
    def alive() -> int:
        return sum(isinstance(one, PreTrainedModel) for one in gc.get_objects())

    before = alive()
    for words in (["finetune=sft"], ["finetune=self_distill"]):
        assert run("evaluate", *small, *words, cwd=tmp_path).code == 0
        assert alive() <= before, words
    assert len(artifacts_of(tmp_path / "artifacts")) > 6
