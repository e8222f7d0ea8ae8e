"""The report of a small study on disk: arms, retention, contrasts, files and what it says about mistakes."""

import csv
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdd.errors import UserError
from sdd.report import write_report
from sdd.report.__main__ import main
from sdd.report.library import find_evaluated

PLOTS = {"retention_by_size.png", "tasks.png", "gain_forgetting.png", "learning_curves.png"}
TABLES = {"table.json", "table.md", "table.csv", "table.tex", "contrasts.json", "contrasts.tex"}
TABLES |= {"health.json", "health.md"}
HALF = [1, 0] * 20


@pytest.fixture
def drawn() -> None:
    """Asked for by the tests that look at plots; the others skip the drawing, which takes most of the time.

    The page has tests of its own.
    """


@pytest.fixture(autouse=True)
def only_drawn_if_asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("sdd.report.plots.write_plots", lambda study, out: None)
    monkeypatch.setattr("sdd.report.page.write_page", lambda *parts: None)


def report(artifacts: Any, out: Path, evaluated: list[Path] | None = None) -> tuple[dict[str, Any], list[Any]]:
    """Rows by arm and contrasts."""
    paths = find_evaluated(artifacts.root) if evaluated is None else evaluated
    assert write_report(paths, artifacts.root, out) == out
    rows = json.loads((out / "table.json").read_text())
    assert len({row["arm"] for row in rows}) == len(rows)
    return {row["arm"]: row for row in rows}, json.loads((out / "contrasts.json").read_text())


def one(contrasts: list[Any], a: str, b: str, measure: str = "average") -> Any:
    found = [row for row in contrasts if (row["a"], row["b"], row["measure"]) == (a, b, measure)]
    assert len(found) == 1, [(row["a"], row["b"], row["measure"]) for row in contrasts]
    return found[0]


def scores(**tasks: list[int]) -> dict[str, list[int]]:
    return tasks


def test_rows_of_a_study(study, tmp_path):
    rows, _ = report(study, tmp_path / "out")
    assert list(rows) == [
        "teacher",
        "control sft",
        *("pruned n2", "sft n2", "self_distill n2"),
        *("pruned n4", "sft n4", "self_distill n4"),
    ]
    row = rows["self_distill n4"]
    assert (row["finetune"], row["metric"], row["pruning"], row["dataset"], row["merge"]) == (
        *("self_distill", "angular", "n4", "tiny_math"),
        "none",
    )
    assert row["seeds"] == [0, 1, 2]
    assert len(row["addresses"]) == 3
    assert row["settings"] == {}
    assert (row["parameters"], row["flops_saved"]) == (880, pytest.approx(320 / 1200))
    assert rows["pruned n4"]["finetune"] == "none"
    assert rows["pruned n4"]["seeds"] == []
    assert (rows["teacher"]["pruning"], rows["teacher"]["parameters"]) == ("none", 1200)
    assert (rows["control sft"]["pruning"], rows["control sft"]["flops_saved"]) == ("none", 0.0)


def test_values_are_those_of_the_samples(study, tmp_path):
    rows, _ = report(study, tmp_path / "out")
    row = rows["sft n4"]
    results = [json.loads((study.root / "evaluated" / a / "results.json").read_text()) for a in row["addresses"]]
    for task, value in row["tasks"].items():
        assert value["mean"] == pytest.approx(np.mean([each["tasks"][task]["value"] for each in results]))
        assert value["low"] < value["mean"] < value["high"]
        assert value["n"] == 120
    assert row["average"]["mean"] == pytest.approx(np.mean([each["average"] for each in results]))
    assert row["tasks"]["add"]["lenient"] == pytest.approx(row["tasks"]["add"]["mean"] + 0.05)
    assert row["tasks"]["add"]["malformed"] == pytest.approx(0.02)
    assert "lenient" not in row["tasks"]["add_choice"]
    teacher = rows["teacher"]["average"]["mean"]
    assert row["retention"]["ratio_of_means"]["mean"] == pytest.approx(row["average"]["mean"] / teacher)
    ratios = [row["tasks"][task]["mean"] / rows["teacher"]["tasks"][task]["mean"] for task in row["tasks"]]
    assert row["retention"]["mean_of_ratios"]["mean"] == pytest.approx(np.mean(ratios))
    assert rows["teacher"]["retention"]["ratio_of_means"] == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_trained_on_counts_the_choice_form_of_a_family(study, tmp_path):
    rows, _ = report(study, tmp_path / "out")
    row = rows["sft n2"]
    trained = [row["tasks"][task]["mean"] for task in ("add", "lookup", "add_choice")]
    assert row["trained_on"]["mean"] == pytest.approx(np.mean(trained))
    assert row["not_trained_on"]["mean"] == pytest.approx(row["tasks"]["sort"]["mean"])
    assert rows["teacher"]["trained_on"] is None
    assert rows["pruned n2"]["not_trained_on"] is None


