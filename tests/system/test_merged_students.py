"""Merging through the scripts: students are reused, the merged one is evaluated, exported, explained and rebuilt."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import Outcome, artifacts_of, run
from omegaconf import DictConfig, OmegaConf

from sdd.cli.students import quoted
from sdd.export.checkpoint import export
from sdd.models.checkpoints import Checkpoint, save_model
from sdd.report.arms import build_arms
from sdd.report.collect import collect
from sdd.report.library import Library
from sdd.stages import merged as merged_stage
from sdd.stages.__main__ import rerun
from sdd.stages.runtime import Runtime
from sdd.stages.sizes import Sizes
from sdd.store import Recipe, Store
from sdd.store.__main__ import differences
from sdd.study import Study

PAIR = "merge.students=[[seed=0],[seed=1]]"


@pytest.fixture(scope="module")
def merged(study: Path, small: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A working directory in which the study's student was merged with another and evaluated."""
    folder = tmp_path_factory.mktemp("merged")
    shutil.copytree(study / "artifacts", folder / "artifacts")
    outcome = run("evaluate", *small, "merge=slerp", PAIR, cwd=folder)
    assert outcome.code == 0, outcome.stderr
    return folder, outcome


@pytest.fixture(scope="module")
def record(merged: tuple[Path, Outcome]) -> tuple[Path, dict[str, Any]]:
    (folder,) = (merged[0] / "artifacts" / "merged").iterdir()
    return folder, json.loads((folder / "merging.json").read_text())


def test_students_are_those_of_their_own_commands(merged: Any, manifests: Any, small: list[str], record: Any) -> None:
    folder, outcome = merged
    built = [name.split("/")[0] for name in outcome.built]
    assert sorted(built) == ["evaluated", "merged", "tuned"]
    again = run("train", *small, "seed=1", cwd=folder)
    assert again.built == []
    students = json.loads((record[0] / "manifest.json").read_text())["inputs"]
    assert students == {"student0": manifests["tuned"]["address"], "student1": again.path.name}
    made = json.loads((again.path / "manifest.json").read_text())
    assert made["command"] == "python train.py experiment=small seed=1"
    assert made["config"]["seed"] == 1


def test_what_was_measured_is_written_down_and_said(merged: Any, record: Any, manifests: Any) -> None:
    folder, facts = record
    assert (facts["method"], facts["t"], facts["space"], facts["dtype"]) == ("slerp", 0.5, "weights", "float32")
    assert facts["base"] == manifests["pruned"]["address"]
    assert len(facts["tensors"]) == 14 and "model.embed_tokens.weight" in facts["copied"]
    found = facts["angles"]["weights"]
    assert 0 < found["median"] <= found["max"] < 0.03 and found["nearly_parallel"] == found["measured"] == 14
    assert facts["angles"]["task_vectors"]["median"] > 0.1
    assert "14 of 14 tensors are nearly parallel, where SLERP is a linear interpolation" in facts["note"]
    assert facts["note"] in merged[1].stderr
    results = json.loads((merged[1].path / "results.json").read_text())
    assert results["model"] == {"kind": "merged", "address": folder.name}


