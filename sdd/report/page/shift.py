"""Distribution shift: how far students' answers are from the unpruned model's; `targets` has what they were taught."""

from typing import Any

from sdd.report.page import targets
from sdd.report.page.analysed import Group, groups, mean_of, prompts_of, row_of, setting_of, titled, value_of
from sdd.report.page.cells import cell, line_of, plain, table
from sdd.report.page.marks import (
    ACROSS,
    INTERVAL,
    ROW,
    Look,
    across,
    arms_axis,
    arms_of,
    finished,
    in_percent,
    numbered,
    rows_of_chart,
    scatter_of,
    tooltip_of,
)
from sdd.report.page.section import Chart, Section, Subject, render

KL = "KL(unpruned model || student), nats per token"


def shift(subject: Subject) -> Section | None:
    """Similarity, KL, surprise of targets, shift against forgetting; reasons and lengths as tables."""
    charts: list[Chart] = []
    tables: list[dict[str, Any]] = []
    all_groups = groups(subject, "shift")
    for group in all_groups:
        charts += _similarity(subject, group.only("similarity")) + _kl(subject, group.only("kl"))
        charts += _forgetting(subject, group)
        tables += _lengths(subject, group)
    surprises = targets.of_arms(all_groups)
    charts += targets.chart(subject, surprises)
    tables += targets.tables(subject, surprises)
    if not charts and not tables:
        return None
    lead = (
        f"How far fine-tuning moved a student from the unpruned model, on prompts{prompts_of(all_groups)} that no "
        "student was trained on; and how far the targets were from it to begin with, which is what rewriting them is "
        "for."
    )
    return Section("shift", "Distribution shift", lead, charts, render("table.html", tables=tables))


def _similarity(subject: Subject, group: Group) -> list[Chart]:
    import altair as alt

    records = []
    looks: dict[str, str] = {}
    for (arm, record), name in zip(group.records, group.series, strict=True):
        histograms = [result["similarity"]["histogram"] for result in record["results"] if "similarity" in result]
        if not histograms:
            continue
        looks[name] = arm.look
        edges = histograms[0]["edges"]
        bin_counts = [sum(column) for column in zip(*(result["counts"] for result in histograms), strict=True)]
        for low, high, count in zip(edges, edges[1:], bin_counts, strict=False):
            if count:
                values = {"across_low": low, "across_high": high, "count": count, "share": count / sum(bin_counts)}
                records.append(row_of(subject, arm, record, name, **values))
        records.append(row_of(subject, arm, record, name, **value_of(record, "similarity")))
    if not looks:
        return []
    look = Look(list(looks), list(looks.values()), legend=False)
    title = "cosine similarity to the unpruned model's answer"
    scale = alt.Scale(zero=False, nice=False, padding=4)
    y, rows = arms_axis("series"), rows_of_chart()
    bins = [("across_low", "from"), ("across_high", "to"), ("count", "answers")]
    bars = rows.transform_filter("isValid(datum.count)").mark_bar(orient="horizontal", opacity=0.75)
    mean = rows.transform_filter("isValid(datum.mean)")
    chart = alt.layer(
        bars.encode(
            x=alt.X("across_low:Q", title=title, scale=scale),
            x2="across_high:Q",
            y=y,
            size=alt.Size("share:Q", scale=alt.Scale(domainMin=0, range=[0, 1.5 * ROW]), legend=None),
            color=look.colour,
            href="href:N",
            tooltip=tooltip_of(*bins, form=".2f"),
        ),
        mean.mark_tick(thickness=2, size=1.7 * ROW).encode(
            x=alt.X("mean:Q", title=title, scale=scale),
            y=y,
            tooltip=tooltip_of(("mean", "mean"), *INTERVAL, form=".3f"),
        ),
    )
    note = "Thickness: share of the answers in a bin, all seeds together; upright line: mean."
    title = titled("Similarity of answers", group)
    return [Chart(f"{group.name}-similarity", title, note, finished(chart, records, round(1.8 * ROW * len(looks))))]


def _kl(subject: Subject, group: Group) -> list[Chart]:
    if not group.records:
        return []
    names, values = group.series, [value_of(record, "kl") for _, record in group.records]
    rows = zip(group.records, names, values, strict=True)
    records = [row_of(subject, arm, record, name, **value) for (arm, record), name, value in rows]
    look = Look(names, group.looks, legend=False)
    chart = arms_of(look, "series", KL, ("mean", "KL"), *INTERVAL)
    note = "Over the unpruned model's own answers. Whiskers: 95% intervals over seeds and prompts."
    title = titled("KL to the unpruned model", group)
    return [Chart(f"{group.name}-kl", title, note, finished(chart, records, ROW * len(names)))]


def _lengths(subject: Subject, group: Group) -> list[dict[str, Any]]:
    lines = []
    for arm, record in group.records:
        lengths = [result["tokens_per_answer"] for result in record["results"] if "tokens_per_answer" in result]
        cells = {"KL, nats per token": cell(record["measures"].get("kl"), 3, 1)}
        cells["similarity"] = cell(record["measures"].get("similarity"), 3, 1)
        for model, words in (("student", "tokens an answer"), ("teacher", "the unpruned model's")):
            values = {key: mean_of(lengths, model, key) for key in ("mean", "p5", "p95")} if lengths else {}
            if values and None not in values.values():
                span = f"{values['p5']:.0f} to {values['p95']:.0f}"
                cells[words] = plain(f"{values['mean']:.1f}", values["mean"], span)
        lines.append(line_of(subject, arm, cells, seeds=record["seeds"]))
    return [table(titled("Answers", group), lines)]


def _forgetting(subject: Subject, group: Group) -> list[Chart]:
    """Shift against forgetting with its correlation, of the largest comparison in which it was taken."""
    import altair as alt

    setting = setting_of(group.records[0][1])
    correlation = next((record for record in subject.analyses["forgetting"] if setting_of(record) == setting), None)
    if not correlation:
        return []
    arms = {arm.name: arm for arm in subject.arms}
    addresses = {arm.name: " ".join(record["addresses"]) for arm, record in group.records}
    points = []
    for point in correlation["points"]:
        values = across(point["kl"]) | in_percent(point["change"]) | {"evaluated": addresses[point["arm"]]}
        points.append((arms[point["arm"]], values))
    look, records = numbered(subject, points)
    x = alt.X("across:Q", title=KL, scale=alt.Scale(zero=False, padding=12), axis=alt.Axis(tickCount=8))
    y = alt.Y("mean:Q", title="change on tasks not trained on, points", scale=alt.Scale(zero=False))
    about = [("across", "KL"), *ACROSS, ("mean", "change"), *INTERVAL]
    chart = scatter_of(look, x, y, "number", *about, form=".3f")
    coefficients = ", ".join(
        f"{name.title()} {correlation[name]:+.2f}" for name in ("pearson", "spearman") if correlation[name] is not None
    )
    note = (
        f"Correlation over {correlation['arms']} arms: {coefficients or 'none, since one of both does not vary'}. "
        "Descriptive only: arms share models, data and seeds, and it does not follow the filters. Whiskers: 95% "
        "intervals."
    )
    title = titled("Shift against forgetting", group)
    return [Chart(f"{group.name}-forgetting", title, note, finished(chart, records, 380))]