def test_findings_are_sentences_of_the_table(study, tmp_path):
    rows, contrasts = report(study, tmp_path / "out")
    words = (tmp_path / "out" / "table.md").read_text().rpartition("## In words")[2].split("\n- ")[1:]

    def said(value: dict[str, float], sign: str = "") -> str:
        mean, low, high = (f"{100 * value[name]:{sign}.1f}" for name in ("mean", "low", "high"))
        return f"{mean} [{low}, {high}]"

    pairs = {size: one(contrasts, f"self_distill {size}", f"sft {size}", "retention") for size in ("n2", "n4")}
    size, better = max(pairs.items(), key=lambda pair: rows[f"self_distill {pair[0]}"]["average"]["mean"])
    shares = (rows[f"{mode} {size}"]["retention"]["ratio_of_means"] for mode in ("self_distill", "sft"))
    ours, theirs = (said(share).replace(" ", "% ", 1) for share in shares)
    assert words[0].startswith(f"With {size[1]} blocks removed, the model keeps {ours} of what the unpruned model")
    assert f", and {theirs} on the reference answers; the difference, {said(better, '+')} points, " in words[0]
    assert words[0].endswith(("points, could be chance.", "points, is more than chance explains."))
    assert words[1] == f"The unpruned model scores {said(rows['teacher']['average'])} percent."
    student = rows["sft n4"]
    kept = said(student["retention"]["ratio_of_means"])
    assert (
        f"With 4 blocks removed, fine-tuned on the reference answers, it scores {said(student['average'])} percent, "
        f"{kept} percent of the unpruned model's (sft n4)." in words
    )
    for size in ("n2", "n4"):
        row = one(contrasts, f"self_distill {size}", f"sft {size}")
        verdict = "which could be chance" if row["low"] <= 0 <= row["high"] else "more than chance explains"
        assert f"self_distill {size} minus sft {size}: {said(row, '+')} points, {verdict}." in words
    assert words[-1].startswith(
        "This rests on one unpruned model and 4 tasks, 120 items each, split test, 3 seeds an arm;"
    )


def test_contrasts_of_a_study(study, tmp_path):
    rows, contrasts = report(study, tmp_path / "out")
    row = one(contrasts, "self_distill n4", "sft n4")
    assert row["mean"] == pytest.approx(rows["self_distill n4"]["average"]["mean"] - rows["sft n4"]["average"]["mean"])
    assert row["low"] < row["mean"] < row["high"]
    assert (row["seeds"], row["better"], row["settings_differ"]) == ([0, 1, 2], "higher", {})
    retention = one(contrasts, "self_distill n4", "sft n4", "retention")
    assert retention["mean"] == pytest.approx(row["mean"] / rows["teacher"]["average"]["mean"])
    assert one(contrasts, "self_distill n4", "sft n4", "nll")["better"] == "lower"
    assert one(contrasts, "self_distill n4", "sft n4", "nll")["mean"] == pytest.approx(-0.1)
    measures = {each["measure"] for each in contrasts if each["a"] == "sft n2"}
    assert measures == {"average", "trained_on", "not_trained_on", "retention", "nll", *study.tasks}
    assert one(contrasts, "sft n2", "pruned n2", "sort")["mean"] > 0
    assert one(contrasts, "control sft", "teacher")["seeds"] == [0, 1, 2]
    pairs = {(each["a"], each["b"]) for each in contrasts}
    assert len(pairs) == 5 + 2
    assert ("self_distill n4", "sft n2") not in pairs


