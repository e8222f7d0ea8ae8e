"""Every task of the ready suites on real rows with a real model, against lm-eval's own command line.

    pytest -m peer tests/system/test_benchmark_cli.py

The command line reads task files written here, which include lm-eval's packaged definitions and name the same rows.
"""

import gzip
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import yaml
from launching import run

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_files import ROWS, STORIES, needs_data

pytestmark = [needs_data, pytest.mark.peer, pytest.mark.data]

PACKAGED = Path(lm_eval.tasks.__file__).parent
LIMIT = 2
OPENLLM = {
    "arc_challenge": ("arc/arc_challenge", "arc_challenge", {"test": "test", "train": "train"}, 25),
    "hellaswag": ("hellaswag/hellaswag", "hellaswag", {"validation": "validation", "train": "train"}, 10),
    "truthfulqa_mc2": ("truthfulqa/truthfulqa_mc2", "truthfulqa_mc", {"validation": "validation"}, 0),
    "winogrande": ("winogrande/default", "winogrande", {"validation": "validation", "train": "train"}, 5),
    "gsm8k": ("gsm8k/gsm8k", "gsm8k", {"test": "test", "train": "train"}, 5),
}
ZERO_SHOT = {
    "arc_easy": ("arc/arc_easy", "arc_easy", {"test": "test", "validation": "validation"}, 0),
    "arc_challenge": ("arc/arc_challenge", "arc_challenge", {"test": "test", "validation": "validation"}, 0),
    "boolq": ("super_glue/boolq/default", "boolq", {"validation": "validation"}, 0),
    "openbookqa": ("openbookqa/openbookqa", "openbookqa", {"test": "test", "validation": "validation"}, 0),
    "piqa": ("piqa/piqa", "piqa", {"validation": "validation"}, 0),
    "race": ("race/race", "race", {"test": "test"}, 0),
    "social_iqa": ("siqa/siqa", "social_iqa", {"validation": "validation"}, 0),
    "truthfulqa_mc2": ("truthfulqa/truthfulqa_mc2", "truthfulqa_mc", {"validation": "validation"}, 0),
    "winogrande": ("winogrande/default", "winogrande", {"validation": "validation"}, 0),
    "crows_pairs_english": ("crows_pairs/crows_pairs_english", "crows_pairs", {"test": "test"}, 0),
}


def race_rows() -> list[dict[str, str]]:
    """Rows in the hub's fields: an article and its questions, of which the last is asked."""
    problems = [
        {"question": "What did Lily find?", "answer": "B", "options": ["A dog.", "A red ball.", "A car.", "A hat."]},
        {"question": "She was very  _  .", "answer": "C", "options": ["sad", "tired", "happy", "angry"]},
        {"question": "Who came to play?", "answer": "A", "options": ["Tom did.", "Nobody.", "Her mom.", "A cat."]},
    ]
    article = "Once upon a time, Lily went to the park. She found a red ball and was happy. Tom came to play."
    return [{"article": article, "problems": str(problems[: n + 1])} for n in range(len(problems))]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of real rows, with RACE's beside them."""
    folder = tmp_path_factory.mktemp("rows")
    for path in ROWS.iterdir():
        if path.is_dir():
            (folder / path.name).symlink_to(path)
    (folder / "race").mkdir()
    (folder / "race" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in race_rows()))
    return folder


def file_of(rows: Path, folder: str, split: str) -> str:
    (path,) = (rows / folder).glob(f"{split}.jsonl*")
    return str(path)


def write_tasks(folder: Path, rows: Path, tasks: dict[str, tuple]) -> None:
    for name, (packaged, data, splits, shots) in tasks.items():
        files = {split: file_of(rows, data, source) for split, source in splits.items()}
        config: dict[str, Any] = {
            "include": str(PACKAGED / f"{packaged}.yaml"),
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
            "num_fewshot": shots,
        }
        if "train" not in splits:
            config["training_split"] = None
        (folder / f"local_{name}.yaml").write_text(yaml.safe_dump(config))


