"""lm-eval's tasks by name: what is asked, which rows are read, and what outcomes come to; all without a model."""

import gzip
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetInfo, SplitDict, SplitInfo
from datasets.arrow_writer import ArrowWriter

from sdd.errors import UserError
from sdd.evaluation import definitions, safety
from sdd.evaluation.benchmark import Benchmark, Outcome, chosen_metric
from sdd.evaluation.definitions import _folders_with, find, packaged
from sdd.evaluation.hub import rows_at
from sdd.evaluation.suites import REVISIONS, SUITES, asked
from sdd.store import digest_of

ARC = {
    "id": "a",
    "question": "Which is hot?",
    "choices": {"text": ["ice", "fire"], "label": ["A", "B"]},
    "answerKey": "B",
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A folder with three rows of ARC in each split, told apart by their question."""
    for split in ("train", "validation", "test"):
        write(tmp_path / "rows" / "arc_easy" / f"{split}.jsonl", [ARC | {"question": f"{split} {n}"} for n in range(3)])
    return tmp_path / "rows"


# ---- suites ----------------------------------------------------------------------------------------------------------


def test_openllm_v1_has_the_leaderboards_shots_and_metrics() -> None:
    assert {each.task: (each.shots, each.metric) for each in asked("openllm_v1", None, None)} == {
        "arc_challenge": (25, "acc_norm,none"),
        "hellaswag": (10, "acc_norm,none"),
        "truthfulqa_mc2": (0, "acc,none"),
        "mmlu": (5, "acc,none"),
        "winogrande": (5, "acc,none"),
        "gsm8k": (5, "exact_match,strict-match"),
    }


def test_every_task_of_the_suites_is_defined_in_lm_eval_and_states_its_metric() -> None:
    for suite, tasks in SUITES.items():
        if not tasks:
            continue
        for entry, each in zip(Benchmark(suite, None, None).entries, tasks, strict=True):
            assert entry.name == each.task
            assert len(entry.tasks) == (57 if entry.name == "mmlu" else 1)
            for task in entry.tasks:
                metric, _, filtered = str(each.metric).partition(",")
                assert metric in {known["metric"] for known in task.setting("metric_list")}
                assert filtered in {known["name"] for known in task.setting("filter_list") or [{"name": "none"}]}


def test_tasks_of_a_suite_are_kept_in_its_order() -> None:
    assert [each.task for each in asked("openllm_v1", ["gsm8k", "mmlu"], None)] == ["mmlu", "gsm8k"]
    assert [(each.task, each.shots) for each in asked("lm_eval", ["piqa", "arc_easy"], 3)] == [
        ("arc_easy", 3),
        ("piqa", 3),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lm_eval", None, None), "evaluation=lm_eval needs names"),
        (("openllm_v1", None, 3), r"evaluation\.num_fewshot belongs to evaluation=lm_eval; openllm_v1 has its own"),
        (
            ("openllm_v1", ["piqa"], None),
            r"piqa is not in openllm_v1; choose from arc_challenge, .*gsm8k, or ",
        ),
    ],
)
def test_wrong_questions_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        asked(*arguments)


# ---- definitions -----------------------------------------------------------------------------------------------------


def test_groups_are_taken_apart_and_tags_are_their_tasks() -> None:
    (mmlu,) = find(["mmlu"])
    assert (mmlu.is_group, mmlu.weight_by_size, len(mmlu.tasks)) == (True, True, 57)
    assert [entry.name for entry in find(["ai2_arc"])] == ["arc_challenge", "arc_easy"]


def test_splits_and_shots_are_lm_evals() -> None:
    found = {entry.name: entry.tasks[0] for entry in find(["arc_easy", "hellaswag", "gsm8k", "truthfulqa_mc2", "race"])}
    splits = {name: (task.evaluated_split, task.shots_split) for name, task in found.items()}
    assert splits == {
        "arc_easy": ("test", "train"),
        "hellaswag": ("validation", "train"),
        "gsm8k": ("test", "train"),
        "truthfulqa_mc2": ("validation", "validation"),
        "race": ("test", "test"),
    }
    assert [found["gsm8k"].shots(None), found["gsm8k"].shots(0), found["gsm8k"].shots(8)] == [5, 0, 8]
    assert found["truthfulqa_mc2"].shots(8) == 0, "a task that is defined with no examples keeps to none"
    assert (found["arc_easy"].shots(None), found["arc_easy"].shots(25)) == (0, 25)
    assert find(["mmlu_anatomy"])[0].tasks[0].shots_split == "dev"


def test_digest_covers_settings_and_functions_and_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (hellaswag,) = find(["hellaswag"])
    (task,) = hellaswag.tasks
    copy = tmp_path / "elsewhere"
    shutil.copytree(packaged() / "hellaswag", copy / "hellaswag")
    moved = dict(task.config) | {"process_docs": str(copy / "hellaswag" / "utils.process_docs")}
    before = task.digest()
    with monkeypatch.context() as patch:
        patch.setattr("sdd.evaluation.definitions.packaged", lambda: copy)
        there = type(task)(task.name, moved, task.overrides, copy / "hellaswag")
        assert there.digest() == before
        (copy / "hellaswag" / "utils.py").write_text("def process_docs(dataset): return dataset")
        assert there.digest() != before
    assert type(task)(task.name, task.config | {"doc_to_text": "{{ctx}}"}, {}, task.home).digest() != before
    assert type(task)(task.name, task.config, {"fewshot_split": "validation"}, task.home).digest() != before


def test_digest_does_not_depend_on_how_the_package_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual environment may be a link; lm-eval names functions by their real place."""
    names = ["hellaswag", "truthfulqa_mc2", "race", "mmlu_anatomy"]
    before = [(entry.name, entry.tasks[0].digest()) for entry in find(names)]
    (tmp_path / "lm_eval").symlink_to(packaged().parent)
    monkeypatch.setattr("lm_eval.__file__", str(tmp_path / "lm_eval" / "__init__.py"))
    monkeypatch.setattr(definitions, "_index", definitions._index.__wrapped__)
    through_link = find(names)
    assert [(entry.name, entry.tasks[0].digest()) for entry in through_link] == before
    for entry in through_link:
        safety.check(entry.tasks[0])


def test_digest_of_an_entry_covers_the_examples_shown() -> None:
    digests = [Benchmark("lm_eval", ["arc_easy"], shots).digests()["arc_easy"] for shots in (None, 0, 5)]
    assert digests[0] == digests[1] != digests[2]


def test_a_name_that_lm_eval_has_not_is_answered_with_near_ones() -> None:
    with pytest.raises(UserError, match=r"lm-eval has no task helaswag; did you mean .*hellaswag"):
        find(["arc_easy", "helaswag"])
    with pytest.raises(UserError, match=r"mmlu_anatomy is in both mmlu and mmlu_anatomy"):
        find(["mmlu", "mmlu_anatomy"])


@pytest.mark.parametrize(
    ("name", "folders"),
    [
        ("mlqa", {"mlqa"}),  # a tag that only a file without an ending has, which others include
        ("flores_afr-eng", {"afrobench"}),
        ("arc_easy.yaml", set()),
        ("~", set()),
        ("", set()),
    ],
)
def test_a_name_is_looked_for_where_definitions_have_it_as_a_word(name: str, folders: set[str]) -> None:
    assert _folders_with(name) == folders


def test_hub_data_is_pinned_where_its_commit_is_known() -> None:
    assert Benchmark("openllm_v1", None, None).revisions() == {
        name: REVISIONS[name]
        for name in (
            *("Rowan/hellaswag", "allenai/ai2_arc", "allenai/winogrande", "cais/mmlu"),
            *("openai/gsm8k", "truthfulqa/truthful_qa"),
        )
    }
    assert Benchmark("lm_eval", ["social_iqa"], None).revisions() == {"lighteval/siqa": "main"}
    assert all(len(revision) == 40 for revision in REVISIONS.values())


def test_kept_rows_of_another_commit_are_not_taken_for_these(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a hub the library itself takes the ones that came last."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    commit, other, neither = ("a" * 40, "b" * 40, "c" * 40)
    for kept in (commit, other):
        folder = tmp_path / "allenai___ai2_arc" / "ARC-Easy" / "0.0.0" / kept
        folder.mkdir(parents=True)
        rows = Dataset.from_list([ARC | {"question": f"{kept}?"}])
        with ArrowWriter(path=str(folder / "ai2_arc-test.arrow"), features=rows.features) as writer:
            writer.write_table(rows.data.table)
            writer.finalize()
        split = SplitInfo("test", num_examples=1, dataset_name="ai2_arc")
        facts = {"config_name": "ARC-Easy", "dataset_name": "ai2_arc", "splits": SplitDict({"test": split})}
        DatasetInfo(features=rows.features, **facts).write_to_directory(str(folder))
    assert rows_at("allenai/ai2_arc", "ARC-Easy", commit)["test"]["question"][:] == [f"{commit}?"]
    message = f"the hub cannot be reached, and the rows that are kept are those of commit {other}, not of {neither}"
    with pytest.raises(UserError, match=message):
        rows_at("allenai/ai2_arc", "ARC-Easy", neither)


# ---- local rows ------------------------------------------------------------------------------------------------------


def test_only_the_splits_that_are_needed_are_read(rows: Path) -> None:
    none, five = (Benchmark("lm_eval", ["arc_easy"], shots).local_files(rows) for shots in (None, 2))
    assert none == {"arc_easy/test": rows / "arc_easy" / "test.jsonl"}
    assert set(five) == {"arc_easy/test", "arc_easy/train"}


def test_data_is_known_by_content_not_by_place(rows: Path, tmp_path: Path) -> None:
    benchmark = Benchmark("lm_eval", ["arc_easy"], 2)
    spec, sources = benchmark.data(str(rows), tmp_path / "memory")
    assert sources == {spec["files"]["arc_easy/test"]: rows / "arc_easy" / "test.jsonl"} | {
        spec["files"]["arc_easy/train"]: rows / "arc_easy" / "train.jsonl"
    }
    moved = shutil.copytree(rows, tmp_path / "moved")
    assert benchmark.data(str(moved), tmp_path / "memory")[0] == spec
    write(moved / "arc_easy" / "validation.jsonl", [ARC])
    assert benchmark.data(str(moved), tmp_path / "memory")[0] == spec, "not read"
    write(moved / "arc_easy" / "train.jsonl", [ARC, ARC])
    assert benchmark.data(str(moved), tmp_path / "memory")[0] != spec


def zipped(path: Path) -> None:
    with gzip.open(path.with_suffix(".jsonl.gz"), "wb") as file:
        file.write(path.read_bytes())


def as_parquet(path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list([json.loads(line) for line in path.read_text().splitlines()]).to_parquet(
        path.with_suffix(".parquet")
    )


@pytest.mark.parametrize("store", [None, zipped, as_parquet])
def test_rows_reach_lm_evals_task(store: Any, rows: Path) -> None:
    if store:
        for path in (rows / "arc_easy").glob("*.jsonl"):
            store(path)
            path.unlink()
    benchmark = Benchmark("lm_eval", ["arc_easy"], 2)
    task = benchmark.build("arc_easy", benchmark.local_files(rows))
    assert [doc["question"] for doc in task.eval_docs] == ["test 0", "test 1", "test 2"]
    context = task.fewshot_context(task.eval_docs[0], 2)
    assert context.count("Question: train ") == 2
    assert context.endswith("Question: test 0\nAnswer:")
    assert task.doc_to_target(task.eval_docs[0]) == 1


def test_a_subject_takes_its_rows_from_the_common_file(tmp_path: Path) -> None:
    question = {"choices": ["0", "1", "2", "3"], "answer": 2}
    for split, number in (("dev", 5), ("test", 2)):
        subjects = ["anatomy", "astronomy"] * number
        common = [question | {"question": f"{split} {n}", "subject": each} for n, each in enumerate(subjects)]
        write(tmp_path / "mmlu" / f"{split}.jsonl", common)
    benchmark = Benchmark("lm_eval", ["mmlu_astronomy"], 5)
    task = benchmark.build("mmlu_astronomy", benchmark.local_files(tmp_path))
    assert [doc["question"] for doc in task.eval_docs] == ["test 1", "test 3"]
    context = task.fewshot_context(task.eval_docs[0], 5)
    assert [line for line in context.splitlines() if line[:3] == "dev"] == [f"dev {n}" for n in (1, 3, 5, 7, 9)]
    other = Benchmark("lm_eval", ["mmlu_virology"], 5)
    with pytest.raises(UserError, match=r"dev\.jsonl has no row of the subject 'virology'|test\.jsonl has no row"):
        other.build("mmlu_virology", other.local_files(tmp_path))


BROKEN = {
    "not JSON": (json.dumps(ARC) + "\n{oops\n", "line 2 is not valid JSON"),
    "no field": (json.dumps(ARC) + '\n{"id": "b"}\n', "line 2 has no field 'answerKey'"),
    "empty": ("", "is empty"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_task_file_is_named_by_its_line(text: str, message: str, rows: Path) -> None:
    path = rows / "arc_easy" / "test.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        Benchmark("lm_eval", ["arc_easy"], None).local_files(rows)
    assert str(path) in str(error.value)


def test_missing_files_are_named(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.data_dir=.*nowhere: no such folder"):
        Benchmark("lm_eval", ["arc_easy"], None).local_files(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"piqa needs piqa/validation\.jsonl \(or .*\), which is not"):
        Benchmark("lm_eval", ["arc_easy", "piqa"], None).local_files(rows)
    with pytest.raises(UserError, match=r"truthfulqa_mc2 needs truthfulqa_mc/validation\.jsonl"):
        Benchmark("lm_eval", ["truthfulqa_mc2"], None).local_files(rows)


def test_damaged_parquet_is_named(rows: Path) -> None:
    (rows / "arc_easy" / "test.jsonl").unlink()
    (rows / "arc_easy" / "test.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(UserError, match=r"test\.parquet: not a complete Parquet file"):
        Benchmark("lm_eval", ["arc_easy"], None).local_files(rows)


def test_rows_of_another_kind_and_too_few_examples_are_refused(rows: Path) -> None:
    benchmark = Benchmark("lm_eval", ["arc_easy"], 4)
    with pytest.raises(UserError, match=r"train\.jsonl: arc_easy shows 4 examples, but 3 rows are there"):
        benchmark.build("arc_easy", benchmark.local_files(rows))
    write(rows / "arc_easy" / "test.jsonl", [{"question": "q", "choices": ["a"]}])
    benchmark = Benchmark("lm_eval", ["arc_easy"], None)
    with pytest.raises(UserError, match=r"rows of arc_easy do not have the fields that lm-eval's arc_easy reads"):
        benchmark.build("arc_easy", benchmark.local_files(rows))


def test_no_network_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match=r"arc_easy: the rows of allenai/ai2_arc cannot be fetched .*data_dir$"):
        Benchmark("lm_eval", ["arc_easy"], None).build("arc_easy", None)


# ---- results ---------------------------------------------------------------------------------------------------------


def outcome(scores: list[float]) -> Outcome:
    mean = sum(scores) / len(scores)
    error = math.sqrt(sum((score - mean) ** 2 for score in scores) / (len(scores) - 1) / len(scores))
    records = [{"doc_id": number, "metrics": {"acc,none": score}} for number, score in enumerate(scores)]
    return Outcome({"acc,none": [mean, error]}, ["acc,none"], records)


BY_SIZE = {"value": 113 / 116, "stderr": math.sqrt(3 * 0.25 / (116 - 57)) / math.sqrt(116)}  # of a pooled variance
PLAIN = {"value": 56.25 / 57, "stderr": 0.25 / 57}


@pytest.mark.parametrize(
    ("suite", "expected", "other", "beside"),
    [("openllm_v1", PLAIN, "size_weighted", BY_SIZE), ("lm_eval", BY_SIZE, "unweighted", PLAIN)],
)
def test_mmlu_is_the_leaderboards_plain_mean_or_lm_evals_by_size(
    suite: str, expected: dict[str, float], other: str, beside: dict[str, float]
) -> None:
    """One subject with 1 of 4 right and 56 with 2 of 2: 113 of 116, where the mean over subjects is 56.25 of 57."""
    benchmark = Benchmark(suite, ["mmlu"], None)
    outcomes = {task.name: outcome([1.0, 1.0]) for task in benchmark.tasks}
    outcomes["mmlu_anatomy"] = outcome([1.0, 0.0, 0.0, 0.0])
    counted, apart, records = benchmark.results(outcomes)
    found = counted["mmlu"]
    assert apart == {}
    assert (found["metric"], found["n"], found["num_fewshot"]) == ("acc", 116, 5 if suite == "openllm_v1" else 0)
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert found[other] == pytest.approx(beside)
    assert found["weight_by_size"] == (suite == "lm_eval")
    assert found["subtasks"]["mmlu_anatomy"] == {"value": 0.25, "stderr": pytest.approx(0.25), "n": 4}
    assert sum(record["score"] for record in records["mmlu"]) == 113
    assert len({record["id"] for record in records["mmlu"]}) == 116
    assert {record["task"] for record in records["mmlu"]} == set(outcomes)


def test_how_a_group_is_weighted_is_in_its_digest_only_where_it_is_not_lm_evals_way() -> None:
    ours, theirs = (
        Benchmark(suite, ["mmlu"], 5 if suite == "lm_eval" else None) for suite in ("openllm_v1", "lm_eval")
    )
    tasks = {task.name: [task.digest(), 5] for task in theirs.tasks}
    assert theirs.digests() == {"mmlu": digest_of({"tasks": tasks, "metric": None})}
    assert ours.digests() == {"mmlu": digest_of({"tasks": tasks, "metric": "acc,none", "weight_by_size": False})}


def test_strict_counts_and_flexible_stands_beside_it() -> None:
    keys = ["exact_match,strict-match", "exact_match,flexible-extract"]
    answers = [(1.0, 1.0, "7"), (0.0, 1.0, "[invalid]"), (0.0, 0.0, "3"), (0.0, 0.0, "[invalid]")]
    records = [
        {"doc_id": n, "metrics": {keys[0]: strict, keys[1]: flexible}, "filtered": {"strict-match": said}}
        for n, (strict, flexible, said) in enumerate(answers)
    ]
    made = Outcome({keys[0]: [0.25, 0.25], keys[1]: [0.5, 0.29]}, keys, records)
    counted, _, rows = Benchmark("openllm_v1", ["gsm8k"], None).results({"gsm8k": made})
    assert counted["gsm8k"] == {
        "metric": "exact_match",
        "filter": "strict-match",
        "value": 0.25,
        "stderr": 0.25,
        "n": 4,
        "num_fewshot": 5,
        "lenient": 0.5,
        "malformed": 0.5,
        "others": {keys[1]: {"value": 0.5, "stderr": 0.29}},
    }
    assert [row["score"] for row in rows["gsm8k"]] == [1.0, 0.0, 0.0, 0.0]


def test_what_cannot_be_averaged_stands_beside() -> None:
    """CrowS-Pairs: a share of which less is better."""
    benchmark = Benchmark("sdmprune_zero_shot", ["piqa", "crows_pairs_english"], None)
    values = {"likelihood_diff,none": [3.0, 0.1], "pct_stereotype,none": [0.6, 0.1]}
    biased = Outcome(values, [], [{"doc_id": 0, "metrics": {"likelihood_diff,none": 3.0, "pct_stereotype,none": 1.0}}])
    right = outcome([1.0, 0.0])
    piqa = Outcome(right.values | {"acc_norm,none": [0.5, 0.5]}, ["acc,none", "acc_norm,none"], right.records)
    counted, beside, records = benchmark.results({"piqa": piqa, "crows_pairs_english": biased})
    assert list(counted) == ["piqa"]
    assert list(beside) == ["crows_pairs_english"]
    assert beside["crows_pairs_english"]["metric"] == "pct_stereotype"
    assert list(records) == ["piqa", "crows_pairs_english"]
    assert chosen_metric(values, []) == "likelihood_diff,none"
    assert chosen_metric({"word_perplexity,none": 1, "acc,none": 1}, ["acc,none"]) == "acc,none"
