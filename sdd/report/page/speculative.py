"""Speculative decoding: what of each student's drafts the unpruned model accepts, and what that is worth in time."""

from typing import Any

from sdd.report.contrasts import Study
from sdd.report.page.analysed import Group, asked_of, groups, joined, row_of, timings_of, titled
from sdd.report.page.cells import cell, columns, line_of, plain, table
from sdd.report.page.marks import Look, curves_of, finished, points_of, rows_of_chart, series_of, tooltip_of
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
    for group in (each.only("acceptance_rate") for each in groups(subject, "speculative")):
        if group.records:
            charts += [_curve(subject, group, measure) for measure in CURVES]
            charts += _speed(subject, group)
            tables += _tables(subject, group)
            differences += _differences(subject, group)
    if not charts:
        return None
    lead = (
        "The student drafts k tokens, the unpruned model verifies them in one pass and adds one of its own. Acceptance "
        "is counted over that model's own greedy answers to prompts that no student was trained on; block efficiency "
        "is tokens a verifying pass, at most k + 1. ▲ and ▼ in differences: the 95% interval leaves out zero."
    )
    body = render("table.html", tables=tables)
    for each in differences:
        body += render("contrasts.html", **each)
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
            value = record["measures"].get(f"{measure}@{length}")
            if value:
                known = {key: factor * value[key] for key in ("mean", "low", "high")}
                x = length + min(0.05, 0.4 / len(aside)) * aside[name]
                records.append(row_of(subject, arm, record, name, x=x, length=length, **known))
    values = sorted({row["length"] for row in records})
    scale = alt.Scale(domain=[values[0] - 0.5, values[-1] + 0.5], nice=False)
    x = alt.X("x:Q", title="draft length k", scale=scale, axis=alt.Axis(values=values, format="d", grid=False))
    chart = curves_of(Look(group.series, group.modes), x, axis, ("length", "draft length"), form=".2f")
    prompts = sorted({record["prompts"] for _, record in group.records})
    count = f"{prompts[0]}" if len(prompts) == 1 else f"{prompts[0]} to {prompts[-1]}"
    note = f"By draft length; {count} prompts an arm. Whiskers: 95% bootstrap intervals over seeds, then prompts."
    name = f"{group.name}-{measure.replace('_', '-')}"
    return Chart(name, titled(title, group), note, finished(chart, records, 300))


def _speeds(group: Group) -> list[dict[str, Any]]:
    """A line an arm, machine and timed draft length."""
    found = []
    for (arm, record), series in zip(group.records, group.series, strict=True):
        for machine, timings in timings_of(record, "greedy"):
            for length in timings[0]["greedy"]["assisted"]:
                took = {kind: [each[kind]["assisted"][length] for each in timings] for kind in ("greedy", "sampling")}
                said = [each["predicted_speedup"][length] for each in timings]
                line: dict[str, Any] = {
                    "arm": arm,
                    "record": record,
                    "series": series,
                    "machine": machine,
                    "length": length,
                }
                line |= {kind: joined([each["speedup"] for each in runs]) for kind, runs in took.items()}
                line |= {name: sum(each[name] for each in said) / len(said) for name in PREDICTED}
                found.append({**line, "identical": min(each["identical"] for each in took["greedy"])})
    return found


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
    records = [
        row_of(
            subject,
            line["arm"],
            line["record"],
            line["series"],
            across=line["counted_with_verification"],
            **line["greedy"],
            length=line["length"],
            machine=line["machine"],
        )
        for line in lines
    ]
    ends = [row[name] for row in records for name in ("across", "low", "high")] + [1.0]
    scale = alt.Scale(domain=[0.95 * min(ends), 1.05 * max(ends)], nice=False)
    predicted, measured = "predicted speed-up", "measured speed-up"
    x = alt.X("across:Q", title=predicted, scale=scale, axis=alt.Axis(tickCount=6))
    y = alt.Y("mean:Q", title=measured, scale=scale, axis=alt.Axis(tickCount=6))
    look = Look(group.series, group.modes)
    diagonal = alt.Chart(alt.InlineData([{"x": 0.95 * min(ends)}, {"x": 1.05 * max(ends)}]))
    rows = rows_of_chart()
    about = [("length", "draft length"), ("across", predicted), ("mean", measured), ("low", "least"), ("high", "most")]
    tooltip = tooltip_of(*about, ("machine", "machine"), form=".2f")
    chart = alt.layer(
        diagonal.mark_line(strokeDash=[5, 4], color="#888888", strokeWidth=1).encode(
            x=alt.X("x:Q", scale=scale, title=predicted), y=alt.Y("x:Q", scale=scale, title=measured)
        ),
        rows.mark_rule(strokeWidth=1.3).encode(
            x=x, y=alt.Y("low:Q", scale=scale, title=measured), y2="high:Q", color=look.colour
        ),
        points_of(look, x, y, tooltip),
        rows.mark_text(dx=11, dy=-7, fontSize=11).encode(x=x, y=y, text="length:N"),
    )
    machines = "; ".join(dict.fromkeys(line["machine"] for line in lines))
    note = (
        "Greedy assisted generation against plain decoding; numbers at the marks are draft lengths. On the dashed line "
        f"the prediction holds; below 1 drafting slows down. Whiskers: least and most of the repeats. {machines}."
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
        lines.append(line_of(subject, arm, cells))
    found = [table(titled("Acceptance", group), lines)]
    by_machine: dict[str, list[dict[str, Any]]] = {}
    for line in _speeds(group):
        cells = {f"predicted {words}": plain(f"{line[name]:.2f}", line[name]) for name, words in PREDICTED.items()}
        cells |= {f"measured, {kind}": cell(line[kind], 2, 1) for kind in ("greedy", "sampling")}
        cells["same output, %"] = plain(f"{100 * line['identical']:.0f}", line["identical"])
        timed = line_of(subject, line["arm"], cells, about=f"k = {line['length']}")
        by_machine.setdefault(line["machine"], []).append(timed)
    for machine, timed_lines in by_machine.items():
        found.append(table(titled(f"Speed-up on {machine}", group), timed_lines))
    return found


def _differences(subject: Subject, group: Group) -> list[dict[str, Any]]:
    """Arms with equal settings, on the same seeds and prompts."""
    asked = asked_of(group.records[0][1])
    by: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in subject.analyses["contrasts"]:
        if row["kind"] == "speculative" and asked_of(row) == asked and (row["a"], row["b"]) in _equal(subject.study):
            by.setdefault((row["a"], row["b"]), []).append(row)
    lines = []
    for (a, b), rows in list(by.items())[:MOST_CONTRASTS]:
        cells = {}
        for row in rows:
            name, _, length = row["measure"].partition("@")
            if name in ("acceptance_rate", "sampling_acceptance"):
                cells[f"accepted, {'greedy' if name == 'acceptance_rate' else 'sampling'}, %"] = cell(row, signed=True)
            elif name == "block_efficiency":
                cells[f"block efficiency, k = {length}"] = cell(row, 2, 1, signed=True)
        seeds = ", ".join(map(str, rows[0]["seeds"])) or "–"
        both = subject.anchors[a], subject.anchors[b]
        lines.append({"a": a, "b": b, "anchors": both, "seeds": seeds, "cells": cells})
    title = titled("Paired differences in acceptance", group)
    return [{"title": title, "lines": lines, "columns": columns(lines)}] if lines else []


def _equal(study: Study) -> set[tuple[str, str]]:
    return set(pairs_of(study.contrasts))
