"""Repair from the command line: one cut for both arms, a rebuilt artifact identical, a report that tells them apart."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run
from test_store_commands import Command, command  # noqa: F401
from transformers import AutoModelForCausalLM, Olmo2Config

from sdd.export.checkpoint import export
from sdd.report.arms import build_arms
from sdd.report.collect import collect
from sdd.report.contrasts import compare
from sdd.report.library import Library, find_evaluated
from sdd.stages.__main__ import main as stages
from sdd.stages.runtime import Runtime
from sdd.store import Store

SIZE = ["metric=last", "pruning=n2", "finetune=none"]


@pytest.fixture(scope="module")
def workplace(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both arms pruned and evaluated, one after the other."""
    folder = tmp_path_factory.mktemp("repaired")
    for method in ("none", "ridge"):
        outcome = run("evaluate", *small, *SIZE, f"repair={method}", cwd=folder)
        assert outcome.code == 0, outcome.stderr
    return folder


@pytest.fixture(scope="module")
def arms(workplace: Path) -> dict[str, Path]:
    """The pruned artifact of each arm."""
    folders = {}
    for path in (workplace / "artifacts" / "pruned").iterdir():
        folders["repair" in json.loads((path / "manifest.json").read_text())["spec"]] = path
    return {"none": folders[False], "ridge": folders[True]}


def facts_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "pruning.json").read_text())
    return found


def test_arms_share_the_cut(workplace: Path, arms: dict[str, Path], small: list[str]) -> None:
    manifest = json.loads((arms["ridge"] / "manifest.json").read_text())
    assert manifest["inputs"] == {"pruned": arms["none"].name}
    assert manifest["spec"].keys() == {"model", "repair", "penalty", "dtype", "texts", "max_length"}
    again = run("prune", *small, *SIZE, "repair=ridge", "trainer.inference_batch_size=3", cwd=workplace)
    assert (again.path, again.built) == (arms["ridge"], [])
    cut, repaired = facts_of(arms["none"]), facts_of(arms["ridge"])
    done = repaired.pop("repair")
    assert repaired == cut
    assert (done["method"], done["penalty"], done["num_texts"]) == ("ridge", 1e-4, 6)
    assert [entry["block"] for entry in done["cuts"]] == [1]


def test_plan_knows_both(workplace: Path, arms: dict[str, Path], small: list[str]) -> None:
    outcome = run("prune", *small, *SIZE, "repair=ridge", "repair.penalty=0.5", "dry_run=true", cwd=workplace)
    assert [line.split(" ")[0] for line in outcome.lines] == ["exists", "exists", "would"]
    assert outcome.lines[-1].endswith(f"<- pruned/{arms['none'].name}")


def test_rebuilt_is_identical(
    workplace: Path, arms: dict[str, Path], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = json.loads((arms["ridge"] / "manifest.json").read_text())["spec"]["model"]
    words = ["--artifacts", str(workplace / "artifacts"), "--source", f"{model}={checkpoint}"]
    assert stages(["rerun", arms["ridge"].name, *words]) == 0, capsys.readouterr().out
    assert capsys.readouterr().out == "identical\n"


def test_explain_names_the_repair(workplace: Path, arms: dict[str, Path], command: Command) -> None:  # noqa: F811
    for one, other, values in (("none", "ridge", (None, "ridge")), ("ridge", "none", ("ridge", None))):
        code, out, _ = command(workplace, "explain", arms[one].name, arms[other].name, "--json")
        found = {entry["where"]: (entry["a"], entry["b"]) for entry in json.loads(out)}
        assert code == 0
        assert found["pruned.repair"] == values
        assert found.keys() == {f"pruned.{key}" for key in ("repair", "penalty", "dtype", "texts", "max_length")}


def test_report_tells_the_arms_apart(workplace: Path) -> None:
    root = workplace / "artifacts"
    runs, notes = collect(find_evaluated(root), Library([root]))
    study = compare(build_arms(runs), notes)
    assert {row["arm"] for row in study.rows} == {"pruned", "pruned repair=ridge"}
    (settings,) = [row["settings"] for row in study.rows if "repair" in row["arm"]]
    assert settings["pruning.repair"] == "ridge"
    pairs = {(contrast["a"], contrast["b"]) for contrast in study.contrasts}
    assert pairs == {("pruned repair=ridge", "pruned")}


def test_exported_and_tuned_beside_the_cut(workplace: Path, arms: dict[str, Path], small: list[str]) -> None:
    words = [*small, *SIZE[:2], "repair=ridge", "finetune=sft", "adapter=lora_beside_cut", "finetune.epochs=1"]
    tuned = run("train", *words, cwd=workplace).path
    assert json.loads((tuned / "manifest.json").read_text())["inputs"]["pruned"] == arms["ridge"].name
    store = Store(workplace / "artifacts")
    exported = export(store, arms["ridge"].name, workplace / "exported", Runtime())
    stock, ours = (AutoModelForCausalLM.from_pretrained(folder) for folder in (exported, arms["ridge"]))
    assert all(torch.equal(p, q) for p, q in zip(stock.parameters(), ours.parameters(), strict=True))
    page = (exported / "README.md").read_text()
    assert "without training, the last projection of the MLP before each cut was refitted" in page
    assert f"{facts_of(arms['ridge'])['repair']['cuts'][0]['held_out']['after']:.3f}" in page
    assert "The calibration texts of the repair; nothing was trained afterwards." in page


def test_repair_does_better_on_texts_held_out_of_the_embedded_model(tmp_path: Path) -> None:
    words = ["metric=last", "pruning.size=4", "pruning.start=3", "repair=ridge", "calibration.num_texts=64"]
    (cut,) = facts_of(run("prune", *words, cwd=tmp_path).path)["repair"]["cuts"]
    assert cut["held_out"]["before"] > 0.4
    assert cut["held_out"]["after"] < 0.65 * cut["held_out"]["before"]
    assert cut["fitted"]["after"] <= cut["held_out"]["after"]


def test_a_kind_of_block_that_cannot_be_repaired_is_told_first(
    small: list[str], save_random: Any, sizes: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_random(tmp_path / "olmo", Olmo2Config(**sizes))
    outcome = run("prune", *small, f"model.path={folder}", "repair=ridge", cwd=tmp_path)
    assert outcome.code == 2
    assert len(outcome.errors) == 1
    assert "Olmo2ForCausalLM does not (a norm or a scale behind it" in outcome.errors[0]
    assert not list((tmp_path / "artifacts").glob("[a-z]*"))
