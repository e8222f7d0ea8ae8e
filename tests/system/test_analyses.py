"""The analyses as their user asks for them: artifacts that students share, keys, mistakes, and what they hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import run
from omegaconf import DictConfig, OmegaConf

from sdd.cli.app import config_folder
from sdd.stages import graph
from sdd.stages.__main__ import main as stages
from sdd.store import Recipe
from sdd.study import Study

QUICK = ["analysis.max_new_tokens=6", "analysis.repeats=1", "analysis.timed_prompts=1", "analysis.timed_lengths=[2]"]
QUICK += ["analysis.context=16", "analysis.prompt_tokens=8", "analysis.new_tokens=2", "analysis.batch_size=2"]
KINDS = {"speculative": "drafted", "shift": "shifted", "cost": "measured"}


@pytest.fixture(scope="module")
def analysed(small: list[str], study: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each analysis of the study's student printed and built."""
    import shutil

    folder = tmp_path_factory.mktemp("analysed")
    shutil.copytree(study / "artifacts", folder / "artifacts")
    found: dict[str, Any] = {"cwd": folder}
    for kind in KINDS:
        found[kind] = run("evaluate", *small, *QUICK, f"analysis={kind}", "analysis.embedder=null", cwd=folder)
        assert found[kind].code == 0, found[kind].stderr
    return found


def built(outcome: Any) -> list[str]:
    return [name.split("/")[0] for name in outcome.built]


def test_each_analysis_is_an_artifact_and_shares_what_it_can(analysed: dict[str, Any]) -> None:
    for kind, stage in KINDS.items():
        assert analysed[kind].path.parent.name == stage
        assert (analysed[kind].path / "manifest.json").is_file()
    assert built(analysed["speculative"]) == ["answered", "drafted"]
    assert built(analysed["shift"]) == ["answered", "surprisals", "shifted"]  # the unpruned model has answered
    assert built(analysed["cost"]) == ["measured"]


def test_again_is_nothing_new(analysed: dict[str, Any], small: list[str]) -> None:
    again = run("evaluate", *small, *QUICK, "analysis=cost", cwd=analysed["cwd"])
    assert again.built == []
    assert again.path == analysed["cost"].path


def test_numbers_are_those_of_the_prompts(analysed: dict[str, Any]) -> None:
    folder = analysed["speculative"].path
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    result = json.loads((folder / "drafted.json").read_text())
    assert result["prompts"] == len(rows) == 4
    assert result["tokens"] == sum(row["tokens"] for row in rows)
    assert result["acceptance_rate"] == sum(row["matches"].count("1") for row in rows) / result["tokens"]
    assert list(result["lengths"]) == [str(length) for length in range(1, 9)]
    assert 0 < result["sampling_acceptance"] < 1
    timings = json.loads((folder / "timings.json").read_text())
    assert timings["greedy"]["assisted"]["2"]["identical"] == 1.0
    assert set(timings["machine"]) == {"device", "threads", "dtype", "torch"}
    assert timings["predicted_speedup"]["2"]["counted"] == pytest.approx(
        result["lengths"]["2"]["block_efficiency"] / (2 * timings["step_ratio"] + 1)
    )
    shift = json.loads((analysed["shift"].path / "shift.json").read_text())
    assert shift["kl"] > 0 and "similarity" not in shift
    assert sum(shift["targets"]["reasons"].values()) == 140
    assert shift["targets"]["all"]["target"]["nll"] > 0
    costs = json.loads((analysed["cost"].path / "costs.json").read_text())
    assert costs["teacher"]["blocks"] - costs["student"]["blocks"] == 2
    assert costs["adapter_bytes"] > 0


