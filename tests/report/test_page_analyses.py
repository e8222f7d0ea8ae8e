"""Sections of the page that show analyses of students, from records of known sums, without a model."""

import json
from typing import Any

import pytest

from sdd.report.analyses import analyse
from sdd.report.arms import build_arms
from sdd.report.collect import collect
from sdd.report.contrasts import compare
from sdd.report.forgetting import pearson, ranks, spearman
from sdd.report.library import Library, find_analyses, find_evaluated
from sdd.report.page import charts, costs, heat_map, merging, page, shift, speculative
from sdd.report.page.section import Subject

MACHINE = {"device": "a processor", "threads": 2, "dtype": "float32", "torch": "2.13"}
EDGES = [-1.0, 0.0, 0.5, 1.0]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def spread(median: float) -> dict[str, float]:
    return {"median": median, "low": 0.9 * median, "high": 1.1 * median, "repeats": 3}


def draft(art: Any, model: str, answers: str, matched: int) -> None:
    """Of 20 tokens `matched` are accepted, in drafts of 1 and of 4."""
    counts = {"1": {"passes": 20 - matched // 2, "drafted": 20, "accepted": matched // 2}}
    counts["4"] = {"passes": 8, "drafted": 32, "accepted": matched}
    rows = [{"id": f"p{n}", "tokens": 20, "matched": matched, "sampling_acceptance": 0.5} for n in range(6)]
    rows = [{**row, "lengths": counts} for row in rows]
    assisted = {"4": {"tokens_per_second": spread(30.0), "speedup": spread(matched / 10), "identical": 1.0}}
    said = {"independent": 1.1, "counted": 1.2, "counted_with_verification": 1.3}
    timings = {"machine": MACHINE, "predicted_speedup": {"4": said}}
    timings |= {kind: {"assisted": assisted} for kind in ("greedy", "sampling")}
    files = {"prompts.jsonl": lines(rows), "drafted.json": {}, "timings.json": timings}
    art.put("drafted", {"dtype": "float32"}, {"model": model, "answers": answers}, labels={"prompts": "held"}, **files)


def shifted(art: Any, model: str, answers: str, kl: float, rewritten: bool) -> None:
    rows = [{"id": f"p{n}", "tokens": 10, "kl": kl, "similarity": 0.8} for n in range(6)]
    tokens = {"mean": 12.0, "p5": 9.0, "p50": 12.0, "p95": 15.0}
    texts = {"rows": 30, "target": {"nll": 0.4, "tokens": tokens}, "reference": {"nll": 1.5, "tokens": tokens}}
    targets = {"rows": 40, "all": {**texts, "rows": 40}, "reasons": {"ok": 30, "leak": 10}}
    result = {"kl": kl, "tokens_per_answer": {"teacher": tokens, "student": tokens}}
    result["targets"] = targets | ({"rewritten": texts} if rewritten else {})
    result["similarity"] = {"mean": 0.8, "histogram": {"edges": EDGES, "counts": [0, 1, 5]}}
    files = {"prompts.jsonl": lines(rows), "shift.json": result}
    art.put("shifted", {"dtype": "float32"}, {"model": model, "answers": answers}, labels={"prompts": "held"}, **files)


def measured(art: Any, model: str, speed: float) -> None:
    def counted(size: int) -> dict[str, Any]:
        flops = {kind: {"total": 2e6 * size} for kind in ("flops_per_generated_token", "flops_per_prompt_token")}
        return {"parameters": size, "cache_bytes_at_context": 1000 * size, "checkpoint_bytes": 2000 * size, **flops}

    shares = ("flops_as_in_the_paper", "flops_per_generated_token", "flops_per_prompt_token")
    result = {
        "teacher": counted(1200),
        "student": counted(880),
        "adapter_bytes": 0,
        "saved": dict.fromkeys(shares, 0.3),
    }
    timings: dict[str, Any] = {"machine": MACHINE, "prompt_tokens": 64, "new_tokens": 8, "batch_size": 4}
    for who, seconds in (("teacher", 0.1), ("student", 0.1 / speed)):
        timings[who] = {"prefill_seconds": spread(1.0), "decode_seconds_per_token": spread(seconds)}
        timings[who] |= {"tokens_per_second": spread(40.0), "peak_bytes": 5_000_000}
    art.put("measured", {"context": 64}, {"model": model}, **{"costs.json": result, "timings.json": timings})


def write_analysed(art: Any) -> Any:
    """Two sizes, the larger one repaired too; both modes on each; every fine-tuned student analysed; a merged one."""
    art.evaluated(None, art.draw(1.5, 1, 40))
    answers = art.put("answered", {"model": "m" * 20}, {}, **{"answers.jsonl": ""})
    four = art.pruned(4)
    info = json.loads((art.root / "pruned" / four / "pruning.json").read_text())
    repaired = art.put(
        "pruned", {"model": "m" * 20, "repair": "linear", "penalty": 0.1}, {"pruned": four}, **{"pruning.json": info}
    )
    number = 0
    for base in (art.pruned(2), four, repaired):
        art.evaluated(base, art.draw(0.2, 3, 40))
        students = []
        for mode in ("sft", "self_distill"):
            number += 1
            students.append(art.tuned(base, art.targets(mode), 0))
            art.evaluated(students[-1], art.draw(0.4 + 0.1 * number, 10 + number, 40))
            draft(art, students[-1], answers, 10 + number)
            shifted(art, students[-1], answers, 0.1 * number, mode == "self_distill")
            measured(art, students[-1], 1 + 0.1 * number)
    facts = {"note": "angles between students: median 1\u00b0"}
    merged = art.put(
        "merged", {"method": "slerp", "t": 0.5}, {"a": students[0], "b": students[1]}, **{"merging.json": facts}
    )
    art.evaluated(merged, art.draw(0.7, 40, 40))
    return art


def subject_of(art: Any) -> Subject:
    library = Library([art.root])
    runs, notes = collect(find_evaluated(art.root), library)
    study = compare(build_arms(runs), notes)
    return Subject(study, library, analyse(study, library))


@pytest.fixture(scope="module")
def subject(artifacts_at: Any, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject_of(write_analysed(artifacts_at(tmp_path_factory.mktemp("analysed") / "artifacts")))


def rows_of(section: Any, name: str) -> list[dict[str, Any]]:
    (chart,) = [chart for chart in section.charts if chart.name == name]
    rows: list[dict[str, Any]] = chart.spec["datasets"]["rows"]
    return rows


def test_acceptance_by_draft_length_and_what_it_is_worth(subject):
    section = speculative.speculative(subject)
    records = {each["arm"]: each for each in subject.analyses["arms"] if each["kind"] == "speculative"}
    curve = rows_of(section, "speculative-1-accepted-share")
    assert len(curve) == 6 * 2
    for row in curve:
        value = records[row["arm"]]["measures"][f"accepted_share@{row['length']}"]
        assert [row[n] for n in ("mean", "low", "high")] == [100 * value[n] for n in ("mean", "low", "high")]
        assert row["evaluated"] == records[row["arm"]]["addresses"][0]
    (first, *_) = rows_of(section, "speculative-1-block-efficiency")
    assert first["mean"] == pytest.approx(20 / (20 - 11 // 2))
    speed = rows_of(section, "speculative-1-speed")
    assert {(row["across"], row["mean"], row["length"]) for row in speed} >= {(1.3, 1.1, "4")}
    assert {row["machine"] for row in speed} == {"a processor, 2 threads, float32, torch 2.13"}
    assert (
        "a processor, 2 threads" in section.body
        and "Paired differences in acceptance (prompts of held)" in section.body
    )
    assert ">+5.0</a>" in section.body, "self_distill has one token of 20 more than sft at each base"


def test_shift_of_answers_and_targets(subject):
    section = shift.shift(subject)
    names = [chart.name for chart in section.charts]
    assert names == ["shift-1-similarity", "shift-1-kl", "shift-1-forgetting", "shift-targets"]
    bins = [row for row in rows_of(section, "shift-1-similarity") if "share" in row]
    assert {(row["across_low"], row["across_high"], row["share"]) for row in bins} == {
        (0.0, 0.5, 1 / 6),
        (0.5, 1.0, 5 / 6),
    }
    assert sorted(row["mean"] for row in rows_of(section, "shift-1-kl")) == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    )
    found = {(row["series"], row["mean"]) for row in rows_of(section, "shift-targets")}
    assert found == {("gold", 0.4), ("gold", 1.5), ("rewritten", 0.4)}
    assert "25.0%" in section.body and "leak" in section.body


def test_shift_against_forgetting_is_the_correlation_of_its_points(subject):
    (found,) = subject.analyses["forgetting"]
    x, y = ([point[name]["mean"] for point in found["points"]] for name in ("kl", "change"))
    assert found["arms"] == len(x) == 6
    assert (found["pearson"], found["spearman"]) == (pearson(x, y), spearman(x, y))
    changes = {
        (row["a"], row["measure"]): row["mean"] for row in subject.study.contrasts if row["b"].startswith("pruned")
    }
    assert y == [changes[point["arm"], "not_trained_on"] for point in found["points"]]
    (note,) = [chart.note for chart in shift.shift(subject).charts if chart.name == "shift-1-forgetting"]
    assert f"over 6 arms: Pearson {found['pearson']:+.2f}, Spearman {found['spearman']:+.2f}. Descriptive" in note


def test_too_few_arms_have_no_correlation(subject):
    few = {**subject.analyses, "forgetting": []}
    assert len(shift.shift(Subject(subject.study, subject.library, few)).charts) == 3


def test_correlations_done_by_hand():
    assert ranks([3.0, 1.0, 3.0, 2.0]).tolist() == [3.5, 1.0, 3.5, 2.0]
    assert pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert pearson([0, 1, 2], [1, 0, 1]) == 0
    assert spearman([1, 2, 3], [1, 100, 10_000]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert pearson([1, 1], [1, 2]) is None


def test_costs_counted_and_measured(subject):
    section = costs.cost(subject)
    speed = rows_of(section, "cost-1-speed-1")
    assert sorted(row["x"] for row in speed) == pytest.approx([1.1, 1.2, 1.3, 1.4, 1.5, 1.6])
    retention = {row["arm"]: row["retention"]["ratio_of_means"]["mean"] for row in subject.study.rows}
    assert all(row["mean"] == 100 * retention[row["arm"]] for row in speed)
    for text in ("2,400.00", "1,760.00", "30.0% saved", "unpruned 100.0", "Measured on a processor, 2 threads"):
        assert text in section.body


def test_merged_and_repaired_arms(subject):
    modes = {arm.name: (arm.mode, arm.run.pruning) for arm in subject.arms}
    assert [name for name, (mode, _) in modes.items() if mode == "merged"] == ["merged n4 repair=linear"]
    assert sum("repair=linear" in name for name in modes) == 4
    section = merging.merging(subject)
    assert "slerp of" in section.body and "t=0.5" in section.body
    assert "Angles between students: median 1\u00b0." in section.body
    (drawn,) = heat_map.redundancy(subject).charts
    outlined = {row["size"] for row in drawn.spec["datasets"]["rows"] if row["removed"]}
    assert outlined == {2, 4}, "a repaired model was cut by the scores of the one below it"
    assert {row["blocks"] for row in rows_of(charts.retention(subject), "retention")} == {2, 4}


def test_every_link_of_an_analysis_leads_somewhere(subject):
    html = page(subject).split("<script>")[0]
    for record in subject.analyses["arms"]:
        for address in record["addresses"]:
            assert f'href="#artifact-{address}"' in html and f'id="artifact-{address}"' in html


def test_blocks_removed_one_by_one_and_channels(artifacts):
    steps = [{"removed": 3, "scores": [0.2, 0.3, 0.4, 0.1]}, {"removed": 1, "scores": [0.5, 0.2, 0.3, None]}]
    content = {"metric": "greedy", "num_blocks": 4, "num_texts": 8, "order": [3, 1], "steps": steps}
    content["distance"] = {"1": [0.2, 0.3, 0.4, 0.1]}
    scores = artifacts.put("scores", {"metric": "greedy"}, {}, **{"scores.json": content})
    facts = {"kind": "depth", "metric": "greedy", "removed_blocks": [1, 3], "flops_saved": 0.2}
    facts |= {"parameters_before": 1200, "parameters_after": 900}
    greedy = artifacts.put("pruned", {"model": "m" * 20, "size": 2}, {"scores": scores}, **{"pruning.json": facts})
    channels = {"metric": "wanda", "num_blocks": 4, "num_texts": 8, "intermediate_size": 16}
    scores = artifacts.put("scores", {"metric": "wanda"}, {}, **{"scores.json": channels})
    facts |= {"kind": "width", "metric": "wanda", "removed_blocks": [], "ratio": 0.2, "ratio_of": "model"}
    narrow = artifacts.put("pruned", {"model": "m" * 20, "ratio": 0.2}, {"scores": scores}, **{"pruning.json": facts})
    for model in (None, greedy, narrow):
        artifacts.evaluated(model, {"add": [1, 0]})
    subject = subject_of(artifacts)
    section = heat_map.redundancy(subject)
    (chart,) = section.charts
    rows = chart.spec["datasets"]["rows"]
    assert {(row["size"], row["first"]) for row in rows if row["removed"]} == {(1, 3), (2, 1)}
    assert len(rows) == 4 + 3
    assert section.lead.endswith("which score no blocks, have no map: wanda.")
    assert {arm.run.pruning for arm in subject.arms} == {"none", "n2", "mlp20"}
    assert speculative.speculative(subject) is shift.shift(subject) is merging.merging(subject) is None


def test_analyses_that_a_sweep_asked_for(subject, tmp_path):
    library = subject.library
    asked = [
        each.path for each in library.of_stages(["evaluated"])[:1] + library.of_stages(["drafted", "measured"])[:3]
    ]
    for number, path in enumerate(asked):
        (tmp_path / str(number)).mkdir()
        result = {"stage": path.parent.name, "path": str(path)}
        (tmp_path / str(number) / "result.json").write_text(json.dumps(result))
    assert (find_evaluated(tmp_path), find_analyses(tmp_path)) == (asked[:1], asked[1:])
    assert find_analyses(library.roots[0]) == []
