"""The four scripts from the outside: quick help, one line on stdout, and no shadow over Hugging Face's `evaluate`."""

import json
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from launching import REPOSITORY, artifacts_of, files_of, run, subprocess_run

from sdd.cli import app
from sdd.models.checkpoints import blocks
from sdd.models.spread import Spread

SCRIPTS = ["prune", "generate", "train", "evaluate"]
HEAVY = ["torch", "transformers", "pytorch_lightning", "peft", "datasets", "lm_eval", "pandas", "matplotlib", "wandb"]

RUN_AND_LIST = """
import json, runpy, sys
script, heavy, sys.argv = sys.argv[1], json.loads(sys.argv[2]), sys.argv[1:2] + sys.argv[3:]
code = 0
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as end:
    code = end.code
print("imported", json.dumps([name for name in heavy if name in sys.modules]))
sys.exit(code)
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_heavy(script: str, tmp_path: Path) -> None:
    path = str(REPOSITORY / f"{script}.py")
    outcome = subprocess_run(["-c", RUN_AND_LIST, path, json.dumps(HEAVY), "--help"], tmp_path)
    assert outcome.code == 0, outcome.stderr
    assert outcome.lines[-1] == "imported []"
    for group in ("model", "metric", "pruning", "dataset", "finetune", "evaluation", "experiment"):
        assert f"{group}: " in outcome.stdout
    assert list(tmp_path.iterdir()) == []


def test_mistake_is_told_before_anything_heavy_is_imported(small: list[str], tmp_path: Path) -> None:
    path = str(REPOSITORY / "evaluate.py")
    outcome = subprocess_run(["-c", RUN_AND_LIST, path, json.dumps(HEAVY), *small, "pruning.size=4"], tmp_path)
    assert outcome.code == 2, outcome.stderr
    assert len(outcome.errors) == 1
    assert outcome.lines == ["imported []"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_does_not_shadow_the_evaluate_library(script: str, tmp_path: Path) -> None:
    """As when the script is run: its folder is first on the path, until its first lines move it to the end."""
    code = f"""
