"""Every option of every config group composes, names classes that take its settings, and passes the checks."""

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode
from hydra.utils import get_object
from launching import REPOSITORY, run
from omegaconf import DictConfig, OmegaConf

from sdd.cli.loader import config_folder, own_loader
from sdd.config import check_values
from sdd.config.allowed import ALLOWED_PLUGINS, build, check_targets
from sdd.config.nodes import quick_nodes
from sdd.config.parts import PLACES, SWEEP_END, maker_of
from sdd.models.chats import REWRITE_TEMPLATE
from sdd.study import calibration, rows

CONF = REPOSITORY / "conf"
LAUNCHER = "hydra/launcher"


def group_of(place: str) -> str:
    """The group that an option in this folder is chosen in."""
    return LAUNCHER if place == LAUNCHER else place.split("/")[0]


OPTIONS = sorted(
    (place, path.relative_to(CONF / group_of(place)).with_suffix(""))
    for path in CONF.rglob("*.yaml")
    if (place := str(path.parent.relative_to(CONF))) != "."
)
EXPERIMENTS = [str(option) for group, option in OPTIONS if group.split("/")[0] == "experiment"]
CHOICES: dict[str, list[str]] = {}
for group, option in OPTIONS:
    if group.split("/")[0] != "experiment":
        CHOICES.setdefault(group, []).append(str(option))
NEEDS = {
    ("model", "local"): ["model.path=somewhere"],
    ("calibration", "local"): ["calibration.path=texts.jsonl"],
    ("dataset", "local"): ["dataset.path=rows.jsonl"],
    ("engine", "openai"): ["engine.model=theirs"],
    ("trainer", "fsdp"): ["trainer.devices=2"],
    **{
        ("merge", method): ["merge.students=[['seed=1'],['seed=2']]"]
        for method in ("slerp", "linear", "task_arithmetic", "ties")
    },
}
GROUPS = {
    *("model", "metric", "calibration", "pruning", "dataset", "finetune", "adapter", "engine", "merge", "evaluation"),
    *("repair", "analysis", "trainer", "logger", "settings", "experiment", LAUNCHER),
}
LEFT_OUT = {"dataset": rows.OF_RECIPES, "calibration": calibration.OF_RECIPES}
"""Settings of these two that their constructors are not told."""
MADE_OF_OTHERS = {"sdd.data.mixture.Mixture", "sdd.data.texts.DatasetTexts"}
"""What is given sources instead of settings."""
ADDED = {"logger": {"id": "a", "name": "n", "save_dir": "d", "config": {}}}


TURNS = [
    [(group, options[turn]) for group, options in CHOICES.items() if turn < len(options)]
    for turn in range(max(map(len, CHOICES.values())))
]
TURNS += [[("experiment", study)] for study in EXPERIMENTS]
"""Every option once: several groups at a time, whose options say nothing of each other; studies alone."""


@pytest.fixture(scope="module")
def composed() -> Callable[..., DictConfig]:
    """A function from overrides to the composed config, `hydra` node included; composed once each."""
    made: dict[tuple[str, ...], DictConfig] = {}
    loader = own_loader()

    def function(*overrides: str) -> DictConfig:
        if overrides not in made:
            made[overrides] = loader.load_configuration("config", list(overrides), RunMode.RUN)
        return made[overrides].copy()

    return function


