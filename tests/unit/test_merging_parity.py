"""The same two students, exported in full, merged here and by mergekit 0.1.5: within one bfloat16 step.

    SDD_MERGEKIT_PYTHON=/path/to/its/bin/python pytest -m peer tests/unit/test_merging_parity.py

It has an environment of its own: pip install torch==2.13.0 mergekit==0.1.5.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdd.merging.streaming import merge_checkpoints
from sdd.merging.students import open_students
from sdd.models.checkpoints import Checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from merging import compared, make_adapter, make_base, mergekit_command, mergekit_config

PYTHON = os.environ.get("SDD_MERGEKIT_PYTHON")
pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(PYTHON is None, reason="SDD_MERGEKIT_PYTHON names no python of an environment with mergekit"),
]
METHODS: list[dict[str, Any]] = [
    {"method": "slerp", "t": 0.3, "space": "weights"},
    {"method": "linear", "weights": [1.0, 3.0]},
    {"method": "task_arithmetic", "weights": [0.7, 0.4]},
    {"method": "ties", "weights": [1.0, 1.0], "density": 0.3},
]


@pytest.fixture(scope="module", params=[0.005, 0.2], ids=["light", "heavy"])
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base and two students in full, float32; nearly parallel ones, and ones far apart."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("pair")
    make_base(folder / "base", 128, 2, 500)
    full = []
    for seed in (0, 1):
        make_adapter(folder / "base", folder / str(seed), seed, request.param)
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        merged = PeftModel.from_pretrained(model, str(folder / str(seed) / "adapter")).merge_and_unload()
        full.append(folder / f"full{seed}")
        merged.save_pretrained(full[-1])
    return folder / "base", full


@pytest.mark.parametrize("method", METHODS, ids=lambda method: str(method["method"]))
def test_merges_are_those_of_mergekit(method: dict, pair: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, students = pair
    (tmp_path / "ours").mkdir()
    facts = merge_checkpoints(Checkpoint(base), open_students(students), method, tmp_path / "ours")
    assert len(facts["tensors"]) == 14
    assert PYTHON is not None
    command = mergekit_command(Path(PYTHON), mergekit_config(method, base, students, "float32"), tmp_path / "theirs")
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    found = compared(tmp_path / "ours", tmp_path / "theirs")
    if method["method"] == "ties":  # of entries equal to the threshold mergekit keeps some, here all are kept
        assert found["share_beyond_one"] < 1e-5, found
    else:
        assert found["largest_steps"] <= 1, found
    assert found["share_differing"] < 1e-3
    assert found["tensors"] == 20
