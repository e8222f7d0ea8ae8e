"""`python -m sdd.stages rerun` on artifacts of files: of a corpus, of a mixture, of rows of lm-eval's tasks."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import artifacts_of, run

import sdd.stages.__main__ as rerunning
from sdd.stages.__main__ import main as stages
from sdd.stages.runtime import Runtime


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def made(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The working directory of one study of files in `given`, and its manifests by stage."""
    folder = tmp_path_factory.mktemp("made")
    given = folder / "given"
    write(given / "gsm8k.jsonl", [{"question": f"{n} + 1?", "answer": f"{n + 1}\n#### {n + 1}"} for n in range(9)])
    dolly = [
        {"instruction": f"Name {n}.", "context": "", "response": f"It is {n}.", "category": "qa"} for n in range(9)
    ]
    write(given / "dolly.jsonl", dolly)
    write(given / "texts.jsonl", [{"text": f"A text of several words, number {n}."} for n in range(12)])
    choices = {"text": ["ice", "a red fire"], "label": ["A", "B"]}
    arc = [{"id": str(n), "question": f"What is hot {n}?", "choices": choices, "answerKey": "B"} for n in range(3)]
    for split in ("test", "train"):
        write(given / "arc_easy" / f"{split}.jsonl", arc)
    words = ["dataset=mixture", *(f"dataset.parts.{part}.path={given}/{part}.jsonl" for part in ("gsm8k", "dolly"))]
    words += ["dataset.num_rows=12", "dataset.seed=2", "finetune.validation_rows=2", "finetune.num_rows=6"]
    words += [
        "calibration=c4",
        f"calibration.path={given}/texts.jsonl",
        "calibration.seed=3",
        "calibration.num_texts=5",
    ]
    words += ["calibration.max_length=64", "evaluation=lm_eval", "evaluation.tasks=[arc_easy]", "evaluation.limit=2"]
    words += ["evaluation.num_fewshot=1", f"evaluation.data_dir={given}", "finetune.epochs=1"]
    words += ["trainer.attention=eager"]  # not the usual one
    outcome = run("evaluate", *small, *words, cwd=folder)
    assert outcome.code == 0, outcome.stderr
    manifests = {manifest["stage"]: manifest for manifest in artifacts_of(folder / "artifacts").values()}
    assert "calibration" in manifests["scores"]["labels"]
    assert set(manifests["rewrites"]["spec"]["dataset"]["parts"]) == {"gsm8k", "dolly"}
    assert set(manifests["evaluated"]["spec"]["data"]["files"]) == {"arc_easy/test", "arc_easy/train"}
    return folder, manifests


def sources(stage: str, made: tuple[Path, dict[str, Any]], checkpoint: Path) -> Iterator[str]:
    """What the artifact of a stage is made of, as `--source` takes it."""
    spec, given = made[1][stage]["spec"], made[0] / "given"
    for key in ("model", "teacher"):
        if key in spec:
            yield f"{spec[key]}={checkpoint}"
    if stage == "scores":
        yield f"{spec['texts']}={given / 'texts.jsonl'}"
    if stage in ("rewrites", "targets"):
        for name, part in made[1]["rewrites"]["spec"]["dataset"]["parts"].items():
            yield f"{part['digest']}={given / name}.jsonl"
    if stage == "evaluated":
        yield from (f"{digest}={given / name}.jsonl" for name, digest in spec["data"]["files"].items())


@pytest.mark.parametrize("stage", ["scores", "pruned", "rewrites", "targets", "evaluated"])
def test_rerun_with_every_source_named_is_identical(
    stage: str, made: tuple[Path, dict[str, Any]], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without them each is asked for by its digest, one after another."""
    named = {one.split("=")[0]: one for one in sources(stage, made, checkpoint)}
    words = ["rerun", made[1][stage]["address"], "--artifacts", str(made[0] / "artifacts")]
    asked = []
    while (code := stages(words)) == 2:
        error = capsys.readouterr().err
        digest = error.split("--source ")[1].split("=PATH")[0]
        assert digest in named, error
        assert digest not in asked, error
        asked.append(digest)
        words += ["--source", named[digest]]
    assert (code, capsys.readouterr().out) == (0, "identical\n")
    assert set(asked) == set(named)


def test_rerun_computes_as_the_first_time(
    made: tuple[Path, dict[str, Any]], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches of another size, or by another attention, sums are rounded otherwise; lm-eval's suites set size 8."""
    seen: list[Runtime] = []
    real = rerunning.builder
    monkeypatch.setattr(rerunning, "builder", lambda runtime: seen.append(runtime) or real(runtime))
    words = ["rerun", made[1]["evaluated"]["address"], "--artifacts", str(made[0] / "artifacts")]
    for one in sources("evaluated", made, checkpoint):
        words += ["--source", one]
    assert stages(words) == 0
    assert [(runtime.evaluation_batch_size, runtime.attention) for runtime in seen] == [(8, "eager")]


def test_rerun_with_another_file_says_that_it_is_another(
    made: tuple[Path, dict[str, Any]], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["rerun", made[1]["targets"]["address"], "--artifacts", str(made[0] / "artifacts")]
    other = made[0] / "given" / "other.jsonl"
    write(other, [{"question": "1?", "answer": "#### 1"}] * 9)
    for one in sources("targets", made, checkpoint):
        digest, _, path = one.partition("=")
        words += ["--source", f"{digest}={other if path.endswith('gsm8k.jsonl') else path}"]
    assert stages(words) == 2
    assert "the dataset differs from the one with digest" in capsys.readouterr().err
