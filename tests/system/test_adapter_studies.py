"""Every adapter from the command line to an exported checkpoint, and the rebuilt artifact identical."""

import json
from pathlib import Path

import pytest
import torch
from launching import run
from transformers import AutoModelForCausalLM

from sdd.export.checkpoint import main as export
from sdd.stages.__main__ import main as stages

QUICK = ["finetune=sft", "metric=last", "pruning=n1", "finetune.epochs=1"]
ADAPTERS = {
    "lora_beside_cut": ([], "adapter"),
    "lora_last": (["adapter.blocks=2"], "adapter"),
    "head_and_norms": ([], "adapter"),
    "full": (["finetune.learning_rate=1e-4"], "checkpoint"),
    "qlora": ([], "adapter"),
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of artifacts, so that pruning and targets are made once."""
    return tmp_path_factory.mktemp("workplace")


@pytest.mark.parametrize("name", ADAPTERS)
def test_trained_exported_and_made_again(
    name: str, small: list[str], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "qlora":
        pytest.importorskip("bitsandbytes", reason="4-bit bases need bitsandbytes")
    words, kind = ADAPTERS[name]
    outcome = run("train", *small, *QUICK, f"adapter={name}", *words, cwd=workplace)
    tuned = outcome.path
    assert {path.name for path in tuned.iterdir() if path.is_dir()} == {kind}
    manifest = json.loads((tuned / "manifest.json").read_text())
    assert manifest["spec"]["base_quantisation"] == ("nf4" if name == "qlora" else None)
    again = run(
        "train", *small, *QUICK, f"adapter={name}", *words, "trainer.gradient_checkpointing=true", cwd=workplace
    )
    assert again.path == tuned
    assert again.built == [], "how it is computed is no part of what it is"
    artifacts = ["--artifacts", str(workplace / "artifacts")]
    assert export([tuned.name, str(workplace / name), *artifacts]) == 0
    student = AutoModelForCausalLM.from_pretrained(workplace / name)
    base = AutoModelForCausalLM.from_pretrained(workplace / "artifacts" / "pruned" / manifest["inputs"]["pruned"])
    assert (student.config.num_hidden_layers, student.config.tie_word_embeddings) == (3, True)
    changed = [not torch.equal(p, q) for p, q in zip(student.parameters(), base.parameters(), strict=True)]
    assert any(changed)
    assert all(changed) == (name == "full")
    capsys.readouterr()
    assert stages(["rerun", tuned.name, *artifacts]) == 0, capsys.readouterr().out
    assert capsys.readouterr().out == "identical\n"
