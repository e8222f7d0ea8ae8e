"""The study page as a file: what it holds, that it needs nothing else, that no text in it becomes code, its size."""

import json
import re
from typing import Any

import pytest

from sdd.report.page import SECTIONS, charts, embedded, heat_map, page, samples
from sdd.report.page.section import Subject

HOSTILE = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 2'>"
LIMIT = 6_000_000


def anchors(subject: Subject) -> list[str]:
    return [section.anchor for make in SECTIONS if (section := make(subject))]


@pytest.fixture(scope="module")
def subject(shared_study: Any, read_study: Any) -> Subject:
    read: Subject = read_study(shared_study.root)
    return read


def test_sections_of_a_study(subject):
    everything = ["findings", "compared", "table", "differences", "health", "retention", "gain", "cost"]
    assert anchors(subject) == [*everything, "redundancy", "answers", "rewrites", "provenance"]


def test_sections_without_artifacts_are_absent(artifacts, read_study):
    artifacts.evaluated(None, {"add": [1, 0]})
    assert anchors(read_study(artifacts.root)) == ["findings", "compared", "table", "health", "answers", "provenance"]


def test_charts_show_the_numbers_of_the_table(subject):
    rows = {row["arm"]: row for row in subject.study.rows}
    (chart,) = charts.retention(subject).charts
    shown = chart.spec["datasets"]["rows"]
    assert {row["arm"] for row in shown} == {name for name in rows if name not in ("teacher", "control sft")}
    for row in shown:
        kept = rows[row["arm"]]["retention"]["ratio_of_means"]
        assert [row[name] for name in ("mean", "low", "high")] == [100 * kept[n] for n in ("mean", "low", "high")]
        assert row["evaluated"].split() == rows[row["arm"]]["addresses"]
        assert row["href"] == f"#{subject.anchors[row['arm']]}"
    by_task, _ = charts.gain(subject).charts
    changes = {(row["a"], row["b"], row["measure"]): row["mean"] for row in subject.study.contrasts}
    found = {(row["arm"], row["task"]): row["change"] for row in by_task.spec["datasets"]["rows"]}
    assert found["self_distill n4", "add choice"] == 100 * changes["self_distill n4", "pruned n4", "add_choice"]
    assert len(found) == 5 * 4


def test_heat_map_outlines_what_was_removed(subject):
    (chart,) = heat_map.redundancy(subject).charts
    rows = chart.spec["datasets"]["rows"]
    assert len(rows) == sum(range(2, 13))
    outlined = {(row["size"], row["first"]): row["removed"] for row in rows if row["removed"]}
    assert outlined == {(2, 2): "2, 3", (4, 2): "2, 3, 4, 5"}
    assert {row["first"] for row in rows if row["share"] == 0} == {1, 2}


def test_scaling_curves_follow_one_number_and_what_goes_with_it(artifacts, read_study):
    pruned, targets = artifacts.pruned(4), artifacts.targets("sft")
    for rate in (1e-4, 1e-3):
        for rank in (4, 16, 64):
            artifacts.evaluated(artifacts.tuned(pruned, targets, 0, rate, rank), artifacts.draw(rank / 64, rank))
    found = {chart.title: chart.spec["datasets"]["rows"] for chart in charts.scaling(read_study(artifacts.root)).charts}
    assert set(found) == {"Average against finetune.learning_rate", "Average against adapter.rank"}
    curves = [(row["series"], row["x"]) for row in found["Average against adapter.rank"]]
    series = [f"sft learning_rate={rate}" for rate in ("0.0001", "0.001")]
    assert curves == [(name, rank) for name in series for rank in (4, 16, 64)]


def test_settings_that_move_together_are_one_curve(artifacts, read_study):
    pruned = artifacts.pruned(4)
    for rows in (100, 400):
        targets = artifacts.targets("self_distill", num_rows=rows)
        artifacts.evaluated(artifacts.tuned(pruned, targets, 0, rate=rows / 1e6), artifacts.draw(rows / 400, rows))
    (chart,) = charts.scaling(read_study(artifacts.root)).charts
    assert len(chart.spec["datasets"]["rows"]) == 2


def test_samples_do_not_depend_on_answers_and_are_stored_once(subject):
    data = samples.answers(subject).data
    assert len(data["texts"]) == len(set(data["texts"]))
    assert len(data["items"]) == samples.MOST_PER_TASK * 4
    first = [item["id"] for item in data["items"] if item["task"] == "sort"]
    assert first == samples.by_digest([f"sort-{n}" for n in range(120)])[: samples.MOST_PER_TASK]
    item = next(item for item in data["items"] if item["id"] == first[0])
    number = first[0].removeprefix("sort-")
    assert data["texts"][item["prompt"]] == f"sort {number}?"
    for answer, score in item["said"]:
        assert data["texts"][answer] == f"It is {number if score else 'not known'}."
    assert [len(item["said"]) for item in data["items"]] == [len(subject.arms)] * len(data["items"])


