"""Cut, recover, cut again: the first step is that of a study of its own, the second counts from the unpruned model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import Outcome, artifacts_of, run
from omegaconf import DictConfig
from transformers import AutoModelForCausalLM

from sdd.cli.students import quoted
from sdd.export.checkpoint import export
from sdd.report.arms import build_arms
from sdd.report.collect import collect
from sdd.report.library import Library
from sdd.stages import graph
from sdd.stages.__main__ import rerun
from sdd.stages.runtime import Runtime
from sdd.stages.student import open_student, trained_prompts
from sdd.store import Store
from sdd.study import Study

STEP = ["pruning=n1", "finetune=sft", "finetune.epochs=1", "calibration.num_texts=3", "evaluation.tasks=[fact_choice]"]
AFTER = "pruning.after=[finetune.learning_rate=1e-2]"


@pytest.fixture(scope="module")
def cut_twice(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A working directory in which one block went, the student was recovered, and another one went."""
    folder = tmp_path_factory.mktemp("cut_twice")
    outcome = run("evaluate", *small, *STEP, AFTER, cwd=folder)
    assert outcome.code == 0, outcome.stderr
    return folder, outcome


@pytest.fixture(scope="module")
def steps(cut_twice: tuple[Path, Outcome]) -> dict[str, Path]:
    """The folders of the last student, of what it was tuned from, and of the same of the first."""
    root = cut_twice[0] / "artifacts"

    def inputs(folder: Path) -> dict[str, str]:
        found: dict[str, str] = json.loads((folder / "manifest.json").read_text())["inputs"]
        return found

    last = root / "tuned" / inputs(cut_twice[1].path)["model"]
    cut = root / "pruned" / inputs(last)["pruned"]
    first = root / "tuned" / inputs(cut)["student"]
    scores = root / "scores" / inputs(cut)["scores"]
    assert inputs(scores) == {"student": first.name}
    return {
        "last": last,
        "cut": cut,
        "scores": scores,
        "first": first,
        "before": root / "pruned" / inputs(first)["pruned"],
    }


def test_the_first_step_is_that_of_its_own_command(cut_twice: Any, steps: dict[str, Path], small: list[str]) -> None:
    folder, outcome = cut_twice
    stages = ["scores", "pruned", "targets", "tuned", "scores", "pruned", "tuned", "evaluated"]
    assert sorted(name.split("/")[0] for name in outcome.built) == sorted(stages)
    alone = run("train", *small, *STEP, "finetune.learning_rate=1e-2", cwd=folder)
    assert alone.built == [] and alone.path == steps["first"]
    made = json.loads((alone.path / "manifest.json").read_text())
    assert "pruning.after=null" in made["command"] and made["config"]["finetune"]["learning_rate"] == 1e-2


def test_the_second_cut_is_of_the_recovered_student(steps: dict[str, Path], checkpoint: Path) -> None:
    """The student with its adapter, without the block; blocks and parameters count from the unpruned model."""
    facts, earlier = (json.loads((steps[name] / "pruning.json").read_text()) for name in ("cut", "before"))
    (last,) = facts["removed_of_student"]
    assert facts["removed_blocks"] == sorted([*earlier["removed_blocks"], earlier["kept_blocks"][last]])
    assert sorted(facts["kept_blocks"] + facts["removed_blocks"]) == [0, 1, 2, 3]
    assert facts["parameters_before"] == earlier["parameters_before"] > facts["parameters_after"]
    assert facts["flops_saved"] == pytest.approx(2 * earlier["flops_saved"])
    scores = json.loads((steps["scores"] / "scores.json").read_text())
    assert scores["num_blocks"] == 3 and scores["distance"]["1"][last] == min(scores["distance"]["1"]) == facts["score"]
    runtime = Runtime(sources={"m": checkpoint})
    student, _ = open_student(steps["first"], runtime, "float32")
    cut = AutoModelForCausalLM.from_pretrained(steps["cut"], dtype=torch.float32)
    kept = [block for number, block in enumerate(student.model.layers) if number != last]
    for ours, theirs in zip(cut.model.layers, kept, strict=True):
        for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(mine, its, atol=1e-6)
    before = AutoModelForCausalLM.from_pretrained(steps["before"], dtype=torch.float32)
    assert not torch.equal(before.model.layers[0].mlp.up_proj.weight, student.model.layers[0].mlp.up_proj.weight)
    assert trained_prompts(steps["first"]) <= trained_prompts(steps["last"])
    assert not any("folded" in path.name for name in ("cut", "scores") for path in steps[name].rglob("*"))


