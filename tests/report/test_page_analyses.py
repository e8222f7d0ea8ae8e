"""Sections of the page that show analyses of students, from records of known sums, without a model."""

import json
import re
from typing import Any

import pytest

from sdd.report.forgetting import pearson, ranks, spearman
from sdd.report.library import find_analyses, find_evaluated
from sdd.report.page import analysed, charts, costs, heat_map, merging, page, shift, speculative
from sdd.report.page.section import Subject


@pytest.fixture(scope="module")
def subject(analysed_study: Any, read_study: Any) -> Subject:
    read: Subject = read_study(analysed_study.root)
    return read


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
    assert "a processor, 2 threads" in section.body and "<h3>Paired differences in acceptance</h3>" in section.body
    assert ">+5.0</a>" in section.body, "self_distill has one token of 20 more than sft at each base"


@pytest.fixture
def asked(artifacts: Any, read_study: Any) -> Any:
    """Titles of the acceptance tables of two students, each analysed as it is said."""
    pruned = artifacts.pruned(4)
    students = [artifacts.tuned(pruned, artifacts.targets(mode), 0) for mode in ("sft", "self_distill")]
    for number, student in enumerate(students):
        artifacts.evaluated(student, artifacts.draw(0.5, number, 40))

    def titles(*each: list[dict[str, Any]]) -> list[str]:
        for student, analyses in zip(students, each, strict=True):
            for settings in analyses:
                artifacts.drafted(student, **{"answers": "a" * 20, "matched": 12, **settings})
        section = speculative.speculative(read_study(artifacts.root))
        return re.findall("<h3>(Acceptance[^<]*)</h3>", str(section.body))

    return titles


def test_titles_say_nothing_of_timing(asked, artifacts, read_study):
    """One group whatever was timed: an arm stands in it once, with all of its timings."""
    untimed, timed = {"repeats": 0}, {"repeats": 3, "timed_lengths": [4], "timed_prompts": 8}
    assert asked([untimed, timed, {**timed, "repeats": 5}], [untimed]) == ["Acceptance"]
    subject = read_study(artifacts.root)
    (group,) = analysed.groups(subject, "speculative")
    assert [(arm.mode, len(record["addresses"])) for arm, record in group.records] == [("sft", 3), ("self_distill", 1)]
    assert len(rows_of(speculative.speculative(subject), "speculative-1-accepted-share")) == 2 * 2
    (speed,) = rows_of(speculative.speculative(subject), "speculative-1-speed")
    assert speed["arm"] == "sft" and len(speed["evaluated"].split()) == 3


def test_titles_say_what_differs(asked, artifacts):
    more, fewer = (artifacts.answered(held_out=count, dataset={"digest": "c0ffee" * 4}) for count in (48, 32))
    other = artifacts.answered(held_out=16, dataset={"digest": "decade" * 4})
    asked_of = [{"answers": more}, {"answers": fewer}, {"answers": other, "prompts": "stories"}]
    warm = [{**each, "temperature": 1.0} for each in asked_of]
    held = "prompts of held, held_out"
    found = asked(warm, warm)
    assert set(found) == {f"Acceptance ({held}=48)", f"Acceptance ({held}=32)", "Acceptance (prompts of stories)"}


def test_titles_fall_back_on_digests(asked):
    assert asked([{"answers": "a" * 20}], [{"answers": "b" * 20}]) == [
        "Acceptance (answers=aaaaaaaa)",
        "Acceptance (answers=bbbbbbbb)",
    ]


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


def test_seeds_beside_an_analysis_are_those_analysed(subject):
    fewer = [{**record, "seeds": [17]} for record in subject.analyses["arms"]]
    part = Subject(subject.study, subject.library, {**subject.analyses, "arms": fewer})
    for made in (shift.shift(part), speculative.speculative(part)):
        cells = re.findall(r"<td>([^<]*)</td>", made.body.split("Paired differences")[0])
        assert cells.count("17") >= 6 and not {"0", "0-2", "0 1 2"} & set(cells)
        drawn = [
            row for chart in made.charts if "forgetting" not in chart.name for row in chart.spec["datasets"]["rows"]
        ]
        assert {row["seeds"] for row in drawn} == {"17"}


def test_every_link_of_an_analysis_leads_somewhere(subject):
    html = page(subject).split("<script>")[0]
    for record in subject.analyses["arms"]:
        for address in record["addresses"]:
            assert f'href="#artifact-{address}"' in html and f'id="artifact-{address}"' in html


def test_blocks_removed_one_by_one_and_channels(artifacts, read_study):
    greedy = artifacts.pruned_one_by_one()
    channels = {"metric": "wanda", "num_blocks": 4, "num_texts": 8, "intermediate_size": 16}
    scores = artifacts.put("scores", {"metric": "wanda"}, {}, **{"scores.json": channels})
    facts = {"kind": "width", "metric": "wanda", "removed_blocks": [], "ratio": 0.2, "ratio_of": "model"}
    facts |= {"flops_saved": 0.2, "parameters_before": 1200, "parameters_after": 900}
    narrow = artifacts.put("pruned", {"model": "m" * 20, "ratio": 0.2}, {"scores": scores}, **{"pruning.json": facts})
    for model in (None, greedy, narrow):
        artifacts.evaluated(model, {"add": [1, 0]})
    subject = read_study(artifacts.root)
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