def targets(node: Any, path: tuple = ()) -> Iterator[tuple[tuple, dict]]:
    """Every mapping with a `_target_`, and where it stands."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, (*path, key))


def assert_bound(path: tuple, node: dict) -> None:
    name = node["_target_"]
    assert name in (
        ALLOWED_PLUGINS if path[0] == "hydra" and path[1] != "callbacks" else PLACES.keys() | {SWEEP_END}
    ), name
    given = {key: value for key, value in node.items() if not key.startswith("_")}
    if name in MADE_OF_OTHERS or path == ("hydra", "launcher"):  # a launcher takes whatever it is given: test_cluster
        return
    if path[0] in LEFT_OUT:
        given = {key: value for key, value in given.items() if key not in LEFT_OUT[path[0]] and value is not None}
        if not given["hub"]["repository"]:
            del given["hub"]
    inspect.signature(maker_of(name) if name in PLACES else get_object(name)).bind(**given, **ADDED.get(path[0], {}))


def test_configs_in_use_are_those_of_the_checkout() -> None:
    assert config_folder() == CONF


def test_every_file_is_an_option_that_hydra_lists() -> None:
    loader = ConfigLoaderImpl(create_config_search_path(str(config_folder())))
    listed = {(group, option) for group in {g for g, _ in OPTIONS} for option in loader.get_group_options(group)}
    plugins = {(LAUNCHER, name) for name in ("basic", "joblib", "submitit_local", "submitit_slurm")}
    assert listed - plugins == {(group, option.name) for group, option in OPTIONS}
    assert len(OPTIONS) == len(list(CONF.rglob("*.yaml"))) - 1
    assert {group_of(place) for place, _ in OPTIONS} == GROUPS


def test_every_option_has_a_turn() -> None:
    assert sorted(choice for turn in TURNS for choice in turn) == sorted(
        (group_of(place), str(option)) for place, option in OPTIONS
    )


def assert_sound(config: DictConfig) -> None:
    """Its targets are allowed and take the settings that stand beside them; its values pass the checks."""
    check_targets(config)
    with_hydra = OmegaConf.to_container(config, resolve=False)
    assert isinstance(with_hydra, dict)
    plugins = with_hydra.pop("hydra")
    found = list(targets(OmegaConf.to_container(OmegaConf.masked_copy(config, list(with_hydra)), resolve=True)))
    found += [(("hydra", *path), node) for path, node in targets(plugins)]
    assert {path[0] for path, _ in found} >= {"metric", "calibration", "dataset", "engine", "hydra"}
    for path, node in found:
        assert_bound(path, node)
    del config.hydra
    check_values(config)
    assert build(config.metric).name
    assert build(config.engine).spec()["kind"]


@pytest.mark.parametrize("turn", TURNS, ids=lambda turn: " ".join(f"{group}-{option}" for group, option in turn))
def test_options_compose_and_bind(turn: list[tuple[str, str]], composed: Any) -> None:
    config = composed(*(word for choice in turn for word in ("=".join(choice), *NEEDS.get(choice, []))))
    chosen = config.hydra.runtime.choices
    assert {group: chosen[group] for group, _ in turn} == dict(turn)
    assert_sound(config)


STUDIES = {"cell", "main_table", "metrics", "calibration", "scaling", "adapters"}


def test_every_study_of_the_paper_composes_with_every_option_it_sweeps_over(composed: Any) -> None:
    studies = [option for group, option in OPTIONS if group == "experiment/paper"]
    assert {option.name for option in studies} == STUDIES
    for option in studies:
        header = (CONF / "experiment" / f"{option}.yaml").read_text()
        assert f"experiment={option}" in header and "Costs" in header
        config = composed(f"experiment={option}")
        swept = {key: _split(values) for key, values in (config.hydra.sweeper.params or {}).items()}
        assert_sound(config)
        for turn in range(max(map(len, swept.values()), default=0)):  # every option once, several of them together
            chosen = composed(
                f"experiment={option}", *(f"{key}={v[min(turn, len(v) - 1)]}" for key, v in swept.items())
            )
            assert_sound(chosen)
    table = composed("experiment=paper/main_table").hydra.sweeper.params
    assert [len(_split(table[key])) for key in ("model", "pruning", "dataset", "finetune")] == [2, 5, 4, 3]


ABLATIONS = {
    *("base", "rows", "size", "metric", "calibration", "adapter", "learning_rate", "epochs", "tries", "selection"),
    *("gold_share", "template", "teacher", "reference_free", "noise", "logit_distill"),
}


def test_every_ablation_composes_with_every_option_it_sweeps_over_on_dev(composed: Any) -> None:
    ablations = [option for group, option in OPTIONS if group == "experiment/ablations"]
    assert {option.name for option in ablations} == ABLATIONS
    for option in ablations:
        header = (CONF / "experiment" / f"{option}.yaml").read_text()
        assert f"experiment={option}" in header
        assert "minutes on 2 cores" in header
        own = OmegaConf.load(CONF / "experiment" / f"{option}.yaml")
        words = {key: _split(values) for key, values in own.hydra.sweeper.params.items() if key != "seed"}
        without_a_sweep = {key: OmegaConf.select(own, key) for key in words if key.startswith("study.")}
        assert all(choice is None or choice in words[key] for key, choice in without_a_sweep.items())
        for number in range(max([len(values) for key, values in words.items() if "." not in key], default=1)):
            chosen = composed(
                f"experiment={option}", *(f"{key}={values[-1 - number % len(values)]}" for key, values in words.items())
            )
            assert (chosen.evaluation.split, chosen.hydra.sweeper.params.seed) == ("dev", "0,1,2")
            assert chosen.finetune.learning_rate > 0, "every arm has a tuned rate"
            assert chosen.hydra.runtime.choices.experiment == str(option)
            assert_sound(chosen)


def test_ablations_say_little_twice() -> None:
    """No two of them have 70% of their lines in common, what every option begins with aside."""
    usual = {
        "# @package _global_",
        "defaults:",
        "- ablations/base",
        "- _self_",
        "hydra:",
        "sweeper:",
        "params:",
        "#",
        "",
    }
    lines = {
        path.stem: {line.strip() for line in path.read_text().splitlines()} - usual
        for path in (CONF / "experiment" / "ablations").glob("*.yaml")
    }
    for one, own in lines.items():
        for other, others in lines.items():
            assert one == other or len(own & others) < 0.7 * len(own), (one, other)


def test_wordings_of_the_template_ablation(composed: Any) -> None:
    """The first is the default's, so that it leads to the same addresses; the last hides the reference."""
    assert composed("experiment=ablations/template").dataset.template == REWRITE_TEMPLATE
    alone = composed("experiment=ablations/reference_free", "study.wording=alone")
    assert alone.dataset.template == "{prompt}"
    given = composed("experiment=ablations/teacher", "study.teacher=somewhere")
    assert given.teacher.path == "somewhere"
    strong = composed("experiment=ablations/adapter", "study.strength=r64")
    assert (strong.adapter.rank, strong.adapter.alpha) == (64, 128)


