"""Speculative decoding: what of each student's drafts the unpruned model accepts, and what that is worth in time."""

from typing import Any

from sdd.report.contrasts import Study
from sdd.report.page.analysed import Group, groups, joined, prompts_of, row_of, setting_of, timings_of, titled, value_of
from sdd.report.page.cells import cell, columns, line_of, plain, table
from sdd.report.page.marks import REFERENCE, Look, curves_of, finished, scatter_of, series_of
from sdd.report.page.section import Chart, Section, Subject, render
from sdd.report.tables import pairs_of

CURVES = {
    "accepted_share": ("Drafted tokens accepted", "accepted, %", 100),
    "mean_accepted_length": ("Mean accepted length", "accepted tokens a draft", 1),
    "block_efficiency": ("Block efficiency", "tokens a pass", 1),
}
"""Measure at a draft length -> title, axis, factor."""
MOST_CONTRASTS = 100


def speculative(subject: Subject) -> Section | None:
    """Acceptance against draft length, predicted and measured speed-up, and the paired differences."""
    charts: list[Chart] = []
    tables: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    all_groups = [part for group in groups(subject, "speculative") if (part := group.only("acceptance_rate")).records]
    for group in all_groups:
        charts += [_curve(subject, group, measure) for measure in CURVES]
        charts += _speed(subject, group)
        tables += _tables(subject, group)
        differences += _differences(subject, group)
    if not charts:
        return None
    lead = (
        "The student drafts k tokens, the unpruned model verifies them in one pass and adds one of its own. Acceptance "
        f"is counted over that model's own greedy answers to prompts{prompts_of(all_groups)} that no student was "
        "trained on; block efficiency is tokens a verifying pass, at most k + 1. ▲ and ▼ in differences: the 95% "
        "interval leaves out zero."
    )
    body = render("table.html", tables=tables)
    for difference in differences:
        body += render("contrasts.html", **difference)
    return Section("speculative", "Speculative decoding", lead, charts, body)


def _lengths(record: dict[str, Any]) -> list[int]:
    return sorted(int(name.split("@")[1]) for name in record["measures"] if name.startswith("block_efficiency@"))


def _curve(subject: Subject, group: Group, measure: str) -> Chart:
    import altair as alt

    title, axis, factor = CURVES[measure]
    records = []
    aside = series_of(dict.fromkeys(group.series))
    for (arm, record), name in zip(group.records, group.series, strict=True):
        for length in _lengths(record):
            if f"{measure}@{length}" in record["measures"]:
                estimate = value_of(record, f"{measure}@{length}", factor)
                x = length + min(0.05, 0.4 / len(aside)) * aside[name]
                records.append(row_of(subject, arm, record, name, x=x, length=length, **estimate))
    values = sorted({row["length"] for row in records})
    scale = alt.Scale(domain=[values[0] - 0.5, values[-1] + 0.5], nice=False)
    x = alt.X("x:Q", title="draft length k", scale=scale, axis=alt.Axis(values=values, format="d", grid=False))
    chart = curves_of(Look(group.series, group.looks), x, axis, ("length", "draft length"), form=".2f")
    prompts = sorted({record["prompts"] for _, record in group.records})
    count = f"{prompts[0]}" if len(prompts) == 1 else f"{prompts[0]} to {prompts[-1]}"
    note = f"By draft length; {count} prompts an arm. Whiskers: 95% intervals over seeds and prompts."
    name = f"{group.name}-{measure.replace('_', '-')}"
    return Chart(name, titled(title, group), note, finished(chart, records, 300))


def _speeds(group: Group) -> list[dict[str, Any]]:
    """A line an arm, machine and timed draft length."""
    lines = []
    for (arm, record), series in zip(group.records, group.series, strict=True):
        for machine, timings in timings_of(record, "greedy"):
            for length in dict.fromkeys(length for timing in timings for length in timing["greedy"]["assisted"]):
                timed = [timing for timing in timings if length in timing["greedy"]["assisted"]]
                by_kind = {
                    kind: [timing[kind]["assisted"][length] for timing in timed] for kind in ("greedy", "sampling")
                }
                predictions = [timing["predicted_speedup"][length] for timing in timed]
                line: dict[str, Any] = {"arm": arm, "record": record, "series": series}
                line |= {kind: joined([run["speedup"] for run in runs]) for kind, runs in by_kind.items()}
                line |= {
                    name: sum(prediction[name] for prediction in predictions) / len(predictions) for name in PREDICTED
                }
                identical = min(run["identical"] for run in by_kind["greedy"])
                lines.append({**line, "machine": machine, "length": length, "identical": identical})
    return lines


PREDICTED = {
    "independent": "if tokens were independent",
    "counted": "from accepted drafts",
    "counted_with_verification": "with verification as timed",
}


