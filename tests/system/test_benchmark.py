"""lm-eval's own tasks on a small random model and rows written here: results, records, resume, addresses, mistakes."""

import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from launching import Outcome, files_of, run, spawn

from sdd.evaluation.benchmark import Benchmark

ARC = [
    ("What is hot?", ["ice", "a red fire"], "B"),
    ("What is wet?", ["water", "a dry stone", "salt"], "A"),
    ("What can fly?", ["a stone", "a big old house", "the bird"], "C"),
]
SUMS = [(2, 3), (4, 5), (1, 7), (6, 2)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    arc = [
        {"id": str(n), "question": q, "choices": {"text": c, "label": ["A", "B", "C"][: len(c)]}, "answerKey": key}
        for n, (q, c, key) in enumerate(ARC)
    ]
    sums = [{"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"} for a, b in SUMS]
    files = {"arc_easy/test": arc, "arc_easy/train": arc[::-1], "gsm8k/test": sums[:2], "gsm8k/train": sums[2:]}
    for name, each in files.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in each))
    return folder


@pytest.fixture(scope="module")
def words(checkpoint: Path, rows: Path) -> list[str]:
    chosen = [f"model.path={checkpoint}", "model=local", "pruning=none", "finetune=none", "evaluation=lm_eval"]
    chosen += ["evaluation.tasks=[arc_easy,gsm8k]", "evaluation.num_fewshot=1", "evaluation.max_new_tokens=8"]
    return [*chosen, f"evaluation.data_dir={rows}", "evaluation.batch_size=2"]


