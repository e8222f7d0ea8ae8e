"""One small study on a random checkpoint, built once and shared by all tests here."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.types import RunMode
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).parent))

from launching import artifacts_of, run

from sdd.cli.loader import own_loader

BLOCKS = 4
SMALL = """\
# @package _global_
defaults:
  - override /model: local
model: {path: CHECKPOINT, dtype: float32}
calibration: {num_texts: 6}
dataset: {num_rows: 140}
engine: {max_new_tokens: 4, batch_size: 32}
finetune: {validation_rows: 4, num_rows: 12, batch_size: 4, epochs: 2}
adapter: {rank: 2}
trainer: {checkpoint_every: 1}
evaluation: {tasks: [arithmetic, fact_choice], limit: 3, max_new_tokens: 4}
"""


@pytest.fixture(scope="session")
def checkpoint(tiny_llama: Path) -> Path:
    """A random Llama of 4 blocks and width 32 with a tokenizer and a chat template; read it, copy it."""
    return tiny_llama


@pytest.fixture(scope="session")
def small(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words of a study on that checkpoint that takes a second or so a stage; 140 rows are two chunks of rewrites."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "experiment").mkdir()
    (folder / "experiment" / "small.yaml").write_text(SMALL.replace("CHECKPOINT", str(checkpoint)))
    return [f"--config-dir={folder}", "experiment=small"]


@pytest.fixture(scope="session")
def composed(small: list[str]) -> Callable[..., DictConfig]:
    """A function from overrides to the composed config of that study, `hydra` node included; composed once each."""
    made: dict[tuple[str, ...], DictConfig] = {}
    searched, loader = small[0].removeprefix("--config-dir="), own_loader()

    def function(*overrides: str) -> DictConfig:
        if overrides not in made:
            words = [f"hydra.searchpath=[file://{searched}]", "experiment=small", *overrides]
            made[overrides] = loader.load_configuration("config", words, RunMode.RUN)
        return made[overrides].copy()

    return function


@pytest.fixture(scope="session")
def study(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory in which the whole pipeline has run once; read it, copy it, never change it."""
    folder = tmp_path_factory.mktemp("study")
    outcome = run("evaluate", *small, cwd=folder)
    assert outcome.code == 0, outcome.stderr
    return folder


@pytest.fixture(scope="session")
def manifests(study: Path) -> dict[str, dict]:
    """The study's manifests, by stage; it holds one artifact of each."""
    found = artifacts_of(study / "artifacts")
    by_stage = {manifest["stage"]: manifest for manifest in found.values()}
    assert len(by_stage) == len(found) == 6
    return by_stage


@pytest.fixture
def copied(study: Path, tmp_path: Path) -> Path:
    """A working directory with a copy of the study's artifacts, which a test may change."""
    shutil.copytree(study / "artifacts", tmp_path / "artifacts")
    return tmp_path
