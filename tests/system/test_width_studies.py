"""Narrower MLPs from the command line to an exported checkpoint and its page, alone and after removed blocks."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import Outcome, artifacts_of, files_of, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdd.export.checkpoint import main as export
from sdd.export.model_card import model_card
from sdd.importance import sample_gradients
from sdd.stages import scores
from sdd.stages.runtime import Runtime
from sdd.stages.student import open_student
from sdd.store import Store

QUICK = ["finetune=sft", "finetune.epochs=1"]
CUTS = {
    "channels": ["metric=sdm", "pruning=mlp20"],
    "blocks and channels": [
        *("metric=angular", "metric@width_metric=activation_width"),
        *("pruning.size=1", "pruning.ratio=0.3", "pruning.ratio_of=mlp", "pruning.multiple=1"),
    ],
}
SHAPES = {"channels": (4, 16), "blocks and channels": (3, 34)}
"""Blocks and channels left of 4 and 48. 20% of all 55,584 weights are 28.9 channels (of 3 * 32 in 4 blocks); the
multiple of 8 nearest to the 19.1 others is 16. 30% of the MLPs' are 14.4 channels of 48."""
REMOVED = {
    "channels": [
        "with 16 of 48 MLP channels",
        "by removing channels of every MLP.",
        "32 of the 48 channels of every remaining block's MLP (66.7% of the MLPs' weights), chosen by sdm: "
        "intermediate_size is 16.",
        "Parameters: 55,584 before, 43,296 after (22.11% removed).",  # 32 * 384 of them
    ],
    "blocks and channels": [
        "without 1 of 4 blocks and with 34 of 48 MLP channels",
        "by removing whole transformer blocks and channels of every MLP.",
        " of 0 to 3, chosen by angular.",
        "14 of the 48 channels of every remaining block's MLP (29.2% of the MLPs' weights), chosen by "
        "activation_width: intermediate_size is 34.",
        "Parameters: 55,584 before, 43,808 after (21.19% removed).",  # 7,744 of a block, 14 * 96 of each other
    ],
}
"""What the page says was removed."""


@dataclass(frozen=True)
class Student:
    cut: str
    outcome: Outcome
    manifests: dict[str, dict[str, Any]]
    artifacts: Path
    exported: Path

    def folder(self, stage: str) -> Path:
        return self.artifacts / stage / self.manifests[stage]["address"]

    @property
    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder("pruned") / "pruning.json").read_text())
        return found


@pytest.fixture(scope="module", params=CUTS)
def student(request: Any, small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Student:
    """Cut, tuned, evaluated and exported."""
    folder = tmp_path_factory.mktemp("narrowed")
    outcome = run("evaluate", *small, *QUICK, *CUTS[request.param], cwd=folder)
    evaluated = json.loads((outcome.path / "manifest.json").read_text())
    found = {manifest["address"]: manifest for manifest in artifacts_of(folder / "artifacts").values()}
    tuned = found[evaluated["inputs"]["model"]]
    manifests = {"evaluated": evaluated, "tuned": tuned, "pruned": found[tuned["inputs"]["pruned"]]}
    words = [tuned["address"], str(folder / "student"), "--artifacts", str(folder / "artifacts")]
    assert export(words) == 0
    return Student(request.param, outcome, manifests, folder / "artifacts", folder / "student")


def test_every_stage_was_made_of_the_narrow_model(student: Student) -> None:
    blocks, width = SHAPES[student.cut]
    cuts = {"channels": ["scores", "scores", "pruned"], "blocks and channels": ["scores", "pruned"] * 2}
    stages = [built.split("/")[0] for built in student.outcome.built]
    assert sorted(stages) == sorted([*cuts[student.cut], "targets", "tuned", "evaluated"])
    adapter = load_file(student.folder("tuned") / "adapter" / "adapter_model.safetensors")
    trained = {tuple(weight.shape) for name, weight in adapter.items() if "down_proj.lora_A" in name}
    assert trained == {(2, width)}
    assert sum("down_proj.lora_B" in name and bool(weight.any()) for name, weight in adapter.items()) == blocks
    results = json.loads((student.outcome.path / "results.json").read_text())
    assert results["model"] == {"kind": "tuned", "address": student.manifests["tuned"]["address"]}
    assert {name: task["n"] for name, task in results["tasks"].items()} == {"arithmetic": 3, "fact_choice": 3}


def test_stock_transformers_opens_the_very_same_model(student: Student) -> None:
    blocks, width = SHAPES[student.cut]
    stock = AutoModelForCausalLM.from_pretrained(student.exported, dtype=torch.float32).eval()
    assert (stock.config.num_hidden_layers, stock.config.intermediate_size) == (blocks, width)
    stored = load_file(student.exported / "model.safetensors")
    for block in range(blocks):
        shapes = [tuple(stored[f"model.layers.{block}.mlp.{n}_proj.weight"].shape) for n in ("gate", "up", "down")]
        assert shapes == [(width, 32), (width, 32), (32, width)]
    ours, _ = open_student(student.folder("tuned"), Runtime(), "float32")
    cut = AutoModelForCausalLM.from_pretrained(student.folder("pruned"), dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(student.exported)("what is two and two", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = stock(ids).logits
        assert torch.allclose(found, ours(ids).logits, atol=1e-5)
        assert not torch.allclose(found, cut(ids).logits, atol=1e-3), "training changed nothing"


def test_page_says_what_was_cut_and_by_which_criterion(student: Student) -> None:
    text = (student.exported / "README.md").read_text()
    for said in REMOVED[student.cut]:
        assert said in text
    assert f"{student.facts['parameters_after']:,} after" in text
    assert "the dataset's own reference answers" in text


def test_the_uncut_model_is_passed_once_for_all_ratios(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SDMPrune's second stage reads what the first passed in this process, and says the same without it."""
    passed, original = list[int](), sample_gradients._states
    monkeypatch.setattr(sample_gradients, "_states", lambda *given: passed.append(1) or original(*given))
    ratios = [["metric=sdm", "pruning=mlp20", f"pruning.ratio={ratio}"] for ratio in (0.1, 0.2)]
    for words in ratios:
        assert run("prune", *small, *words, cwd=tmp_path / "shared").code == 0
    assert passed == []
    monkeypatch.setattr(scores, "_final_states", lambda *given: None)
    for words in ratios:
        assert run("prune", *small, *words, cwd=tmp_path / "apart").code == 0
    assert passed
    assert files_of(tmp_path / "shared" / "artifacts") == files_of(tmp_path / "apart" / "artifacts")


def test_page_knows_no_criterion_of_blocks_that_were_named(small: list[str], tmp_path: Path) -> None:
    words = ["pruning.blocks=[1]", "metric=random_width", "pruning.ratio=0.3", "pruning.ratio_of=mlp"]
    cut = run("prune", *small, *words, cwd=tmp_path).path
    text = model_card(Store(tmp_path / "artifacts"), cut, Runtime())
    assert "\nBlocks 1 of 0 to 3. 16 of the 48 channels" in text
    assert "weights), chosen by random_width: intermediate_size is 32." in text
