"""Criteria that look at the model itself, as their user meets them: jobs that share scores, and what each leaves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import Outcome, artifacts_of, job, run
from omegaconf import DictConfig

from sdd.stages.__main__ import main as stages

METRICS = ["taylor", "magnitude", "perplexity", "iterative"]


@pytest.fixture(scope="module")
def swept(composed: Callable[..., DictConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every criterion has cut two sizes, and a greedy removal by task one."""
    folder = tmp_path_factory.mktemp("criteria")

    def pruned(*words: str) -> Outcome:
        outcome = job("prune", composed(*words, f"paths.artifacts={folder / 'artifacts'}"), folder / " ".join(words))
        assert outcome.code == 0, outcome.stderr
        return outcome

    outcomes = [pruned(f"metric={metric}", f"pruning={size}") for metric in METRICS for size in ("n1", "n2")]
    assert len({outcome.path for outcome in outcomes}) == 2 * len(METRICS)
    assert len(list((folder / "artifacts" / "scores").iterdir())) == len(METRICS)
    pruned("metric=greedy", "metric.by=task", "pruning=n2", "finetune=none")
    return folder


def found(folder: Path) -> dict[str, tuple[dict, dict[str, Any]]]:
    """By metric: the manifest and the scores of its artifact."""
    manifests = [m for m in artifacts_of(folder / "artifacts").values() if m["stage"] == "scores"]
    tables = [
        json.loads((folder / "artifacts" / "scores" / m["address"] / "scores.json").read_text()) for m in manifests
    ]
    return {table["metric"]: (m, table) for m, table in zip(manifests, tables, strict=True)}


def test_every_criterion_leaves_a_table_an_order_and_a_picture(swept: Path) -> None:
    assert set(found(swept)) == {*METRICS, "greedy"}
    for metric, (manifest, scores) in found(swept).items():
        assert scores["num_blocks"] == 4
        assert scores["num_texts"] == (0 if metric == "magnitude" else 6)
        assert [len(scores["distance"][str(n)]) for n in (1, 2, 3)] == [4, 3, 2]
        assert sorted(scores["order"]) == sorted(set(scores["order"]))
        assert len(scores["order"]) == (3 if "steps" in scores else 4)
        assert set(manifest["files"]) == {"scores.json", "scores.png"}


def test_sizes_are_prefixes_of_one_order(swept: Path) -> None:
    orders = {manifest["address"]: scores["order"] for manifest, scores in found(swept).values()}
    pruned = [m for m in artifacts_of(swept / "artifacts").values() if m["stage"] == "pruned"]
    assert len(pruned) == 2 * len(METRICS) + 1
    for manifest in pruned:
        facts = json.loads((swept / "artifacts" / "pruned" / manifest["address"] / "pruning.json").read_text())
        assert facts["removed_blocks"] == sorted(orders[manifest["inputs"]["scores"]][: facts["size"]])


def test_a_task_is_scored_on_rows_and_never_on_evaluation_items(swept: Path) -> None:
    manifest, scores = found(swept)["greedy"]
    spec = manifest["spec"]
    assert spec["dataset"]["_target_"] == "sdd.data.tiny.TinyTasks"
    assert spec["num_rows"] == 6
    assert "texts" not in spec
    for step in scores["steps"]:
        assert len(step["scores"]) == len(step["log_perplexity"]) == 4


@pytest.mark.parametrize("metric", ["taylor", "magnitude", "greedy"])
def test_rerun_is_identical(metric: str, swept: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, _ = found(swept)[metric]
    source = f"--source={manifest['spec']['model']}={checkpoint}"
    assert stages(["rerun", manifest["address"], "--artifacts", str(swept / "artifacts"), source]) == 0
    assert capsys.readouterr().out == "identical\n"


def test_rows_that_are_all_too_long_are_told(small: list[str], tmp_path: Path) -> None:
    words = ["metric=greedy", "metric.by=task", "calibration.max_length=5"]
    outcome = run("prune", *small, *words, cwd=tmp_path)
    assert outcome.code == 2
    assert outcome.errors == [
        "error: calibration.max_length=5: all 6 rows of the dataset are longer; raise calibration.max_length"
    ]
    assert not list((tmp_path / "artifacts").glob("[a-z]*"))