def test_it_is_rebuilt_exported_and_told(
    cut_twice: Any, steps: dict[str, Path], checkpoint: Path, tmp_path: Path
) -> None:
    store = Store(cut_twice[0] / "artifacts")
    for name in ("cut", "scores"):
        assert rerun(store, steps[name].name, Runtime(inference_batch_size=32)) == []
    made = export(store, steps["last"].name, tmp_path / "made", Runtime(sources={"x": checkpoint}))
    assert AutoModelForCausalLM.from_pretrained(made).config.num_hidden_layers == 2
    page = (made / "README.md").read_text()
    assert "without 2 of 4 blocks" in page and "They went in steps: the last 1 out of a student" in page


def test_report_names_what_was_cut_in_all_and_after_what(cut_twice: Any, small: list[str]) -> None:
    root = cut_twice[0] / "artifacts"
    assert run("evaluate", *small, *STEP, "pruning=n2", cwd=cut_twice[0]).code == 0
    runs, _ = collect(sorted((root / "evaluated").iterdir()), Library([root]))
    once, twice = sorted(build_arms(runs), key=lambda arm: len(arm.name))
    assert {arm.run.pruning for arm in (once, twice)} == {"n2"} and {
        arm.run.blocks_removed for arm in (once, twice)
    } == {2}
    assert once.name == "sft" and twice.name == "sft after=n1 sft"
    assert [arm.seeds for arm in (once, twice)] == [[0], [0]]
    assert twice.run.settings["pruning.after.finetune.learning_rate"] == 1e-2
    assert twice.run.settings["finetune.learning_rate"] == 1e-3


def test_steps_nest_share_and_are_counted(composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    """What the second step is made of is in its key; nothing of it is in the first one's."""

    def study(size: int, before: Study | None = None, **finetune: Any) -> Study:
        config = composed("finetune=sft")
        config.pruning.size, config.pruning.after = size, None if before is None else []
        config.merge_with({"finetune": finetune})
        return Study(config, tmp_path, (), before)

    one = study(1)
    two, other = (study(1, before) for before in (one, study(1, epochs=1)))
    three = study(1, two)
    assert [each.num_blocks for each in (one, two, three)] == [4, 3, 2] and three.others == [one, two]
    recipes = [list(graph.student(each).walk()) for each in (one, two, other, three)]  # type: ignore[union-attr]
    addresses = [[recipe.address for recipe in walk] for walk in recipes]
    assert addresses[1][: len(addresses[0])] == addresses[0] and addresses[3][: len(addresses[1])] == addresses[1]
    assert set(addresses[1]) & set(addresses[2]) == {addresses[0][0], addresses[0][1], addresses[0][2]}
    assert [recipe.stage for recipe in recipes[1]].count("targets") == 1
    with pytest.raises(Exception, match=r"pruning\.size=2 removes all 2 blocks"):
        study(2, two)


def test_a_step_is_written_as_in_yaml() -> None:
    assert quoted("pruning.after=[pruning=n2,a=[1]]") == "pruning.after=[pruning=n2,a=[1]]"  # not YAML's: Hydra's
    assert quoted("pruning.after=null,[],[pruning=n2,seed=1]") == "pruning.after=null,[],['pruning=n2','seed=1']"
    assert quoted("pruning.after=[a=1,'pruning.after=[b=2]']") == "pruning.after=['a=1','pruning.after=[b=2]']"


BAD = {
    "nothing": (
        ["pruning=none", "pruning.after=[pruning=n1]"],
        "pruning.after is a student to cut further, and nothing",
    ),
    "unpruned": (["pruning.after=[pruning=none,finetune=none]"], "pruning.after: it is the unpruned model"),
    "too much": (["pruning.after=[pruning=n3]"], "pruning.size=1 removes all 1 blocks"),
    "value": (["pruning.after=[adapter.rank=0]"], "pruning.after: adapter.rank=0 must be"),
    "group": (["pruning.after=[trainer=gpu]"], "trainer=gpu says nothing of a student"),
    "width": (["pruning.after=[metric=magnitude_width,pruning=mlp20]"], "its channels are cut, and only blocks"),
    "repair": (["pruning.after=[]", "repair=ridge"], "repair=ridge is for the first cut"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_end_in_one_line(name: str, small: list[str], tmp_path: Path) -> None:
    words, message = BAD[name]
    outcome = run("train", *small, *STEP, *words, cwd=tmp_path)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert len(outcome.errors) == 1 and message in outcome.errors[0]
    assert not artifacts_of(tmp_path / "artifacts")