def _speed(subject: Subject, group: Group) -> list[Chart]:
    import altair as alt

    lines = _speeds(group)
    if not lines:
        return []
    records = []
    for line in lines:
        fields = {"across": line["counted_with_verification"], "length": line["length"], "machine": line["machine"]}
        records.append(row_of(subject, line["arm"], line["record"], line["series"], **line["greedy"], **fields))
    ends = [row[name] for row in records for name in ("across", "low", "high")] + [1.0]
    scale = alt.Scale(domain=[0.95 * min(ends), 1.05 * max(ends)], nice=False)
    predicted, measured = "predicted speed-up", "measured speed-up"
    x = alt.X("across:Q", title=predicted, scale=scale, axis=alt.Axis(tickCount=6))
    y = alt.Y("mean:Q", title=measured, scale=scale, axis=alt.Axis(tickCount=6))
    corners = alt.InlineData([{"x": end} for end in scale.domain])
    diagonal = alt.Chart(corners).mark_line(strokeDash=[5, 4], color=REFERENCE, strokeWidth=1)
    about = [("length", "draft length"), ("across", predicted), ("mean", measured), ("low", "least"), ("high", "most")]
    look = Look(group.series, group.looks)
    chart = alt.layer(
        diagonal.encode(x=alt.X("x:Q", scale=scale, title=predicted), y=alt.Y("x:Q", scale=scale, title=measured)),
        scatter_of(look, x, y, "length", *about, ("machine", "machine"), form=".2f"),
    )
    machines = "; ".join(dict.fromkeys(line["machine"] for line in lines))
    note = (
        "Greedy assisted generation against plain decoding; numbers at the marks are draft lengths. On the dashed line "
        f"the prediction holds; below 1 drafting slows down. Whiskers: least and most of the repeats. "
        f"Taken on {machines}."
    )
    title = titled("Predicted and measured speed-up", group)
    return [Chart(f"{group.name}-speed", title, note, finished(chart, records, 380))]


def _tables(subject: Subject, group: Group) -> list[dict[str, Any]]:
    lines = []
    for arm, record in group.records:
        measures = record["measures"]
        cells = {
            "accepted, greedy, %": cell(measures["acceptance_rate"]),
            "accepted, sampling, %": cell(measures.get("sampling_acceptance")),
        }
        for length in _lengths(record):
            cells[f"block efficiency, k = {length}"] = cell(measures[f"block_efficiency@{length}"], 2, 1)
        lines.append(line_of(subject, arm, cells, seeds=record["seeds"]))
    tables = [table(titled("Acceptance", group), lines)]
    by_machine: dict[str, list[dict[str, Any]]] = {}
    for line in _speeds(group):
        cells = {f"predicted {words}": plain(f"{line[name]:.2f}", line[name]) for name, words in PREDICTED.items()}
        cells |= {f"measured, {kind}": cell(line[kind], 2, 1) for kind in ("greedy", "sampling")}
        cells["same output, %"] = plain(f"{100 * line['identical']:.0f}", line["identical"])
        timed = line_of(subject, line["arm"], cells, f"k = {line['length']}", line["record"]["seeds"])
        by_machine.setdefault(line["machine"], []).append(timed)
    for machine, timed_lines in by_machine.items():
        tables.append(table(titled(f"Speed-up on {machine}", group), timed_lines))
    return tables


def _differences(subject: Subject, group: Group) -> list[dict[str, Any]]:
    """Arms with equal settings, on the same seeds and prompts."""
    setting = setting_of(group.records[0][1])
    by: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in subject.analyses["contrasts"]:
        if (
            row["kind"] == "speculative"
            and setting_of(row) == setting
            and (row["a"], row["b"]) in _equal(subject.study)
        ):
            by.setdefault((row["a"], row["b"]), []).append(row)
    lines = []
    for (a, b), rows in list(by.items())[:MOST_CONTRASTS]:
        cells = {}
        rows = [row for row in rows if len(row["seeds"]) == max(len(other["seeds"]) for other in rows)]
        for row in rows:
            name, _, length = row["measure"].partition("@")
            if name in ("acceptance_rate", "sampling_acceptance"):
                cells[f"accepted, {'greedy' if name == 'acceptance_rate' else 'sampling'}, %"] = cell(row, signed=True)
            elif name == "block_efficiency":
                cells[f"block efficiency, k = {length}"] = cell(row, 2, 1, signed=True)
        seeds = ", ".join(map(str, rows[0]["seeds"])) or "–"
        anchors = subject.anchors[a], subject.anchors[b]
        lines.append({"a": a, "b": b, "anchors": anchors, "seeds": seeds, "cells": cells})
    title = titled("Paired differences in acceptance", group)
    return [{"title": title, "lines": lines, "columns": columns(lines)}] if lines else []


def _equal(study: Study) -> set[tuple[str, str]]:
    return set(pairs_of(study.contrasts))
