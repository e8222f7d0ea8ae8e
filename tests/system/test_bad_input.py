"""Checkpoints, rows and hubs that cannot be used: one line, exit code 2, before anything is built or written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import commit_of, serving, settings
from launching import Outcome, job, subprocess_run
from omegaconf import DictConfig, OmegaConf

HERE = Path(__file__).parent


def assert_refused(outcome: Outcome, message: str, artifacts: Path) -> None:
    assert (outcome.code, outcome.stdout, len(outcome.errors)) == (2, "", 1), outcome.stderr
    assert message in outcome.errors[0]
    assert "Traceback" not in outcome.stderr
    assert outcome.built == []
    assert not list(artifacts.glob("[a-z]*"))
    assert not (artifacts / ".partial").exists()


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def second_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated shard": (lambda f: cut_short(second_shard(f)), "model-00002-of-"),
    "truncated in its header": (
        lambda f: second_shard(f).write_bytes(second_shard(f).read_bytes()[:50]),
        "damaged safetensors file (the header is cut off); fetch it again",
    ),
    "missing shard": (lambda f: second_shard(f).unlink(), "the index names model-00002-of-"),
    "missing index": (
        lambda f: (f / "model.safetensors.index.json").unlink(),
        "safetensors files, but no model.safetensors and no model.safetensors.index.json; fetch it again",
    ),
}


@pytest.mark.parametrize(("harm", "message"), CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_checkpoint_that_is_not_whole(
    harm: Callable[[Path], Any],
    message: str,
    sharded_llama: Path,
    tmp_path: Path,
    composed: Callable[..., DictConfig],
) -> None:
    folder = Path(shutil.copytree(sharded_llama, tmp_path / "model"))
    harm(folder)
    config = composed()
    config.model.path = str(folder)
    outcome = job("evaluate", config, tmp_path)
    assert_refused(outcome, message, tmp_path / "artifacts")
    assert str(folder) in outcome.errors[0]
    assert "fetch it again" in outcome.errors[0]


def parquet(path: Path, *columns: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: ["words of a row"] * 5 for column in columns}), path)
    return path


ROWS = {
    "dataset": (
        ["dataset=gsm8k"],
        {"dataset.path": "rows.parquet"},
        "dataset.path=rows.parquet: no column 'answer'; the file has question, text2",
    ),
    "calibration": (
        ["calibration=c4"],
        {"calibration.path": "rows.parquet"},
        "calibration.path=rows.parquet: no column 'text'; the file has question, text2",
    ),
    "evaluation": (
        ["evaluation=lm_eval"],
        {"evaluation.tasks": ["piqa"], "evaluation.data_dir": "."},
        "the rows of piqa do not have the fields that lm-eval's piqa reads",
    ),
    "evaluation, no file": (
        ["evaluation=lm_eval"],
        {"evaluation.tasks": ["boolq"], "evaluation.data_dir": "."},
        "boolq needs boolq/validation.jsonl (or .jsonl.gz, .parquet), which is not there",
    ),
    "evaluation, too few examples": (
        ["evaluation=lm_eval"],
        {"evaluation.tasks": ["arc_easy"], "evaluation.data_dir": ".", "evaluation.num_fewshot": 6},
        "arc_easy/train.parquet: arc_easy shows 6 examples, but 5 rows are there",
    ),
}


@pytest.mark.parametrize(("groups", "values", "message"), ROWS.values(), ids=ROWS.keys())
def test_rows_that_lack_something(
    groups: list[str], values: dict[str, Any], message: str, tmp_path: Path, composed: Callable[..., DictConfig]
) -> None:
    """Rows of an evaluation too: before a model is cut and tuned that could not be evaluated."""
    for name in ("rows", "piqa/validation", "arc_easy/test", "arc_easy/train"):
        parquet(tmp_path / f"{name}.parquet", "question", "text2")
    config = composed(*groups)
    for key, value in values.items():
        OmegaConf.update(config, key, value)
    if "evaluation=lm_eval" in groups:
        config.evaluation.limit = 1
    assert_refused(job("evaluate", config, tmp_path), message, tmp_path / "artifacts")


def test_a_limit_below_every_row_is_told_before_the_work(tmp_path: Path, composed: Callable[..., DictConfig]) -> None:
    for mode, words in (("self_distill", " without its answer"), ("sft", "")):
        config = composed()
        config.finetune.max_length, config.finetune.mode = 9, mode
        message = "finetune.max_length=9 is shorter than every row of the dataset; the shortest has "
        outcome = job("train", config, tmp_path / mode)
        assert_refused(outcome, message, tmp_path / mode / "artifacts")
        assert f"tokens{words}, raise it" in outcome.errors[0]


OFFLINE = {
    "model": ([], {"model.path": "somebody/model"}, "model.path=somebody/model: the hub cannot be reached"),
    "dataset": (["dataset=gsm8k"], {}, "dataset.hub.repository=openai/gsm8k: the hub cannot be reached"),
    "texts": (["calibration=wikitext2"], {}, "calibration.hub.repository=Salesforce/wikitext: the hub cannot"),
    "evaluation": (
        ["evaluation=lm_eval"],
        {"evaluation.tasks": ["arc_easy"]},
        "arc_easy: the rows of allenai/ai2_arc cannot be fetched",
    ),
}


@pytest.mark.parametrize(("groups", "values", "message"), OFFLINE.values(), ids=OFFLINE.keys())
def test_no_network(
    groups: list[str],
    values: dict[str, Any],
    message: str,
    tmp_path: Path,
    composed: Callable[..., DictConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """This process may not ask a hub; its cache is an empty one."""
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    config = composed(*groups)
    for key, value in values.items():
        OmegaConf.update(config, key, value)
    outcome = job("evaluate", config, tmp_path)
    assert_refused(outcome, message, tmp_path / "artifacts")
    assert "connect, or " in outcome.errors[0] or "check the network, or " in outcome.errors[0]


# ---- a hub ------------------------------------------------------------------------------------------------------

DRIVER = """
import dataclasses, json, sys
from pathlib import Path
from launching import run
for name, words in json.loads(sys.argv[1]).items():
    print("OUTCOME" + json.dumps([name, dataclasses.asdict(run("evaluate", *words, cwd=Path(name)))]), flush=True)