def _split(values: str) -> list[str]:
    """The values of a sweep; a list among them stays whole."""
    return re.split(r",(?![^\[]*\])", str(values))


def test_first_option_of_each_group_is_the_default(composed: Any) -> None:
    choices = composed().hydra.runtime.choices
    first = {"model": "tiny", "metric": "angular", "calibration": "tiny", "pruning": "n2", "dataset": "tiny_math"}
    first |= {"finetune": "self_distill", "adapter": "lora", "engine": "hf", "merge": "none", "evaluation": "tiny"}
    first |= {
        "repair": "none",
        "analysis": "none",
        "trainer": "cpu",
        "logger": "csv",
        "settings": None,
        "experiment": None,
    }
    assert {group: choices[group] for group in first} == first
    assert set(first) == GROUPS - {"hydra/launcher"}


def test_command_line_wins_over_an_experiment(composed: Any) -> None:
    alone, asked = composed("experiment=demo"), composed("experiment=demo", "dataset.num_rows=7", "pruning=n1")
    assert (alone.dataset.num_rows, alone.pruning.size) == (3200, 3)
    assert (asked.dataset.num_rows, asked.pruning.size) == (7, 1)


def test_own_config_folder_adds_an_option(tmp_path: Path) -> None:
    option = tmp_path / "mine" / "pruning" / "half.yaml"
    option.parent.mkdir(parents=True)
    option.write_text("size: 6\n")
    words = [f"--config-dir={tmp_path / 'mine'}", "pruning=half", "metric=last", "finetune=none", "dry_run=true"]
    outcome = run("train", *words, cwd=tmp_path)
    assert outcome.code == 0, outcome.stderr
    assert len(outcome.lines) == 2
    assert "pruned/" in outcome.lines[1]


def described(node: Any) -> Any:
    """A config's values, and of every node what kind it is, what it may hold, and its flags."""
    kind, value = node._metadata, node._value()
    if isinstance(value, dict):
        value = [(key, described(child)) for key, child in value.items()]
    elif isinstance(value, list):
        value = [described(child) for child in value]
    return type(node), vars(kind) | {"flags": dict(kind.flags or {}), "resolver_cache": None}, value