import importlib.util, runpy, sys
sys.path.insert(0, {str(REPOSITORY)!r})
runpy.run_path({str(REPOSITORY / script)!r} + ".py", run_name="not main")
found = importlib.util.find_spec("evaluate")
print(found.origin)
import sdd
print(sdd.__file__)
"""
    outcome = subprocess_run(["-c", code], tmp_path, PYTHONPATH="")
    assert outcome.code == 0, outcome.stderr
    library, package = outcome.lines
    assert Path(library).name == "__init__.py"
    assert Path(library).parent.name == "evaluate"
    assert Path(package).parent.parent == REPOSITORY


@pytest.mark.slow
def test_script_as_a_user_runs_it(small: list[str], tmp_path: Path) -> None:
    outcome = subprocess_run([str(REPOSITORY / "prune.py"), *small, "metric=last"], tmp_path)
    assert outcome.path.parent == tmp_path / "artifacts" / "pruned"
    assert not list(tmp_path.glob("*.log"))
    (run_folder,) = tmp_path.glob("outputs/prune/*/*")
    record = json.loads((run_folder / "result.json").read_text())
    assert record["path"] == str(outcome.path)
    assert record["address"] == outcome.path.name


def test_dry_run_prints_the_graph_and_builds_nothing(small: list[str], manifests: dict, tmp_path: Path) -> None:
    outcome = run("evaluate", *small, "dry_run=true", cwd=tmp_path)
    assert outcome.code == 0
    assert len(outcome.lines) == 6
    assert all(line.startswith("would be built ") for line in outcome.lines)
    printed = [line.split()[3] for line in outcome.lines]
    assert set(printed) == {f"{stage}/{manifest['address']}" for stage, manifest in manifests.items()}
    for line in outcome.lines:
        for upstream in line.split("<-")[1].split(",") if "<-" in line else []:
            assert printed.index(upstream.strip()) < printed.index(line.split()[3])
    assert artifacts_of(tmp_path / "artifacts") == {}


def test_dry_run_says_what_exists(small: list[str], copied: Path) -> None:
    shutil.rmtree(copied / "artifacts" / "evaluated")
    outcome = run("evaluate", *small, "dry_run=true", cwd=copied)
    assert sum(line.startswith("exists ") for line in outcome.lines) == 5
    assert [line for line in outcome.lines if line.startswith("would be built ")] == outcome.lines[-1:]


def test_each_script_prints_its_own_artifact(small: list[str], study: Path, manifests: dict, copied: Path) -> None:
    stages = {"prune": "pruned", "generate": "targets", "train": "tuned", "evaluate": "evaluated"}
    endings = {
        "prune": r"removed blocks \d,\d of .*\nsaves \d.*\nnext, .*: python evaluate.py --config-dir=.* finetune=none",
        "generate": r"\d+ of 140 rewrites kept",
        "train": r"\d+ steps: loss [\d.]+ -> [\d.]+, on validation rows ",
        "evaluate": r"average [\d.]+ percent over 2 tasks\ntask +percent .*(\n.*){3} pruning=none finetune=none\n",
    }
    for script, stage in stages.items():
        outcome = run(script, *small, cwd=copied)
        assert re.search(endings[script], outcome.stderr), outcome.stderr
        assert outcome.path == copied / "artifacts" / stage / manifests[stage]["address"]
        assert outcome.built == []


def test_a_search_is_told_what_a_job_is_worth(small: list[str], copied: Path) -> None:
    """The average of an evaluation; of anything else, and of a job that failed, nothing."""
    outcome = run("evaluate", *small, "hydra.run.dir=evaluation", cwd=copied)
    average = json.loads((outcome.path / "results.json").read_text())["average"]
    assert app.measure(str(copied / "evaluation")) == average
    run("prune", *small, "hydra.run.dir=cut", cwd=copied)
    run("evaluate", *small, "pruning.size=9", "hydra.run.dir=mistake", cwd=copied)
    assert [app.measure(str(copied / name)) for name in ("cut", "mistake", "nothing")] == [None] * 3


AUTO = ("trainer.micro_batch_tokens", "trainer.inference_batch_size", "engine.batch_size", "evaluation.batch_size")


@pytest.mark.parametrize(
    ("script", "free", "least", "most"),
    [
        ("prune", 1e8, [1] * 4, [1] * 4),
        ("prune", 1e12, [512, 64, 64, 64], [512, 64, 64, 64]),
        ("train", 3e6, [2, 64, 64, 64], [256, 64, 64, 64]),
    ],
)
def test_auto_goes_by_free_memory_and_into_no_address(
    script: str,
    free: float,
    least: list[int],
    most: list[int],
    small: list[str],
    manifests: dict,
    copied: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The numbers are in the log, and in the manifest in the place of `auto`; the address is that of other numbers."""
    monkeypatch.setattr("sdd.stages.fitting.free_memory", lambda accelerator: free)
    for stage in {"prune": ["scores", "pruned"], "train": ["tuned"]}[script]:
        shutil.rmtree(copied / "artifacts" / stage)
    outcome = run(script, *small, *(f"{key}=auto" for key in AUTO), cwd=copied)
    stage = outcome.path.parent.name
    assert outcome.path.name == manifests[stage]["address"]
    assert outcome.built[-1] == f"{stage}/{outcome.path.name}"
    config = artifacts_of(copied / "artifacts")[f"{stage}/{outcome.path.name}"]["config"]
    numbers = [config[group][name] for group, name in (key.split(".") for key in AUTO)]
    assert all(low <= number <= high for low, number, high in zip(least, numbers, most, strict=True)), numbers
    assert re.findall(r" ([a-z_.]+)=auto: (\d+), with ", outcome.stderr) == [
        (key, str(number)) for key, number in zip(AUTO, numbers, strict=True)
    ]


def test_train_without_finetuning_prints_the_pruned_path(small: list[str], manifests: dict, copied: Path) -> None:
    assert run("train", *small, "finetune=none", cwd=copied).path.parent.name == "pruned"


def test_train_of_the_teacher_prints_the_model(small: list[str], checkpoint: Path, tmp_path: Path) -> None:
    for script in ("train", "prune"):
        assert run(script, *small, "pruning=none", "finetune=none", cwd=tmp_path).path == checkpoint
    assert artifacts_of(tmp_path / "artifacts") == {}


def test_logs_go_to_stderr_and_into_the_run_folder(small: list[str], tmp_path: Path) -> None:
    outcome = run("prune", *small, "metric=last", cwd=tmp_path)
    assert len(outcome.lines) == 1
    assert "building scores/" in outcome.stderr
    (log,) = tmp_path.glob("outputs/prune/*/*/prune.log")
    assert "building scores/" in log.read_text()


def test_models_that_memory_does_not_last_for_build_the_same(
    study: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spread over the CPU and the disk: the unpruned model, twice, and the student with its adapter merged in."""
    on_disk, settled = [], Spread.settled

    def counted(self: Spread, model: Any, held: ExitStack) -> Any:
        on_disk.append([next(block.parameters()).device.type for block in blocks(model)].count("meta"))
        return settled(self, model, held)

    monkeypatch.setattr(Spread, "settled", counted)
    words = ["trainer.device_map=auto", "trainer.max_memory={cpu: 150KB}"]
    outcome = run("evaluate", *small, *words, cwd=tmp_path)
    assert len(on_disk) == 3 and all(on_disk), outcome.stderr
    assert files_of(outcome.path.parents[1]) == files_of(study / "artifacts")