def write_mmlu(folder: Path, rows: Path) -> None:
    """A file of rows per subject and split, a task per subject, and a group of them all."""
    for split in ("dev", "test"):
        path = Path(file_of(rows, "mmlu", split))
        lines = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).splitlines()
        for line in lines:
            with (folder / f"{json.loads(line)['subject']}.{split}.jsonl").open("ab") as file:
                file.write(line + b"\n")
    names = []
    for path in sorted((PACKAGED / "mmlu" / "default").glob("mmlu_*.yaml")):
        subject = path.stem.removeprefix("mmlu_")
        files = {split: str(folder / f"{subject}.{split}.jsonl") for split in ("dev", "test")}
        names.append(f"local_mmlu_{subject}")
        config = {"include": str(path), "task": names[-1], "tag": None, "dataset_path": "json", "dataset_name": None}
        config |= {"dataset_kwargs": {"data_files": files}, "num_fewshot": 5}
        (folder / f"{names[-1]}.yaml").write_text(yaml.safe_dump(config))
    assert len(names) == 57
    group = {"group": "local_mmlu", "task": names, "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (folder / "group.yaml").write_text(yaml.safe_dump(group))


def command_line(tasks: Path, names: list[str], out: Path) -> dict[str, dict[str, Any]]:
    """lm-eval's results by task, as its own command line writes them."""
    words = ["--model", "hf", "--model_args", f"pretrained={STORIES},dtype=float32,attn_implementation=eager"]
    words += ["--tasks", ",".join(f"local_{name}" for name in names), "--include_path", str(tasks)]
    words += ["--limit", str(LIMIT), "--batch_size", "8", "--device", "cpu", "--output_path", str(out)]
    command = [sys.executable, "-m", "lm_eval", "run", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tasks)
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = out.rglob("results_*.json")
    results = json.loads(written.read_text())["results"]
    return {name.removeprefix("local_"): result for name, result in results.items()}


def ours(suite: str, rows: Path, cwd: Path, *more: str) -> dict[str, Any]:
    words = [f"model.path={STORIES}", f"evaluation={suite}", f"evaluation.data_dir={rows}", f"evaluation.limit={LIMIT}"]
    outcome = run("evaluate", "model=local", "pruning=none", "finetune=none", *words, *more, cwd=cwd)
    results: dict[str, Any] = json.loads((outcome.path / "results.json").read_text())
    return results


def assert_equal(result: dict[str, Any], theirs: dict[str, Any]) -> int:
    """Every value and standard error that lm-eval states is ours; how many there were.

    Its command line puts requests of all tasks into one batch, so that likelihoods differ in the sixth digit.
    """
    key = f"{result['metric']},{result.get('filter', 'none')}"
    stated = {key: result, **{name if "," in name else f"{name},none": each for name, each in result["others"].items()}}
    expected = {name for name in theirs if "," in name and "_stderr" not in name}
    assert set(stated) == expected
    for name, each in stated.items():
        error = theirs[name.replace(",", "_stderr,")]
        assert each["value"] == pytest.approx(theirs[name], abs=1e-4), name
        assert each["stderr"] == (None if error == "N/A" else pytest.approx(error, abs=1e-4)), name
    return len(stated)


def test_openllm_v1_but_mmlu(rows: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path, rows, OPENLLM)
    chosen = f"evaluation.tasks=[{','.join(OPENLLM)}]"
    found, theirs = ours("openllm_v1", rows, tmp_path, chosen), command_line(tmp_path, list(OPENLLM), tmp_path / "out")
    assert list(found["tasks"]) == list(OPENLLM)
    assert sum(assert_equal(result, theirs[name]) for name, result in found["tasks"].items()) == 8
    assert found["tasks"]["gsm8k"]["filter"] == "strict-match"
    assert found["tasks"]["gsm8k"]["lenient"] == theirs["gsm8k"]["exact_match,flexible-extract"]


def test_mmlu(rows: Path, tmp_path: Path) -> None:
    write_mmlu(tmp_path, rows)
    mmlu = ours("openllm_v1", rows, tmp_path, "evaluation.tasks=[mmlu]")["tasks"]["mmlu"]
    theirs = command_line(tmp_path, ["mmlu"], tmp_path / "out")
    assert assert_equal(mmlu | mmlu["size_weighted"], theirs["mmlu"]) == 1
    assert mmlu["value"] == pytest.approx(statistics.fmean(each["value"] for each in mmlu["subtasks"].values()))
    assert len(mmlu["subtasks"]) == 57
    for name, result in mmlu["subtasks"].items():
        assert result["value"] == theirs[name]["acc,none"], name


def test_sdmprune_zero_shot(rows: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path, rows, ZERO_SHOT)
    found, theirs = ours("sdmprune_zero_shot", rows, tmp_path), command_line(tmp_path, list(ZERO_SHOT), tmp_path / "o")
    assert list(found["tasks"]) == list(ZERO_SHOT)[:-1]
    assert list(found["beside"]) == ["crows_pairs_english"]
    every = found["tasks"] | found["beside"]
    assert sum(assert_equal(result, theirs[name]) for name, result in every.items()) == 15