def test_identical_arms_and_a_known_shift(artifacts, tmp_path):
    pruned = artifacts.pruned(4)
    targets = {mode: artifacts.targets(mode) for mode in ("sft", "self_distill")}
    for seed in (1, 2):
        same = scores(add=HALF, sort=[1] * 10 + [0] * 30)
        artifacts.evaluated(artifacts.tuned(pruned, targets["sft"], seed), same)
        artifacts.evaluated(artifacts.tuned(pruned, targets["self_distill"], seed), same)
    artifacts.evaluated(pruned, scores(add=[0] * 40, sort=[0] * 40))
    rows, contrasts = report(artifacts, tmp_path / "out")
    zero = one(contrasts, "self_distill", "sft")
    assert (zero["mean"], zero["low"], zero["high"]) == (0.0, 0.0, 0.0)
    gain = one(contrasts, "sft", "pruned")
    assert (gain["mean"], gain["low"], gain["high"]) == tuple(rows["sft"]["average"].values())
    assert rows["sft"]["average"]["mean"] == pytest.approx((0.5 + 0.25) / 2)


def test_contrast_uses_the_seeds_of_both(artifacts, tmp_path):
    pruned = artifacts.pruned(4)
    for mode, seeds in (("sft", (0, 1, 2)), ("self_distill", (1, 2, 3))):
        targets = artifacts.targets(mode)
        for seed in seeds:
            right = 10 * seed + (5 if mode == "self_distill" else 0)
            artifacts.evaluated(artifacts.tuned(pruned, targets, seed), scores(add=[1] * right + [0] * (40 - right)))
    rows, contrasts = report(artifacts, tmp_path / "out")
    row = one(contrasts, "self_distill", "sft")
    assert row["seeds"] == [1, 2]
    assert row["mean"] == pytest.approx(5 / 40)
    assert rows["self_distill"]["seeds"] == [1, 2, 3]


def test_arms_without_a_common_seed_are_not_contrasted(artifacts, tmp_path):
    pruned = artifacts.pruned(4)
    for mode, seed in (("sft", 0), ("self_distill", 1)):
        artifacts.evaluated(artifacts.tuned(pruned, artifacts.targets(mode), seed), scores(add=HALF))
    _, contrasts = report(artifacts, tmp_path / "out")
    assert contrasts == []
    assert "no seed in common" in (tmp_path / "out" / "table.md").read_text()


def test_settings_name_the_arms_and_mark_the_contrasts(artifacts, tmp_path):
    pruned = artifacts.pruned(4)
    for mode in ("sft", "self_distill"):
        for rate in (1e-3, 3e-4):
            artifacts.evaluated(artifacts.tuned(pruned, artifacts.targets(mode), 0, rate), scores(add=HALF))
    rows, contrasts = report(artifacts, tmp_path / "out")
    assert list(rows) == ["sft lr=0.0003", "sft lr=0.001", "self_distill lr=0.0003", "self_distill lr=0.001"]
    assert rows["sft lr=0.001"]["settings"] == {"finetune.learning_rate": 0.001}
    assert one(contrasts, "self_distill lr=0.001", "sft lr=0.001")["settings_differ"] == {}
    unlike = one(contrasts, "self_distill lr=0.001", "sft lr=0.0003")
    assert unlike["settings_differ"] == {"finetune.learning_rate": [0.001, 0.0003]}
    assert one(contrasts, "sft lr=0.001", "sft lr=0.0003")["settings_differ"] == unlike["settings_differ"]


def test_logit_distillation_is_an_arm_between_the_two_others(artifacts, tmp_path):
    """What only it has (teacher, temperature) sets it apart from no other arm, but one of its own from the next."""
    pruned = artifacts.pruned(4)
    for mode in ("self_distill", "sft"):
        artifacts.evaluated(artifacts.tuned(pruned, artifacts.targets(mode), 0), scores(add=HALF))
    targets = artifacts.targets("logit_distill")
    for temperature, right in ((1.0, 30), (2.0, 10)):
        distillation = {"teacher": "m" * 20, "temperature": temperature, "ce_share": 0.0}
        student = artifacts.tuned(pruned, targets, 0, distillation=distillation)
        artifacts.evaluated(student, scores(add=[1] * right + [0] * (40 - right)))
    rows, contrasts = report(artifacts, tmp_path / "out")
    first, second = "logit_distill temperature=1", "logit_distill temperature=2"
    assert list(rows) == ["sft", first, second, "self_distill"]
    for a, b, mean in (("self_distill", first, -0.25), ("self_distill", second, 0.25), (first, "sft", 0.25)):
        assert one(contrasts, a, b)["mean"] == pytest.approx(mean)
        assert one(contrasts, a, b)["settings_differ"] == {}
    assert one(contrasts, second, first)["settings_differ"] == {"distillation.temperature": [2.0, 1.0]}


