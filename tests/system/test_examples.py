"""The scripts of `examples/` as they stand, and the classes of a user's own that two of them bring."""

import contextlib
import importlib
import io
import json
import os
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import REPOSITORY, artifacts_of, run

from sdd.api import compose
from sdd.config.own import CLASSES, allow
from sdd.errors import UserError
from sdd.stages.__main__ import main as stages

EXAMPLES = REPOSITORY / "examples"
OWN = [f"--config-dir={EXAMPLES}/mine/conf", "metric=middle"]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """The working directory in which each ran once, and what it printed."""
    folder, here = tmp_path_factory.mktemp("examples"), Path.cwd()
    outputs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        os.chdir(folder)
        for name in ("from_python", "own_metric", "own_dataset"):
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
            outputs[name] = out.getvalue()
        os.chdir(here)
        yield folder, outputs


def test_every_example_is_run(printed: tuple[Path, dict[str, str]]) -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(printed[1])


def test_scores_prunes_and_evaluates(printed: tuple[Path, dict[str, str]]) -> None:
    first, second = printed[1]["from_python"].splitlines()
    assert first.startswith("blocks [") and second.endswith("% right")
    words = ["calibration.num_texts=16", "finetune=none", "evaluation.tasks=[arithmetic,fact_choice]"]
    outcome = run("evaluate", *words, "evaluation.limit=8", cwd=printed[0])
    assert outcome.built == [] and outcome.path.parent.name == "evaluated"


def test_own_metric_is_in_the_key_with_its_source(printed: tuple[Path, dict[str, str]]) -> None:
    folder, outputs = printed
    assert outputs["own_metric"] == "centre 0.5: blocks [5, 6] removed\ncentre 0.75: blocks [8, 9] removed\n"
    outcome = run("prune", *OWN, "allow=mine.metrics.Middle", cwd=folder)
    assert outcome.built == []
    address = json.loads((outcome.path / "manifest.json").read_text())["inputs"]["scores"]
    manifest = artifacts_of(folder / "artifacts")[f"scores/{address}"]
    id = manifest["spec"]["metric"]["_target_"]
    assert id.startswith("mine.metrics.Middle@") and id in CLASSES
    assert "metric.centre=0.5" in manifest["command"] and "allow=mine.metrics.Middle" in manifest["command"]
    assert manifest["config"]["metric"] == {"_target_": id, "centre": 0.5}


def test_own_metric_is_rebuilt_only_if_allowed(
    printed: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests = artifacts_of(printed[0] / "artifacts").values()
    own = next(m for m in manifests if "mine." in str(m["spec"].get("metric")))
    words = ["rerun", own["address"], "--artifacts", str(printed[0] / "artifacts")]
    monkeypatch.setattr("sdd.config.allowed.CLASSES", {})
    assert stages(words) == 2
    assert "is a class of somebody's own" in capsys.readouterr().err
    monkeypatch.undo()
    assert stages([*words, "--allow", "mine.metrics.Middle"]) == 0
    assert capsys.readouterr().out == "identical\n"


def test_own_rows_become_targets(printed: tuple[Path, dict[str, str]]) -> None:
    assert set(printed[1]["own_dataset"].splitlines()) == {
        f"{prompt!r} -> {target!r}"
        for prompt, target in (
            ("Which is cold? Choose: fire, ice, tea.", "It is ice."),
            ("Which one flies? Choose: a bird, a stone.", "It is a bird."),
            ("Which is a number? Choose: red, seven.", "It is seven."),
            ("Which is wet? Choose: rain, sand.", "It is rain."),
            ("Which is round? Choose: a ball, a book.", "It is a ball."),
        )
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "metric._target_=mine.metrics.Middle is not one of this project's parts"),
        (["allow=mine.rows.Choices"], "metric._target_=mine.metrics.Middle is not one of this project's parts"),
        (["allow=mine.metrics.Middel"], "allow=mine.metrics.Middel cannot be imported (AttributeError"),
        (["allow=nowhere_at_all.Mine"], "install its package, or name its folder in PYTHONPATH"),
        (["allow=mine.metrics"], "no class that is written in a file"),
        (["allow=sdd.importance.states.Last"], "no import path of a class of your own"),
        (["allow=Middle"], "no import path of a class of your own"),
        (["metric._target_=mine.rows.Choices", "allow=mine.rows.Choices"], "is not derived from sdd.importance"),
        (["calibration._target_=mine.rows.Choices", "allow=[mine.rows.Choices,mine.metrics.Middle]"], "not this"),
    ],
)
def test_what_is_not_allowed(words: list[str], message: str, printed: tuple[Path, dict[str, str]]) -> None:
    outcome = run("prune", *OWN, *words, "dry_run=true", cwd=printed[0])
    assert (outcome.code, outcome.stdout, len(outcome.errors)) == (2, "", 1), outcome.stderr
    assert message in outcome.errors[0]
    with pytest.raises(UserError) as refusal:
        compose("metric=middle", *words, config_dir=EXAMPLES / "mine" / "conf")
    assert message in str(refusal.value)


def test_class_that_changes_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    source = Path(shutil.copyfile(EXAMPLES / "mine" / "metrics.py", tmp_path / "changing_metrics.py"))
    before = allow("changing_metrics.Middle")
    source.write_text(source.read_text() + "\nCHANGED = True\n")
    with pytest.raises(UserError, match="has changed since it was imported"):
        allow("changing_metrics.Middle")
    del sys.modules["changing_metrics"]
    importlib.invalidate_caches()
    after = allow("changing_metrics.Middle")
    assert before.partition("@")[0] == after.partition("@")[0] and before != after


def test_mistakes_from_python_are_one_line() -> None:
    for words in (
        ["metric=angula"],
        ["sed=1"],
        ["pruning.size=12"],
        ["seed=1,2"],
        ["logger=wandb", "evaluation.seed=x"],
    ):
        with pytest.raises(UserError) as refusal:
            compose(*words)
        assert "\n" not in str(refusal.value)