@pytest.mark.parametrize("kind", ["speculative", "shift"])
def test_rerun_is_identical_but_for_the_timings(
    analysed: dict[str, Any], kind: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((analysed[kind].path / "manifest.json").read_text())
    (answers,) = (analysed["cwd"] / "artifacts" / "answered").glob(manifest["inputs"]["answers"])
    model = json.loads((answers / "manifest.json").read_text())["spec"]["model"]
    words = ["rerun", analysed[kind].path.name, "--artifacts", str(analysed["cwd"] / "artifacts")]
    assert stages([*words, "--source", f"{model}={checkpoint}"]) == 0, capsys.readouterr().out


# ---- keys -----------------------------------------------------------------------------------------------------------

Addresses = Callable[..., dict[str, str]]


@pytest.fixture(scope="module")
def addresses(composed: Callable[..., DictConfig], tmp_path_factory: pytest.TempPathFactory) -> Addresses:
    """A function from groups and settings to the address of each stage, the two `answered` apart."""
    memory = tmp_path_factory.mktemp("digests")

    def named(recipe: Recipe) -> str:
        return f"{recipe.stage} by the student" if recipe.stage == "answered" and recipe.inputs else recipe.stage

    def function(*groups: str, **values: Any) -> dict[str, str]:
        config = composed(*groups)
        for name, value in values.items():
            OmegaConf.update(config, f"analysis.{name}", value, force_add=True)
        wanted = graph.wanted(Study(config, memory), "evaluate")
        assert wanted is not None
        return {named(recipe): recipe.address for recipe in wanted.walk()}

    return function


def changed(a: dict[str, str], b: dict[str, str]) -> set[str]:
    return {stage for stage in a.keys() | b.keys() if a.get(stage) != b.get(stage)}


ANSWERS = {"answered", "answered by the student", "drafted", "shifted"}
DTYPE = ANSWERS | {"surprisals", "measured"}
CHANGES: list[tuple[str, Any, set[str]]] = [
    ("num_prompts", 2, ANSWERS),
    ("max_new_tokens", 7, ANSWERS),
    ("dtype", "bfloat16", DTYPE),
    ("temperature", 0.5, {"drafted"}),
    ("draft_lengths", [3, 4], {"drafted"}),
    ("timed_lengths", [2], {"drafted"}),
    ("timed_prompts", 2, {"drafted"}),
    ("repeats", 5, {"drafted", "measured"}),
    ("context", 99, {"measured"}),
    ("prompt_tokens", 99, {"measured"}),
    ("new_tokens", 99, {"measured"}),
    ("batch_size", 99, {"measured"}),
]


@pytest.mark.parametrize(("key", "value", "expected"), CHANGES, ids=[change[0] for change in CHANGES])
def test_settings_in_the_keys(key: str, value: Any, expected: set[str], addresses: Addresses) -> None:
    for kind in KINDS:
        group = f"analysis={kind}"
        stages_there = set(addresses(group, embedder=None))
        found = changed(addresses(group, embedder=None), addresses(group, embedder=None, **{key: value}))
        assert found == expected & stages_there
    assert changed(addresses(), addresses(**{key: value})) == set()


def test_machines_and_timings_are_no_part_of_a_key(addresses: Addresses) -> None:
    for kind in KINDS:
        assert addresses(f"analysis={kind}", embedder=None) == addresses(
            f"analysis={kind}", "trainer=gpu", embedder=None
        )
    plain = addresses("analysis=speculative", repeats=0)
    assert plain == addresses("analysis=speculative", repeats=0, timed_lengths=[1], timed_prompts=3)


def test_arms_share_the_answers_of_the_unpruned_model(addresses: Addresses) -> None:
    arms = [addresses("analysis=speculative", f"finetune={mode}") for mode in ("sft", "self_distill", "none")]
    assert len({arm["answered"] for arm in arms}) == 1
    assert len({arm["drafted"] for arm in arms}) == 3
    other = addresses("analysis=speculative", "+dataset@analysis.prompts=tiny_instruct", num_prompts=3)
    assert changed(other, addresses("analysis=speculative", num_prompts=3)) == {"answered", "drafted"}
    assert "surprisals" not in addresses("analysis=shift", "finetune=none", embedder=None)


# ---- mistakes -------------------------------------------------------------------------------------------------------

MISTAKES = {
    "analysis=speculative pruning=none finetune=none": "analysis=speculative compares a student with",
    "analysis=shift analysis.embedder=null analysis.num_prompts=5": "finetune.validation_rows=4 are held out",
    "analysis=cost analysis.repeats=-1": "analysis.repeats=-1 must be an integer of at least 0",
    "analysis=speculative analysis.draft_lengths=[0]": "analysis.draft_lengths=[0] must be tokens to draft",
    "analysis=speculative analysis.timed_lengths=[9]": "analysis.timed_lengths must be among analysis.draft_lengths",
    "analysis.kind=speed": "analysis.kind=speed is unknown; choose one of none, speculative, shift, cost",
    "analysis=speculative finetune.validation_rows=0": "finetune.validation_rows=0 holds no prompt out",
    "analysis=speculative +dataset@analysis.prompts=tiny_math analysis.num_prompts=3 analysis.prompts.num_rows=2": (
        "analysis.num_prompts=3, but the dataset has 2 rows"
    ),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_told_before_any_work(words: str, small: list[str], tmp_path: Path) -> None:
    outcome = run("evaluate", *small, *words.split(" "), cwd=tmp_path)
    assert outcome.code == 2
    assert len(outcome.errors) == 1 and MISTAKES[words] in outcome.errors[0]
    assert not list((tmp_path / "artifacts").glob("[a-z]*"))


def test_dry_run_plans_an_analysis(small: list[str], tmp_path: Path) -> None:
    for kind, stage in KINDS.items():
        outcome = run("evaluate", *small, f"analysis={kind}", "analysis.embedder=null", "dry_run=true", cwd=tmp_path)
        assert outcome.code == 0, outcome.stderr
        assert stage in outcome.lines[-1]
        assert not (tmp_path / "artifacts" / stage).exists()


def test_every_option_of_the_group_says_what_it_is() -> None:
    assert {path.stem for path in (config_folder() / "analysis").glob("*.yaml")} == {"none", *KINDS}