def test_a_long_setting_is_named_in_short(artifacts, tmp_path):
    pruned = artifacts.pruned(4)
    templates = ["Task: {prompt}\nReference answer: {reference}\n" + "Please answer it. " * 9 + end for end in "ab"]
    for template in (*templates, "{prompt}"):
        rewrites = artifacts.put("rewrites", {"teacher": "m" * 20, "template": template}, {})
        files = {"summary.json": {"rows": 1, "reasons": {}}}
        targets = artifacts.put("targets", {"mode": "self_distill"}, {"rewrites": rewrites}, **files)
        artifacts.evaluated(artifacts.tuned(pruned, targets, 0), scores(add=HALF))
    rows, _ = report(artifacts, tmp_path / "out")
    assert "self_distill request=alone" in rows
    names = [name.split("template=")[1] for name in rows if "request" not in name]
    assert len(set(names)) == 2
    assert all(len(name) < 70 and "\n" not in name and name.startswith("Task: {prompt} Ref") for name in names)


def test_data_are_named_by_what_describes_them_rather_than_by_a_digest(artifacts, tmp_path):
    pruned = artifacts.pruned(4)
    for described in ({}, {"register": "mild"}, {"register": "strong"}):
        data = {"digest": hashlib.sha256(str(described).encode()).hexdigest(), **described}
        targets = artifacts.put("targets", {"mode": "sft", "dataset": data}, {}, **{"summary.json": {"rows": 1}})
        artifacts.evaluated(artifacts.tuned(pruned, targets, 0), scores(add=HALF))
    rows, _ = report(artifacts, tmp_path / "out")
    assert set(rows) == {"sft", "sft register=mild", "sft register=strong"}


def test_number_of_rows_differs_across_modes(artifacts, tmp_path):
    pruned = artifacts.pruned(4)
    artifacts.evaluated(artifacts.tuned(pruned, artifacts.targets("sft"), 0), scores(add=HALF))
    fewer = artifacts.targets("self_distill", num_rows=100)
    artifacts.evaluated(artifacts.tuned(pruned, fewer, 0), scores(add=HALF))
    _, contrasts = report(artifacts, tmp_path / "out")
    assert one(contrasts, "self_distill", "sft")["settings_differ"] == {"targets.num_rows": [100, 500]}


def test_metrics_datasets_blocks_and_sizes_are_named(artifacts, tmp_path):
    for metric in ("angular", "block_influence"):
        artifacts.evaluated(artifacts.pruned(2, metric), scores(add=HALF))
    blocks = artifacts.pruned(metric=None, blocks=[3, 6])
    for dataset in ("tiny_math", "tiny_instruct"):
        artifacts.evaluated(artifacts.tuned(blocks, artifacts.targets("sft", dataset), 0), scores(add=HALF))
    rows, contrasts = report(artifacts, tmp_path / "out")
    assert set(rows) == {
        *("pruned n2 angular", "pruned n2 block_influence"),
        *("sft blocks 3,6 tiny_math", "sft blocks 3,6 tiny_instruct"),
    }
    assert rows["sft blocks 3,6 tiny_math"]["pruning"] == "blocks 3,6"
    assert rows["sft blocks 3,6 tiny_math"]["metric"] is None
    assert contrasts == []
    assert "`finetune=none`" in (tmp_path / "out" / "table.md").read_text()