JOBS = [
    ["metric=last", "dataset=mixture"],
    ["metric=last", "dataset=gsm8k", "seed=1"],
    ["metric=last", "dataset=gsm8k", "seed=2"],
    ["metric=last", "dataset=gsm8k", "seed=2", "+dataset@analysis.prompts=dolly"],
    ["experiment=paper/main_table", "finetune=sft"],
    ["experiment=paper/main_table", "finetune=none"],
]
"""Defaults lists that begin alike, and end alike."""


def test_what_compositions_share_changes_none() -> None:
    """One loader that composes all jobs of a sweep, first to see whether it can, against Hydra's own, made anew."""
    place, own = create_config_search_path(str(config_folder())), own_loader()
    master = own.load_configuration("config", [], RunMode.MULTIRUN)
    jobs = [described(own.load_sweep_config(master, words)) for words in JOBS]
    assert own.parts.parts and own.validated and len(own.validated) == len(JOBS)
    begun = [described(own.load_sweep_config(master, words)) for words in JOBS]
    assert not own.validated
    for words, job, same in zip(JOBS, jobs, begun, strict=True):
        assert job == same == described(ConfigLoaderImpl(place).load_configuration("config", words, RunMode.RUN)), words


ODD = [
    "on",
    "1e3",
    "0x1f",
    "",
    " ",
    "???",
    "a: b",
    "# c",
    "- d",
    "'",
    "é",
    "\U0001f600",
    "\x85\u2028",
    "\ud800",
    "two\nlines\n",
]
ODD += [
    "word " * 40,
    "${seed}",
    "\t",
    "é" * 200,
    "%a",
    "@b",
    "*c",
    "&d",
    "!e",
    "~",
    "null",
    "1:30",
    "2026-01-01",
    "\x1b[2J",
]


def test_copies_and_files_are_hydras_own() -> None:
    own = own_loader()
    configs = [own.load_configuration("config", words, RunMode.RUN) for words in JOBS]
    configs += [OmegaConf.create({"text": text, text or "key": [text, 1.5, None, RunMode.RUN, {}]}) for text in ODD]
    texts = [OmegaConf.to_yaml(config) for config in configs]
    for config, text in zip(configs, texts, strict=True):
        plain = copy.deepcopy(config)
        with quick_nodes():
            same = copy.deepcopy(config)
            assert OmegaConf.to_yaml(same) == text
        assert described(same) == described(plain) and same is not config
        same[next(iter(same))] = None
        assert described(config) == described(plain)
    assert OmegaConf.to_yaml(configs[0]) == texts[0]


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    own, option = own_loader(), tmp_path / "pruning" / "mine.yaml"
    option.parent.mkdir()
    words = [f"hydra.searchpath=['file://{tmp_path}']", "pruning=mine"]
    for size in (5, 6):
        option.write_text(f"size: {size}\n")
        assert own.load_configuration("config", words, RunMode.RUN).pruning.size == size


REFUSED = {
    "unknown option": (["metric=angula"], "metric has no option angula; did you mean angular?"),
    "unknown group": (["metrics=angular"], "metrics is not a setting; did you mean metric?"),
    "misspelt key": (["finetune.epoch=3"], "finetune.epoch is not a setting; did you mean finetune.epochs?"),
    "misspelt key of a part": (
        ["metric=random", "metric.sed=1"],
        "metric.sed is not a setting; did you mean metric.seed?",
    ),
    "word for a number": (["pruning.size=many"], "pruning.size=many must be a whole number"),
    "nothing for a number": (["seed=null"], "seed=null must be a whole number"),
    "not an override": (["pruning.size"], "pruning.size is not a setting; write key=value"),
    "option of a sweep": (["-m", "pruning=n2,n99"], "pruning has no option n99; did you mean n9?"),
    "sweep without -m": (["seed=0,1"], "seed=0,1 names several values; add -m to run each"),
    "flag": (["--dryrun"], "--dryrun is no flag; settings are written without dashes: dry_run=true"),
    "folder of configs": (["--config-dir=nowhere"], "config-dir=nowhere: no such folder"),
    "root": (["--config-name=nope"], "Cannot find primary config 'nope'"),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refusal_at_composition_is_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    outcome = run("train", "dry_run=true", *words, cwd=tmp_path)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert len(outcome.stderr.splitlines()) == 1, outcome.stderr
    assert message in outcome.errors[0]
    assert not (tmp_path / "artifacts").exists()