"""
HUB = {
    "gated": ["model.path=gated/model"],
    "missing": ["model.path=nobody/nothing"],
    "truncated": ["model.path=bad/truncated"],
    "pickled": ["model.path=bad/pickled"],
    "code": ["model.path=bad/code"],
    "index": ["model.path=bad/no-index"],
    "gated rows": ["dataset=gsm8k", "dataset.hub.repository=gated/sums", "dataset.hub.files=[train.parquet]"],
    "missing rows": ["dataset=gsm8k", "dataset.hub.repository=nobody/sums"],
    "column": ["dataset=gsm8k", "dataset.hub.repository=bad/sums", "dataset.hub.files=[train.parquet]"],
}
REFUSED = {
    "gated": "model.path=gated/model is gated: accept its licence at https://huggingface.co/gated/model, then log in "
    "here with: hf auth login",
    "missing": "model.path=nobody/nothing: no such folder here, and no such repository on the hub",
    "truncated": "damaged safetensors file (the data are cut off); fetch it again",
    "pickled": "model.path=bad/pickled: the weights are pickled (pytorch_model.bin), which can run code",
    "code": "model.path=bad/code: needs remote code (auto_map in config.json), which is never run",
    "index": "model.path=bad/no-index: no safetensors weights",
    "gated rows": "dataset.hub.repository=gated/sums is gated: accept its licence at "
    "https://huggingface.co/datasets/gated/sums, then log in here with: hf auth login",
    "missing rows": "dataset.hub.repository=nobody/sums: there is no such dataset, or it is private; check the name",
    "column": "train.parquet: no column 'answer'; the file has question, text2",
}


@pytest.fixture(scope="module")
def asked(
    small: list[str], sharded_llama: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Outcome], Path]:
    """What the script says of every case, and the folder of their working directories."""
    root, folder = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("asked")
    for repo in ("gated/model", "bad/pickled", "bad/code"):
        shutil.copytree(tiny_llama, root / repo)
    for repo in ("bad/truncated", "bad/no-index"):
        shutil.copytree(sharded_llama, root / repo)
    cut_short(second_shard(root / "bad/truncated"))
    (root / "bad/no-index/model.safetensors.index.json").unlink()
    (root / "bad/pickled/model.safetensors").rename(root / "bad/pickled/pytorch_model.bin")
    config = json.loads((root / "bad/code/config.json").read_text())
    (root / "bad/code/config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "code.M"}}))
    for repo in ("gated/sums", "bad/sums"):
        parquet(root / "datasets" / repo / "train.parquet", "question", "text2")
    cases = {name: [*small, *words] for name, words in HUB.items()}
    for words in cases.values():
        repos = [word.partition("=")[2] for word in words if word.startswith("dataset.hub.repository=")]
        words += [f"dataset.hub.revision={commit_of(repo)}" for repo in repos]
    with serving(root) as hub:
        path = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
        environment = settings(hub.url, folder / "cache") | {"PYTHONPATH": path}
        done = subprocess_run(["-c", DRIVER, json.dumps(cases)], folder, **environment)
    assert done.code == 0, done.stderr
    found = (json.loads(line.removeprefix("OUTCOME")) for line in done.lines if line.startswith("OUTCOME"))
    return {name: Outcome(**outcome) for name, outcome in found}, folder


@pytest.mark.parametrize("case", HUB)
def test_what_a_hub_has_not_or_does_not_give(case: str, asked: tuple[dict[str, Outcome], Path]) -> None:
    outcomes, folder = asked
    assert_refused(outcomes[case], REFUSED[case], folder / case / "artifacts")