def test_merged_arm_is_one_arm_over_seeds(artifacts, tmp_path):
    pruned = artifacts.pruned(4)
    for seed in (0, 1):
        parents = [artifacts.tuned(pruned, artifacts.targets("self_distill", name), seed) for name in ("one", "two")]
        merged = artifacts.put("merged", {"method": "slerp", "t": 0.5}, {"a": parents[0], "b": parents[1]})
        artifacts.evaluated(merged, scores(add=HALF))
        artifacts.evaluated(parents[0], scores(add=[0] * 40))
    artifacts.evaluated(pruned, scores(add=[0] * 40))
    rows, contrasts = report(artifacts, tmp_path / "out")
    assert set(rows) == {"pruned", "self_distill one", "merged one+two"}
    row = rows["merged one+two"]
    assert (row["merge"], row["finetune"], row["dataset"], row["seeds"]) == ("slerp", "self_distill", "one+two", [0, 1])
    assert one(contrasts, "merged one+two", "pruned")["mean"] == 0.5


def test_width_pruning_is_named_and_sorted_last(artifacts, tmp_path):
    info = {"kind": "width", "metric": "sdm", "size": None, "start": None, "removed_blocks": [], "score": None}
    info |= {"ratio": 0.2, "ratio_of": "all", "width_before": 40, "width_after": 24}
    info |= {"kept_blocks": [0, 1], "parameters_before": 1200, "parameters_after": 1000, "flops_saved": 0.16}
    depth = artifacts.pruned(6)
    order = artifacts.put("scores", {"metric": "sdm"}, {})
    for ratio, of in [(0.2, "all"), (0.307, "mlp"), (0.1, "all")]:
        spec = {"model": "m" * 20, "ratio": ratio, "ratio_of": of}
        cut = {"pruning.json": info | {"ratio": ratio, "ratio_of": of}}
        artifacts.evaluated(artifacts.put("pruned", spec, {"scores": order}, **cut), scores(add=HALF))
    artifacts.evaluated(depth, scores(add=HALF))
    both = info | {"kind": "depth+width", "metric": "angular+sdm", "size": 6, "start": 2, "score": 0.1}
    both |= {"removed_blocks": [2, 3, 4, 5, 6, 7], "kept_blocks": [0, 1, 8, 9, 10, 11]}
    inputs = {"scores": artifacts.put("scores", {"metric": "sdm"}, {"pruned": depth}), "pruned": depth}
    spec = {"model": "m" * 20, "ratio": 0.2}
    artifacts.evaluated(artifacts.put("pruned", spec, inputs, **{"pruning.json": both}), scores(add=HALF))
    rows, _ = report(artifacts, tmp_path / "out")
    names = [(row["pruning"], row["metric"]) for row in rows.values()]
    assert names == [
        *[("n6", "angular"), ("n6+mlp20", "angular+sdm")],
        *[("mlp10", "sdm"), ("mlp20", "sdm"), ("mlp30.7 of mlp", "sdm")],
    ]


def test_sweep_folder_finds_its_jobs_and_the_teacher(study, tmp_path):
    sweep, arms = tmp_path / "multirun", {}
    for row in report(study, tmp_path / "all")[0].values():
        arms[row["arm"]] = row["addresses"]
    for number, address in enumerate([*arms["sft n4"], *arms["pruned n4"]]):
        job = sweep / str(number)
        job.mkdir(parents=True)
        result = {"stage": "evaluated", "address": address, "path": str(study.root / "evaluated" / address)}
        (job / "result.json").write_text(json.dumps(result))
    (sweep / "deeper" / "9").mkdir(parents=True)
    (sweep / "deeper" / "9" / "result.json").write_text(json.dumps({"error": "out of memory"}))
    (sweep / "result.json").write_text(json.dumps({"stage": "tuned", "address": "x", "path": "/nowhere"}))
    evaluated = find_evaluated(sweep)
    assert len(evaluated) == 4
    rows, _ = report(study, tmp_path / "out", evaluated)
    assert list(rows) == ["teacher", "pruned", "sft"]
    assert rows["sft"]["retention"]["ratio_of_means"]["mean"] < 1


def test_a_teacher_on_another_evaluation_is_not_used(artifacts, tmp_path):
    artifacts.evaluated(None, scores(add=[1] * 40), split="dev")
    path = artifacts.evaluated(artifacts.pruned(4), scores(add=HALF), split="test")
    rows, _ = report(artifacts, tmp_path / "out", [path])
    assert rows["pruned"]["retention"] is None
    assert list(rows) == ["pruned"]
    text = (tmp_path / "out" / "table.md").read_text()
    assert "`python evaluate.py pruning=none finetune=none`" in text


