"""Presets for a cluster: what a job asks Slurm for, with and without the package that does it."""

import dataclasses
import importlib.util
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from launching import files_of, run, spawn
from omegaconf import DictConfig, OmegaConf

SUBMITIT = "hydra_plugins.hydra_submitit_launcher"
IS_THERE = importlib.util.find_spec(SUBMITIT) is not None
MINUTES = {"prune": 120, "generate": 720, "train": 480, "evaluate": 120}
"""Of a job of each script before it is queued again."""
MEMORY = {"prune": 64, "generate": 128, "train": 256, "evaluate": 64}
"""GB of a node that a job of each script asks for."""
MOMENT = 60.0
"""Seconds in which a job makes room, on a machine with much else to do."""

INTERRUPTED = {
    "tuned": ("train", ["finetune=sft", "trainer.micro_batch_tokens=256", "trainer.checkpoint_every=1"], "step=*.ckpt"),
    "rewrites": ("generate", ["dataset.num_rows=300", "engine.max_new_tokens=16"], "*.jsonl"),
}
"""By stage: the script, the words by which it takes a while, and the files of what it goes on from."""


@pytest.mark.parametrize("script", MINUTES)
def test_a_preset_asks_for_the_devices_of_the_trainer(script: str, composed: Callable[..., DictConfig]) -> None:
    words = [
        f"hydra/launcher=slurm_{script}",
        "hydra.launcher.partition=a100",
        "trainer.devices=4",
        "trainer.num_nodes=2",
        "hydra.launcher.setup=[module load cuda]",  # typed, as no file may
    ]
    config = composed(*words)
    asked = OmegaConf.to_container(OmegaConf.masked_copy(config, ["hydra", "trainer"]).hydra.launcher, resolve=False)
    resolved = {key: config.hydra.launcher[key] for key in ("nodes", "gpus_per_node", "partition")}
    assert resolved == {"nodes": 2, "gpus_per_node": 4, "partition": "a100"}
    assert (asked["timeout_min"], asked["mem_gb"]) == (MINUTES[script], MEMORY[script])
    assert (asked["tasks_per_node"], asked["additional_parameters"]) == (1, {"requeue": True})
    assert asked["setup"] == ["module load cuda"]
    assert asked["max_num_timeout"] > 0, "a job that is out of time goes on"
    if IS_THERE:
        from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf

        assert set(asked) <= {field.name for field in dataclasses.fields(SlurmQueueConf)}


@pytest.mark.skipif(IS_THERE, reason="hydra-submitit-launcher is installed")
def test_without_its_package_a_preset_is_one_line(tmp_path: Path) -> None:
    outcome = run("prune", "-m", "hydra/launcher=slurm_prune", "seed=0,1", cwd=tmp_path)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert outcome.stderr == (
        "error: this launcher needs the package hydra-submitit-launcher; run: pip install 'sdd[cluster]'\n"
    )


@pytest.mark.peer
@pytest.mark.skipif(not IS_THERE, reason="needs the package hydra-submitit-launcher")
def test_jobs_of_submitit_build_what_one_process_does(small: list[str], tmp_path: Path) -> None:
    """Two jobs by processes of this machine that share a folder of artifacts."""
    words = [*small, "finetune=none", "hydra.sweep.dir=sweep", "pruning.size=1,2"]
    alone = run("prune", "-m", *words, cwd=tmp_path / "alone")
    jobs = run("prune", "-m", *words, "hydra/launcher=submitit_local", cwd=tmp_path / "jobs")
    assert (alone.code, jobs.code) == (0, 0), jobs.stderr
    made = files_of(tmp_path / "alone" / "artifacts")
    assert len({name.split("/")[1] for name in made if name.startswith("pruned/")}) == 2
    assert files_of(tmp_path / "jobs" / "artifacts") == made


@pytest.mark.peer
@pytest.mark.skipif(not IS_THERE, reason="needs the package hydra-submitit-launcher")
@pytest.mark.parametrize(("kind", "devices"), [("tuned", 1), ("tuned", 2), ("rewrites", 1)])
def test_a_job_whose_time_is_nearly_out_is_queued_again_and_goes_on(
    small: list[str], tmp_path: Path, kind: str, devices: int
) -> None:
    """By the signal that Slurm sends then, to the job in the midst of a stage; the same bytes in the end."""
    script, stage, kept = INTERRUPTED[kind]
    words = [*small, *stage, "trainer.threads=1"]
    sweep = ["-m", *words, "seed=0", "hydra.sweep.dir=sweep", f"trainer.devices={devices}"]
    alone = run(script, *words, cwd=tmp_path / "alone")
    jobs = spawn(script, *sweep, "hydra/launcher=submitit_local", cwd=tmp_path / "jobs")
    scratch = tmp_path / "jobs" / "artifacts" / ".partial" / kind
    jobs.until(lambda: bool(list(scratch.glob(f"*/scratch/{kept}"))))
    below = psutil.Process(jobs.process.pid).children(recursive=True)
    (job,) = [one for one in below if "submitit.core._submit" in " ".join(one.cmdline())]
    job.send_signal(signal.SIGUSR2)
    job.wait(MOMENT)
    assert jobs.outcome().code == 0, jobs.stream("stderr")
    (log,) = (tmp_path / "jobs" / "sweep" / ".submitit").glob("*/*_0_log.err")
    assert log.read_text().count("Requeued job") == 1 and log.read_text().count(f"building {kind}/") == 2
    assert files_of(tmp_path / "jobs" / "artifacts") == files_of(tmp_path / "alone" / "artifacts")
    assert alone.code == 0