def test_it_is_rebuilt_exported_and_opened(record: Any, merged: Any, checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    store = Store(merged[0] / "artifacts")
    assert rerun(store, record[0].name, Runtime()) == []
    assert AutoModelForCausalLM.from_pretrained(record[0]).config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(record[0])("two")["input_ids"]
    page = (
        export(store, record[0].name, tmp_path / "made", Runtime(sources={"x": checkpoint})) / "README.md"
    ).read_text()
    assert "2 students of the pruned model were merged by slerp (t 0.5, space weights)" in page
    assert page.count("12 rows, ") == 2 and "## Student 0" in page and "## Student 1" in page
    assert page.count("seed 0.") == page.count("seed 1.") == 1 and "merge=slerp" in page


def test_report_has_an_arm_of_it(merged: Any) -> None:
    root = merged[0] / "artifacts"
    runs, _ = collect(sorted((root / "evaluated").iterdir()), Library([root]))
    (arm,) = [arm for arm in build_arms(runs) if arm.mode == "merged"]
    assert (arm.run.merge, arm.run.finetune, arm.run.pruning) == ("slerp", "self_distill", "n2")
    assert arm.run.settings["merge.t"] == 0.5


def test_what_is_in_the_key(composed: Callable[..., DictConfig], record: Any, tmp_path: Path) -> None:
    def address(method: str, seeds: tuple[int, int] = (0, 1), **values: Any) -> str:
        config = composed(f"merge={method}")
        for key, value in values.items():
            OmegaConf.update(config, f"merge.{key}", value, force_add=True)
        students = [Study(composed(f"seed={seed}"), tmp_path) for seed in seeds]
        return merged_stage.recipe(Study(config, tmp_path, students)).address

    plain = address("slerp")
    assert plain == record[0].name
    others = [
        address("slerp", (1, 0)),
        address("slerp", t=0.4),
        address("slerp", t=[0.4, 0.4]),
        address("slerp", t={"self_attn": 0.4}),
        address("slerp", space="task_vectors"),
        address("ties"),
        address("ties", density=0.3),
        address("linear"),
        address("task_arithmetic"),
        address("linear", weights=[1.0, 2.0]),
    ]
    assert len({plain, *others}) == 11
    assert address("linear", weights=[1, 1]) == others[7]


def test_dtype_is_in_the_key_where_students_are_opened_wider(
    composed: Callable[..., DictConfig], checkpoint: Path, tmp_path: Path
) -> None:
    """Of 2 of 4 blocks in bfloat16; its estimate counts what is stored."""
    half = tmp_path / "half"
    save_model(Checkpoint(checkpoint).model("bfloat16"), half, Checkpoint(checkpoint))

    def merged(path: Path, dtype: str) -> tuple[Recipe, float]:
        words = [f"model.path={path}", f"model.dtype={dtype}"]
        students = [Study(composed(*words, f"seed={seed}"), tmp_path) for seed in (0, 1)]
        study = Study(composed("merge=slerp", *words), tmp_path, students)
        recipe = merged_stage.recipe(study)
        return recipe, merged_stage.estimate(Sizes(study), recipe).disk

    settings = {"method": "slerp", "t": 0.5, "space": "weights"}
    (wider, wide), (kept, narrow) = merged(half, "float32"), merged(half, "bfloat16")
    assert wider.spec == settings | {"dtype": "float32"} and kept.spec == settings
    assert wide == 2 * narrow > 0
    assert merged(half, "float16")[0].spec == settings  # as many bytes, other numbers
    assert merged(checkpoint, "float32")[0].spec == merged(checkpoint, "bfloat16")[0].spec == settings


def test_a_dry_run_names_every_student(merged: Any, small: list[str], record: Any) -> None:
    outcome = run("train", *small, "dry_run=true", "merge=slerp", PAIR, cwd=merged[0])
    assert [line.split()[1].split("/")[0] for line in outcome.lines].count("tuned") == 2
    assert outcome.lines[-1].split()[:2] == ["exists", f"merged/{record[0].name}"]


def test_explanation_names_the_student(merged: Any, small: list[str], record: Any) -> None:
    outcome = run("train", *small, "merge=task_arithmetic", PAIR, cwd=merged[0])
    found = list(differences(Store(merged[0] / "artifacts"), record[0].name, outcome.path.name))
    assert {one["where"] for one in found} == {"merged.method", "merged.t", "merged.space", "merged.weights"}
    assert [name.split("/")[0] for name in outcome.built] == ["merged"]


BAD = {
    "one": ("merge=linear", "[[seed=0]]", "merge=linear needs at least two students, merge.students has 1"),
    "three": ("merge=slerp", "[[seed=0],[seed=1],[seed=2]]", "merge=slerp needs exactly two students"),
    "same": ("merge=slerp", "[[seed=0],[finetune=self_distill]]", "[1] is the same student as [0]"),
    "base": ("merge=slerp", "[[seed=0],[pruning=n1]]", "merge students of one base"),
    "untuned": ("merge=slerp", "[[seed=0],[finetune=none]]", "merge.students[1]: finetune=none tunes nothing"),
    "value": ("merge=slerp", "[[seed=0],[adapter.rank=0]]", "merge.students[1]: adapter.rank=0 must be"),
    "group": ("merge=slerp", "[[seed=0],[trainer=gpu]]", "trainer=gpu says nothing of a student"),
    "code": ("merge=slerp", "[[seed=0],[metric._target_=os.system]]", "os.system is not one of this project's parts"),
    "t": ("merge=slerp merge.t=1.5", "[[seed=0],[seed=1]]", "merge.t=1.5 must lie between 0 and 1"),
    "kind": ("merge=slerp merge.t={chess:1}", "[[seed=0],[seed=1]]", "merge.t: no kind of tensor chess"),
    "not its own": ("merge=ties merge.t=0.5", "[[seed=0],[seed=1]]", "merge.t does not belong to merge.method=ties"),
    "weights": ("merge=ties merge.weights=[1]", "[[seed=0],[seed=1]]", "one number for each of the 2 students"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_end_in_one_line(name: str, small: list[str], tmp_path: Path) -> None:
    words, students, message = BAD[name]
    outcome = run("train", *small, *words.split(), f"merge.students={students}", cwd=tmp_path)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert len(outcome.errors) == 1 and message in outcome.errors[0]
    assert not artifacts_of(tmp_path / "artifacts")


def test_students_are_written_as_in_yaml() -> None:
    assert quoted("merge.students=[[a=1,b=[2]]]") == "merge.students=[[a=1,b=[2]]]"  # not YAML's: Hydra's to refuse
    assert quoted("merge.students=[[dataset=x],['seed=1']]") == "merge.students=[['dataset=x'],['seed=1']]"
    assert quoted("merge.students=[[a=1],[b=2]],[[c=3],[]]") == "merge.students=[['a=1'],['b=2']],[['c=3'],[]]"
    assert quoted("seed=1") == "seed=1" and quoted("-m") == "-m"