def test_two_evaluations_keep_one_plain_teacher(artifacts, tmp_path):
    pruned = artifacts.pruned(4)
    for split in ("dev", "test"):
        artifacts.evaluated(None, scores(add=[1] * 40), split=split)
        artifacts.evaluated(pruned, scores(add=HALF), split=split)
    artifacts.evaluated(artifacts.tuned(pruned, artifacts.targets("sft"), 0), scores(add=HALF), split="test")
    rows, _ = report(artifacts, tmp_path / "out")
    assert list(rows) == ["teacher", "pruned", "sft", "teacher split=dev", "pruned split=dev"]
    assert rows["teacher"]["settings"]["evaluation.split"] == "test"
    assert rows["pruned split=dev"]["retention"]["ratio_of_means"]["mean"] == 0.5


def test_likelihood_is_contrasted_over_its_answers(artifacts, tmp_path):
    """Answers differ by 2 nats up and down in each arm alike, and by 0.1 nats a token between arms, every one."""
    pruned = artifacts.pruned(4)
    for mode, nll in (("sft", 1.6), ("self_distill", 1.5)):
        artifacts.evaluated(artifacts.tuned(pruned, artifacts.targets(mode), 0), scores(add=HALF), nll=nll)
    rows, contrasts = report(artifacts, tmp_path / "out")
    row = one(contrasts, "self_distill", "sft", "nll")
    assert {name: row[name] for name in ("mean", "low", "high")} == dict.fromkeys(
        ("mean", "low", "high"), pytest.approx(-0.1)
    )
    span = rows["sft"]["nll"]
    assert span["high"] - span["low"] == pytest.approx(2 * 2.0227 * 2 / 10 / 39**0.5, rel=0.02)  # t, 39 degrees


def test_a_task_the_teacher_fails_is_left_out_of_the_mean_of_ratios(artifacts, tmp_path):
    artifacts.evaluated(None, scores(add=[1] * 40, sort=[0] * 40))
    artifacts.evaluated(artifacts.pruned(4), scores(add=HALF, sort=[0] * 40))
    rows, _ = report(artifacts, tmp_path / "out")
    assert rows["pruned"]["retention"]["mean_of_ratios"]["mean"] == 0.5
    assert rows["pruned"]["retention"]["ratio_of_means"]["mean"] == 0.5


