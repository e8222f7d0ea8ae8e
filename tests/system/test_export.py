"""Exported students: a checkpoint that stock transformers opens, and a page of facts read from the artifacts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from launching import run

from sdd.errors import UserError
from sdd.export.checkpoint import export
from sdd.stages.runtime import Runtime
from sdd.stages.student import open_student
from sdd.store import Store


@pytest.fixture(scope="module")
def exported(
    study: Path, manifests: Any, checkpoint: Path, small: list[str], tmp_path_factory: Any
) -> tuple[Path, str]:
    """The tuned student's folder and page, made beside an evaluation of the unpruned model."""
    folder = tmp_path_factory.mktemp("exported")
    shutil.copytree(study / "artifacts", folder / "artifacts")
    outcome = run("evaluate", *small, "pruning=none", "finetune=none", cwd=folder)
    assert outcome.code == 0, outcome.stderr
    runtime = Runtime(sources={manifests["pruned"]["spec"]["model"]: checkpoint})
    made = export(Store(folder / "artifacts"), manifests["tuned"]["address"], folder / "student", runtime)
    return made, (made / "README.md").read_text()


def test_stock_transformers_opens_the_very_same_model(exported: Any, study: Path, manifests: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stock = AutoModelForCausalLM.from_pretrained(exported[0], dtype=torch.float32).eval()
    ours, _ = open_student(study / "artifacts" / "tuned" / manifests["tuned"]["address"], Runtime(), "float32")
    ids = AutoTokenizer.from_pretrained(exported[0])("what is two and two", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.allclose(stock(ids).logits, ours(ids).logits, atol=1e-5)


def test_page_says_what_was_done_and_what_is_left(exported: Any, study: Path, manifests: Any, checkpoint: Path) -> None:
    text = exported[1]
    facts = json.loads((study / "artifacts/pruned" / manifests["pruned"]["address"] / "pruning.json").read_text())
    assert f"# {checkpoint.name} without 2 of 4 blocks" in text
    assert f"{facts['parameters_before']:,} before, {facts['parameters_after']:,} after" in text
    assert "answers that the unpruned model itself rewrote" in text
    assert "12 rows" in text
    results = json.loads(
        (study / "artifacts/evaluated" / manifests["evaluated"]["address"] / "results.json").read_text()
    )
    for name, result in results["tasks"].items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
        assert f"| {result['n']} |" in row
        assert f"{result['value']:.4f}" in row
    assert "| mean |" in text or all(result["value"] == 0 for result in results["tasks"].values())
    assert "That of the base model: see there;" in text


def test_page_repeats_the_command_and_the_config_without_places(exported: Any, checkpoint: Path, study: Path) -> None:
    import yaml
    from huggingface_hub import ModelCard

    text = exported[1]
    assert "python evaluate.py experiment=small" in text
    config = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert config["finetune"]["num_rows"] == 12
    assert config["model"]["path"] == f".../{checkpoint.name}"
    for place in (checkpoint.parent, study, Path.home()):
        assert str(place) not in text
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "other")
    assert data.tags == ["pruned", "self-data-distillation"]


def test_the_bases_licence_is_passed_on(study: Path, manifests: Any, checkpoint: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(checkpoint, tmp_path / "base"))
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: some-terms\nlanguage: en\n---\n# Base\n")
    runtime = Runtime(sources={manifests["pruned"]["spec"]["model"]: base})
    made = export(Store(study / "artifacts"), manifests["pruned"]["address"], tmp_path / "pruned", runtime)
    text = (made / "README.md").read_text()
    assert "license_name: some-terms" in text.split("---")[1]
    assert "some-terms." in text
    assert "nothing was trained afterwards" in text


def test_nothing_half_written_is_left(study: Path, manifests: Any, tmp_path: Path) -> None:
    store = Store(study / "artifacts")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists; name a new folder"):
        export(store, manifests["pruned"]["address"], tmp_path / "there", Runtime())
    with pytest.raises(UserError, match="is no model"):
        export(store, manifests["targets"]["address"], tmp_path / "new", Runtime())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]