@pytest.fixture(scope="module")
def evaluated(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """The working directory of one whole run, and what it said."""
    folder = tmp_path_factory.mktemp("evaluated")
    return folder, run("evaluate", *words, cwd=folder)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_value_is_recomputed_from_the_records(evaluated: tuple[Path, Outcome]) -> None:
    folder = evaluated[1].path
    results = json.loads((folder / "results.json").read_text())
    assert {name: (each["metric"], each["n"]) for name, each in results["tasks"].items()} == {
        "arc_easy": ("acc", 3),
        "gsm8k": ("exact_match", 2),
    }
    assert results["average"] == statistics.fmean(each["value"] for each in results["tasks"].values())
    for name, result in results["tasks"].items():
        records = read(folder / "samples" / f"{name}.jsonl")
        key = f"{result['metric']},{result.get('filter', 'none')}"
        every = {key: result} | {other if "," in other else f"{other},none": v for other, v in result["others"].items()}
        for metric, stated in every.items():
            measured = [record["metrics"][metric] for record in records]
            assert stated["value"] == pytest.approx(statistics.fmean(measured))
            assert stated["stderr"] == pytest.approx(statistics.stdev(measured) / math.sqrt(len(measured)))
        assert [record["score"] for record in records] == [record["metrics"][key] for record in records]
        assert len({record["id"] for record in records}) == result["n"]


def test_metrics_follow_from_likelihoods_and_responses(evaluated: tuple[Path, Outcome]) -> None:
    folder = evaluated[1].path / "samples"
    for record, (_, choices, key) in zip(read(folder / "arc_easy.jsonl"), ARC, strict=True):
        right, found = "ABC".index(key), record["log_likelihoods"]
        by_length = [each / len(choice) for each, choice in zip(found, choices, strict=True)]
        assert record["target"] == right
        assert record["metrics"]["acc,none"] == float(found.index(max(found)) == right)
        assert record["metrics"]["acc_norm,none"] == float(by_length.index(max(by_length)) == right)
    for record in read(folder / "gsm8k.jsonl"):
        assert isinstance(record["response"], str)
        assert set(record["filtered"]) == {"strict-match", "flexible-extract"}
        assert record["malformed"] == float(record["filtered"]["strict-match"] == "[invalid]")
        assert record["lenient"] == record["metrics"]["exact_match,flexible-extract"]


def test_likelihoods_are_the_models_own(evaluated: tuple[Path, Outcome], checkpoint: Path) -> None:
    """The prompt is one example and the question, the continuation a space and the choice."""
    import torch

    from sdd.models.checkpoints import Checkpoint

    model, tokenizer = Checkpoint(checkpoint).model("float32"), Checkpoint(checkpoint).tokenizer()
    records = read(evaluated[1].path / "samples" / "arc_easy.jsonl")
    found = 0
    for record, (question, choices, _) in zip(records, ARC, strict=True):
        for at, (shown, others, key) in enumerate(ARC):
            answer = others["ABC".index(key)]
            prompt = f"Question: {shown}\nAnswer: {answer}\n\nQuestion: {question}\nAnswer:"
            whole = [tokenizer(f"{prompt} {choice}")["input_ids"] for choice in choices]
            start = len(tokenizer(prompt)["input_ids"])
            with torch.no_grad():
                logits = [model(torch.tensor([ids])).logits[0].double().log_softmax(-1) for ids in whole]
            expected = [
                sum(float(each[n - 1, ids[n]]) for n in range(start, len(ids)))
                for ids, each in zip(whole, logits, strict=True)
            ]
            found += record["log_likelihoods"] == pytest.approx(expected, abs=1e-3)
            assert at < len(ARC)
    assert found == len(ARC), "each question with exactly one of the examples"


def test_killed_evaluation_keeps_its_finished_tasks(
    words: list[str], evaluated: tuple[Path, Outcome], tmp_path: Path
) -> None:
    """After SIGKILL the same command gives the same bytes, from what the finished task left: marked, it shows."""
    process = spawn("evaluate", *words, cwd=tmp_path, hold="evaluated")
    process.until_holding("evaluated")
    process.kill()
    kept, begun = sorted((tmp_path / "artifacts" / ".partial" / "evaluated").glob("*/scratch/*"))
    assert (kept.name, begun.name) == ("arc_easy.jsonl", "gsm8k.0.parts")
    kept.write_text(kept.read_text().replace('"doc_hash": "', '"doc_hash": "kept'))
    path = run("evaluate", *words, cwd=tmp_path).path
    assert path.name == evaluated[1].path.name
    samples = path / "samples" / "arc_easy.jsonl"
    assert all(record["doc_hash"].startswith("kept") for record in read(samples))
    unmarked = samples.read_text().replace('"doc_hash": "kept', '"doc_hash": "')
    assert unmarked == (evaluated[1].path / "samples" / "arc_easy.jsonl").read_text()
    made, whole = (files_of(root / "artifacts").items() for root in (tmp_path, evaluated[0]))
    assert {name.partition("/samples/")[2] for name, _ in made ^ whole} == {"arc_easy.jsonl"}


def plan(words: list[str], *more: str, cwd: Path) -> str:
    outcome = run("evaluate", *words, *more, "dry_run=true", cwd=cwd)
    assert outcome.code == 0, outcome.stderr
    return outcome.lines[-1].split("evaluated/")[1].split()[0]


def test_address_is_of_what_is_asked_and_of_the_rows(
    words: list[str], rows: Path, evaluated: tuple[Path, Outcome], tmp_path: Path
) -> None:
    here = plan(words, cwd=tmp_path)
    assert here == evaluated[1].path.name
    moved = shutil.copytree(rows, tmp_path / "moved")
    assert plan(words, f"evaluation.data_dir={moved}", "evaluation.batch_size=1", cwd=tmp_path) == here
    others = [
        *(["evaluation.limit=1"], ["evaluation.num_fewshot=0"], ["evaluation.tasks=[arc_easy]"]),
        *(["evaluation.chat_template=true"], ["evaluation.system_prompt=Hm."], ["evaluation.max_new_tokens=9"]),
        *(["evaluation.dtype=bfloat16"],),
    ]
    addresses = {plan(words, *each, cwd=tmp_path) for each in others}
    with (moved / "arc_easy" / "test.jsonl").open("a") as file:
        file.write((moved / "arc_easy" / "train.jsonl").read_text().splitlines()[0] + "\n")
    addresses.add(plan(words, f"evaluation.data_dir={moved}", cwd=tmp_path))
    assert len(addresses | {here}) == len(others) + 2


def test_a_dry_run_of_hub_data_needs_no_hub(checkpoint: Path, tmp_path: Path) -> None:
    words = ["model=local", f"model.path={checkpoint}", "pruning=none", "finetune=none", "evaluation=openllm_v1"]
    assert plan(words, cwd=tmp_path)


def test_prompts_that_are_cut_are_counted(words: list[str], rows: Path, tmp_path: Path) -> None:
    long = shutil.copytree(rows, tmp_path / "long")
    row = json.loads((long / "arc_easy" / "test.jsonl").read_text().splitlines()[0])
    row["question"] = "What is very hot? " * 100
    (long / "arc_easy" / "test.jsonl").write_text(json.dumps(row) + "\n")
    more = ["evaluation.tasks=[arc_easy]", f"evaluation.data_dir={long}", "evaluation.limit=1"]
    outcome = run("evaluate", *words, *more, cwd=tmp_path)
    assert outcome.path.is_dir()
    assert "arc_easy: lm-eval cut 2 requests to the model's 256 tokens, from the left" in outcome.stderr


def test_tasks_are_built_once_a_job(
    small: list[str], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where other artifacts come first, the rows are read before them, and the same tasks are run after."""
    built: list[str] = []
    real = Benchmark.build
    monkeypatch.setattr(Benchmark, "build", lambda self, name, files: built.append(name) or real(self, name, files))
    words = ["finetune=none", "evaluation=lm_eval", "evaluation.tasks=[arc_easy]", f"evaluation.data_dir={rows}"]
    outcome = run("evaluate", *small, *words, cwd=tmp_path)
    assert [artifact.split("/")[0] for artifact in outcome.built] == ["scores", "pruned", "evaluated"], outcome.stderr
    assert built == ["arc_easy"]


MISTAKES = {
    "suite": (["evaluation.suite=openllm"], "evaluation.suite=openllm is unknown; choose one of tiny, openllm_v1, "),
    "task outside the suite": (["evaluation=openllm_v1", "evaluation.num_fewshot=null"], "is not in openllm_v1"),
    "no names": (["evaluation.tasks=null"], "evaluation=lm_eval needs names"),
    "split": (["evaluation.split=test"], "set evaluation.split=null"),
    "limit": (["evaluation.limit=0"], "evaluation.limit=0 must be an integer of at least 1"),
    "shots": (["evaluation.num_fewshot=-1"], "evaluation.num_fewshot=-1 must be an integer of at least 0"),
    "no folder": (["evaluation.data_dir=nowhere"], "evaluation.data_dir=nowhere: no such folder"),
    "no file": (["evaluation.tasks=[piqa]"], "piqa needs piqa/validation.jsonl"),
    "too many examples": (["evaluation.num_fewshot=4"], "arc_easy shows 4 examples, but 3 rows are there"),
    "too many tokens": (["evaluation.max_new_tokens=256"], "gsm8k generates up to 256 tokens, but the model's context"),
    "tiny with rows": (["evaluation=tiny"], "evaluation.data_dir belongs to lm-eval's tasks"),
    "no network": (["evaluation.data_dir=null"], "arc_easy: the rows of allenai/ai2_arc cannot be fetched"),
}


@pytest.mark.parametrize(("more", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake_is_one_line(more: list[str], message: str, words: list[str], tmp_path: Path) -> None:
    kept = [word for word in words if word.split("=")[0] not in {each.split("=")[0] for each in more}]
    outcome = run("evaluate", *kept, *more, cwd=tmp_path)
    assert (outcome.code, outcome.stdout, len(outcome.errors)) == (2, "", 1), outcome.stderr
    assert message in outcome.errors[0]
    assert "Traceback" not in outcome.stderr
    assert not list((tmp_path / "artifacts").glob("[a-z]*/*"))
    assert not list((tmp_path / "artifacts" / ".partial").glob("*/*/*"))