def test_all_files_are_written(study, tmp_path, drawn):
    out = tmp_path / "out"
    rows, contrasts = report(study, out)
    assert {path.name for path in out.iterdir()} == PLOTS | TABLES
    for name in PLOTS:
        content = (out / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5000
    with (out / "table.csv").open(newline="") as file:
        flat = {row["arm"]: row for row in csv.DictReader(file)}
    assert list(flat) == list(rows)
    assert float(flat["sft n4"]["average_low"]) == rows["sft n4"]["average"]["low"]
    assert float(flat["sft n4"]["task_add"]) == rows["sft n4"]["tasks"]["add"]["mean"]
    assert flat["sft n4"]["seeds"] == "0 1 2"
    text = (out / "table.md").read_text()
    assert "| self_distill n4 " in text
    assert f"{100 * rows['sft n4']['average']['mean']:.1f} [" in text
    assert "self_distill n4 - sft n4" in text
    assert {"a", "b", "measure", "mean", "low", "high", "seeds"} <= set(contrasts[0])


def test_plots_with_nothing_to_show_are_not_left_behind(study, artifacts, tmp_path, drawn):
    out = tmp_path / "out"
    report(study, out)
    path = artifacts.evaluated(None, scores(add=HALF), split="another")
    report(artifacts, out, [path])
    assert {path.name for path in out.iterdir()} == TABLES | {"tasks.png"}


def test_the_same_report_twice_is_the_same(study, tmp_path):
    for name in ("a", "b"):
        report(study, tmp_path / name)
    for file in TABLES:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_an_interval_does_not_depend_on_the_other_arms(study, tmp_path):
    rows, _ = report(study, tmp_path / "a")
    chosen = [study.root / "evaluated" / address for address in rows["sft n4"]["addresses"]]
    alone, _ = report(study, tmp_path / "b", chosen)
    assert alone["sft"]["average"] == rows["sft n4"]["average"]
    assert alone["sft"]["retention"] == rows["sft n4"]["retention"]


def test_many_arms_are_drawn(artifacts, tmp_path, drawn):
    """Ten arms of one mode: more than a plot shows."""
    pruned = artifacts.pruned(4)
    artifacts.evaluated(pruned, scores(add=[0] * 40, sort=HALF))
    for number in range(10):
        model = artifacts.tuned(pruned, artifacts.targets("sft"), 0, rate=1e-4 * (number + 1))
        artifacts.evaluated(model, scores(add=HALF, sort=HALF))
    rows, _ = report(artifacts, tmp_path / "out")
    assert len(rows) == 11
    drawn_files = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert drawn_files == {"tasks.png", "gain_forgetting.png", "learning_curves.png"}


def test_damaged_artifacts_are_named(study, tmp_path):
    path = find_evaluated(study.root)[0]
    (path / "samples" / "sort.jsonl").write_text('{"id": "sort-0"}\n')
    with pytest.raises(UserError, match=r"sort\.jsonl has a broken row"):
        write_report([path], study.root, tmp_path / "out")
    (path / "samples" / "sort.jsonl").unlink()
    with pytest.raises(UserError, match=r"sort\.jsonl is missing"):
        write_report([path], study.root, tmp_path / "out")


def test_samples_that_disagree_with_the_results_are_noted(artifacts, tmp_path):
    path = artifacts.evaluated(None, scores(add=HALF))
    results = json.loads((path / "results.json").read_text())
    results["tasks"]["add"]["value"] = 0.75
    (path / "results.json").write_text(json.dumps(results))
    report(artifacts, tmp_path / "out")
    assert "add is 0.75 in results.json, 0.5 in samples" in (tmp_path / "out" / "table.md").read_text()


def test_a_group_without_weights_is_the_mean_of_its_tasks(artifacts, tmp_path):
    """8 of 8 items right in one task and 8 of 32 in the other: 62.5% by task, 40% by item."""
    path = artifacts.evaluated(None, scores(mmlu=[1] * 16 + [0] * 24))
    rows = [json.loads(line) for line in (path / "samples" / "mmlu.jsonl").read_text().splitlines()]
    lines = [json.dumps(row | {"task": "small" if number < 8 else "large"}) for number, row in enumerate(rows)]
    (path / "samples" / "mmlu.jsonl").write_text("\n".join(lines) + "\n")
    results = json.loads((path / "results.json").read_text())
    for weighted, value in ((True, 0.4), (False, 0.625)):
        results["tasks"]["mmlu"] |= {"value": value, "weight_by_size": weighted}
        (path / "results.json").write_text(json.dumps(results))
        found, _ = report(artifacts, tmp_path / str(weighted))
        assert found["teacher"]["tasks"]["mmlu"]["mean"] == pytest.approx(value)
        assert "in results.json" not in (tmp_path / str(weighted) / "table.md").read_text()


def test_an_artifact_without_its_inputs_is_left_out_and_noted(study, tmp_path):
    gone = study.put("evaluated", {"tasks": {}, "split": "test"}, {"model": "f" * 20}, **{"results.json": {}})
    rows, _ = report(study, tmp_path / "out")
    assert len(rows) == 8
    assert f"evaluated/{gone} lacks its input model" in (tmp_path / "out" / "table.md").read_text()


def test_command_prints_the_table_and_the_folder(study, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([str(study.root), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [str(out)]
    assert "| teacher " in printed.err


def test_nothing_to_report(artifacts, tmp_path, capsys):
    assert write_report([], artifacts.root, tmp_path / "out") is None
    artifacts.pruned(4)
    for folder, words in ((artifacts.root, "no evaluated artifacts"), (tmp_path / "none", "is not a folder")):
        assert main([str(folder), "--out", str(tmp_path / "out")]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert words in printed.err
        assert printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_sweep_whose_artifact_is_gone(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"stage": "evaluated", "path": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="which is gone"):
        find_evaluated(tmp_path)


def test_help_imports_nothing_heavy():
    code = (
        "import sys, sdd.report, sdd.report.__main__; print([m for m in ('numpy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
