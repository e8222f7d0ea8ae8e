"""Which arms are contrasted beyond one base and dataset: merges with their students, and arms with a baseline."""

import json
from pathlib import Path
from typing import Any

import pytest

from sdd.errors import UserError
from sdd.report import write_report
from sdd.report.__main__ import main
from sdd.report.library import find_evaluated


@pytest.fixture(autouse=True)
def tables_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdd.report.plots.write_plots", lambda study, out: None)
    monkeypatch.setattr("sdd.report.page.write_page", lambda *parts: None)


def differences(artifacts: Any, out: Path, *baselines: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Contrasts of the average that the tables show, by arms."""
    write_report(find_evaluated(artifacts.root), artifacts.root, out, baselines)
    rows = json.loads((out / "contrasts.json").read_text())
    shown = [row for row in rows if row["measure"] == "average" and row["comparable"]]
    return {(row["a"], row["b"]): row for row in shown}


def right(count: int) -> dict[str, list[int]]:
    return {"add": [1] * count + [0] * (40 - count)}


def test_arms_tuned_by_themselves_are_compared_where_no_settings_are_equal(artifacts, tmp_path):
    """Two rates of one way and one of the other: the two at the same rate, and beside them each at its own."""
    pruned = artifacts.pruned(4)

    def evaluated(mode: str, rate: float, count: int) -> None:
        for seed in (0, 1):
            artifacts.evaluated(artifacts.tuned(pruned, artifacts.targets(mode), seed, rate), right(count + seed))

    evaluated("sft", 3e-4, 10)
    evaluated("self_distill", 3e-3, 20)
    assert [*differences(artifacts, tmp_path)] == [("self_distill lr=0.003", "sft lr=0.0003")]
    words = (tmp_path / "table.md").read_text().rpartition("## In words")[2]
    assert "- self_distill lr=0.003 minus sft lr=0.0003, each at its own learning rate: +25.0 [" in words
    evaluated("sft", 3e-3, 5)
    shown = differences(artifacts, tmp_path)
    assert {("self_distill lr=0.003", "sft lr=0.003"), ("self_distill lr=0.003", "sft lr=0.0003")} <= shown.keys()
    table = (tmp_path / "table.md").read_text()
    (header,) = (line for line in table.splitlines() if "each at its own" in line and line.startswith("|"))
    (equal, own) = (line.split("|") for line in table.splitlines() if line.startswith("| self_distill lr=0.003 - sft"))
    place = [name.strip() for name in header.split("|")].index("each at its own")
    assert {equal[1].split()[-1]: equal[place].strip(), own[1].split()[-1]: own[place].strip()} == {
        "lr=0.003": "",
        "lr=0.0003": "learning rate",
    }
    assert "self_distill lr=0.003 minus sft lr=0.0003, each at its own learning rate: +25.0 [" in table
    for rate in (1e-3, 1e-2):  # of a grid that pair beside, whose arms score best
        evaluated("sft", rate, 15)
        evaluated("self_distill", rate, 16)
    shown = differences(artifacts, tmp_path)
    across = {(a, b) for a, b in shown if a.startswith("self_distill") and b.startswith("sft")}
    equal = {(f"self_distill lr={rate}", f"sft lr={rate}") for rate in ("0.001", "0.003", "0.01")}
    assert len(across - equal) == 1 and ("self_distill lr=0.003", "sft lr=0.0003") not in across


def test_a_merge_is_compared_with_each_of_its_students_and_no_other(artifacts, tmp_path):
    pruned = artifacts.pruned(4)
    for seed in (0, 1):
        students = []
        for dataset, count in (("one", 10), ("two", 20), ("three", 30)):
            students.append(artifacts.tuned(pruned, artifacts.targets("self_distill", dataset), seed))
            artifacts.evaluated(students[-1], right(count + seed))
        merged = artifacts.put("merged", {"method": "slerp", "t": 0.5}, {"a": students[0], "b": students[1]})
        artifacts.evaluated(merged, right(25 + seed))
    found = differences(artifacts, tmp_path / "out")
    name = "merged one+two"
    assert {b for a, b in found if a == name} == {"self_distill one", "self_distill two"}
    assert found[name, "self_distill one"]["mean"] == pytest.approx(15 / 40)
    assert found[name, "self_distill two"]["mean"] == pytest.approx(5 / 40)
    assert found[name, "self_distill two"]["seeds"] == [0, 1]
    assert "merged one+two - self_distill two" in (tmp_path / "out" / "table.md").read_text()


def test_merges_of_one_pair_are_named_by_their_method_and_baselines_tell_them_apart(artifacts, tmp_path):
    pruned = artifacts.pruned(4)
    datasets = ("one", "two")
    students = [artifacts.tuned(pruned, artifacts.targets("self_distill", name), 0) for name in datasets]
    for method, count in (("slerp", 20), ("linear", 18), ("ties", 4)):
        merged = artifacts.put("merged", {"method": method}, {"a": students[0], "b": students[1]})
        artifacts.evaluated(merged, right(count))
    found = differences(artifacts, tmp_path / "out", "merge=linear")
    against = {pair for pair, row in found.items() if row["baseline"]}
    assert against == {(f"merged {method}", "merged linear") for method in ("slerp", "ties")}


@pytest.fixture
def criteria(artifacts: Any) -> Any:
    """Two criteria of two sizes, untuned and tuned in two ways, one of them at two ranks."""
    for metric, gain, first in (("angular", 0, 2), ("random", -5, 1)):
        for size in (2, 4):
            pruned = artifacts.pruned(size, metric, [first + block for block in range(size)])
            artifacts.evaluated(pruned, right(10 + gain - size))
            for mode, extra in (("sft", 10), ("self_distill", 20)):
                targets = artifacts.targets(mode)
                artifacts.evaluated(artifacts.tuned(pruned, targets, 0), right(10 + gain - size + extra))
            artifacts.evaluated(artifacts.tuned(pruned, artifacts.targets("sft"), 0, rank=32), right(40))
    return artifacts


def test_criteria_against_one_of_them_at_equal_size_mode_and_settings(criteria, tmp_path):
    found = differences(criteria, tmp_path / "out", "metric=random")
    against = {pair: row for pair, row in found.items() if row["baseline"]}
    words = ("sft", "self_distill", "pruned")
    assert len(against) == 2 * 4
    for a, b in against:
        assert a.split() == [word if word != "random" else "angular" for word in b.split()]
        assert a.split()[0] in words
    untuned = against["pruned n4 angular", "pruned n4 random"]
    assert (untuned["mean"], untuned["seeds"]) == (pytest.approx(5 / 40), [])
    assert found["self_distill n2 angular rank=8", "sft n2 angular rank=8"]["baseline"] == ""
    assert "## Differences to metric=random, paired" in (tmp_path / "out" / "table.md").read_text()


def test_a_setting_by_its_dotted_name(criteria, tmp_path):
    found = differences(criteria, tmp_path / "out", "adapter.rank=8.0")
    against = {pair for pair, row in found.items() if row["baseline"]}
    assert against == {
        (f"sft n{size} {metric} rank=32", f"sft n{size} {metric} rank=8")
        for size in (2, 4)
        for metric in ("angular", "random")
    }


@pytest.mark.parametrize(
    ("baseline", "words"),
    [
        ("metric=anguler", "no arm has this value; there are angular, random"),
        (
            "adapter.ranc=8",
            "no arm has adapter.ranc; what differs is finetune, metric, pruning, dataset, merge, adapter.rank",
        ),
        ("metric", "no arm has this value"),
    ],
)
def test_an_unknown_baseline_is_refused_before_anything_is_written(criteria, tmp_path, baseline, words):
    with pytest.raises(UserError, match=words):
        differences(criteria, tmp_path / "out", baseline)
    assert not (tmp_path / "out").exists()


def test_the_command_takes_baselines(criteria, tmp_path, capsys):
    assert main([str(criteria.root), "--out", str(tmp_path / "out"), "--baseline", "metric=angular"]) == 0
    assert "Differences to metric=angular" in capsys.readouterr().err
    assert main([str(criteria.root), "--out", str(tmp_path / "no"), "--baseline", "metric=x"]) == 2
    assert capsys.readouterr().err.startswith("error: --baseline metric=x")