def test_rewrites_say_why_they_were_kept(subject):
    (rows,) = (each["rows"] for each in samples.rewrites(subject).data["sets"])
    texts = samples.rewrites(subject).data["texts"]
    assert [(row["reason"], row["kept"]) for row in rows] == [("leak", False)] * 10 + [("ok", True)] * 10
    assert all(texts[row["rewrite"]] == f"rewritten {row['id']}" for row in rows)


def test_long_texts_keep_both_ends():
    short = samples.shortened("a" * 5_000 + "the question")
    assert short.startswith("aaa") and short.endswith("the question")
    assert len(short) < samples.MOST_CHARACTERS + 20


def test_text_stays_text(study, read_study):
    for path in study.root.glob("evaluated/*/samples/add.jsonl"):
        path.write_text(path.read_text().replace("add 1?", json.dumps(HOSTILE)[1:-1]))
    for path in study.root.glob("targets/*/manifest.json"):
        path.write_text(path.read_text().replace("tiny_math", json.dumps(HOSTILE)[1:-1]))
    for path in study.root.glob("*/*/manifest.json"):
        manifest = {**json.loads(path.read_text()), "command": HOSTILE, "config": {"note": HOSTILE}}
        path.write_text(json.dumps(manifest))
    html = page(read_study(study.root))
    assert HOSTILE not in html
    assert html.count("window.broken") > 20
    assert html.count("<script") == html.count("</script>") == 3
    assert "<img" not in html.split("<script>")[0]


def test_embedded_json_is_what_went_in():
    data = {"text": f"{HOSTILE} & <!-- \u2028", "numbers": [1.5, None]}
    assert "<" not in embedded(data) and json.loads(embedded(data)) == data


def test_page_names_nothing_outside_itself(subject):
    whole = page(subject)
    html = whole.split("<script>")[0]
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    assert policy.startswith("default-src &#39;none&#39;; script-src &#39;sha256-")
    assert "unsafe" not in policy and "http" not in policy
    assert not re.findall(r"<link|<iframe|@import|\ssrc=|url\(", html)
    links = re.findall(r'href="([^"]*)"', html)
    assert links and {link[0] for link in links} == {"#"}
    ids = set(re.findall(r'\sid="([^"]*)"', html))
    assert {link[1:] for link in links} <= ids
    assert page(subject) == whole
    first = ["<h1", 'id="findings"', "What to try next", 'id="filters"', 'id="compared"']
    assert sorted(first, key=html.index) == first


def test_every_number_leads_to_its_command(study, read_study):
    for path in study.root.glob("*/*/manifest.json"):
        manifest = json.loads(path.read_text())
        command = f"python evaluate.py seed={manifest['address'][:4]}"
        path.write_text(
            json.dumps({**manifest, "command": command, "config": {"seed": 0, "address": manifest["address"]}})
        )
    subject = read_study(study.root)
    html = page(subject)
    for arm in subject.arms:
        (made,) = re.findall(f'<details id="{subject.anchors[arm.name]}".*?</details>', html, re.S)
        for run in arm.runs:
            assert f"#artifact-{run.address}" in made
            assert f"<pre>python evaluate.py seed={run.address[:4]}</pre>" in made
    assert "shared by 18 of 18 runs" in html
    assert "<pre>seed: 0\n</pre>" in html


def test_page_of_200_runs_is_small(artifacts, read_study):
    artifacts.evaluated(None, artifacts.draw(1.5, 1, 120))
    number = 0
    for size in (2, 4):
        pruned = artifacts.pruned(size)
        artifacts.evaluated(pruned, artifacts.draw(0.3, size, 120))
        for mode in ("sft", "self_distill"):
            targets = artifacts.targets(mode)
            for rate in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2):
                for seed in range(10):
                    number += 1
                    model = artifacts.tuned(pruned, targets, seed, rate)
                    scores = artifacts.draw(0.5, 100 + number, 120)
                    artifacts.evaluated(model, scores, said=f"{number} thoughts " * 60)
    config = {f"group{n}": {f"setting{m}": "value " * 4 for m in range(15)} for n in range(10)}
    for path in artifacts.root.glob("*/*/manifest.json"):
        manifest = {**json.loads(path.read_text()), "command": "python evaluate.py " + "a.b=c " * 40, "config": config}
        path.write_text(json.dumps(manifest))
    subject = read_study(artifacts.root)
    assert sum(len(arm.runs) for arm in subject.arms) == 203
    html = page(subject)
    assert len(html.encode()) < LIMIT / 2
    assert len(samples.answers(subject).data["items"]) >= 4
