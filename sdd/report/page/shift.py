"""Distribution shift: how far students' answers and the targets are from the unpruned model, and what was rejected."""

from typing import Any

from sdd.report.page.analysed import Group, asked_of, groups, row_of, titled
from sdd.report.page.cells import cell, line_of, plain, table
from sdd.report.page.marks import INTERVAL, Look, finished, in_percent, points_of, record_of, rows_of_chart, tooltip_of
from sdd.report.page.section import Chart, Section, Subject, render

ROW = 30
"""Pixels an arm, where arms stand below each other."""


def shift(subject: Subject) -> Section | None:
    """Similarity, KL, surprise of targets, shift against forgetting; reasons and lengths as tables."""
    charts: list[Chart] = []
    tables: list[dict[str, Any]] = []
    for group in groups(subject, "shift"):
        charts += _similarity(subject, group.only("similarity")) + _kl(subject, group.only("kl"))
        charts += _forgetting(subject, group)
        tables += _lengths(subject, group)
    charts += _surprise(subject)
    tables += _targets(subject)
    if not charts and not tables:
        return None
    lead = (
        "How far fine-tuning moved a student from the unpruned model, on prompts that no student was trained on; and "
        "how far the targets were from it to begin with, which is what rewriting them is for."
    )
    return Section("shift", "Distribution shift", lead, charts, render("table.html", tables=tables))


def _arms_axis() -> Any:
    import altair as alt

    return alt.Y("arm:N", title=None, sort=None, axis=alt.Axis(labelLimit=230, grid=False))


def _similarity(subject: Subject, group: Group) -> list[Chart]:
    import altair as alt

    records, names = [], []
    for arm, record in group.records:
        found = [each["similarity"]["histogram"] for each in record["results"] if "similarity" in each]
        if not found:
            continue
        names.append(arm.name)
        edges = found[0]["edges"]
        counts = [sum(column) for column in zip(*(each["counts"] for each in found), strict=True)]
        for low, high, count in zip(edges, edges[1:], counts, strict=False):
            if count:
                values = {"across_low": low, "across_high": high, "count": count, "share": count / sum(counts)}
                records.append(row_of(subject, arm, record, arm.name, **values))
        records.append(row_of(subject, arm, record, arm.name, **record["measures"]["similarity"]))
        records[-1].pop("by_seed")
    if not names:
        return []
    modes = [arm.mode for arm, _ in group.records if arm.name in names]
    look = Look(names, modes, legend=False)
    title = "cosine similarity to the unpruned model's answer"
    scale = alt.Scale(zero=False, nice=False, padding=4)
    y = _arms_axis()
    rows = rows_of_chart()
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
        mean.mark_tick(thickness=2, size=1.7 * ROW, color="#888888").encode(
            x=alt.X("mean:Q", title=title, scale=scale),
            y=y,
            tooltip=tooltip_of(("mean", "mean"), *INTERVAL, form=".3f"),
        ),
    )
    note = "Thickness: share of the answers in a bin, all seeds together; upright line: mean."
    title = titled("Similarity of answers", group)
    return [Chart(f"{group.name}-similarity", title, note, finished(chart, records, round(1.8 * ROW * len(names))))]


def _kl(subject: Subject, group: Group) -> list[Chart]:
    import altair as alt

    if not group.records:
        return []
    names = [arm.name for arm, _ in group.records]
    records = []
    for arm, record in group.records:
        value = {name: record["measures"]["kl"][name] for name in ("mean", "low", "high")}
        records.append(row_of(subject, arm, record, arm.name, **value))
    look = Look(names, group.modes, legend=False)
    title = "KL(unpruned model || student), nats per token"
    y, rows = _arms_axis(), rows_of_chart()
    x = alt.X("mean:Q", title=title, scale=alt.Scale(zero=True))
    chart = alt.layer(
        rows.mark_rule(strokeWidth=1.5).encode(x=alt.X("low:Q", title=title), x2="high:Q", y=y, color=look.colour),
        points_of(look, x, y, tooltip_of(("mean", "KL"), *INTERVAL, form=".3f")),
    )
    note = "Over the unpruned model's own answers. Whiskers: 95% bootstrap intervals over seeds, then prompts."
    title = titled("KL to the unpruned model", group)
    return [Chart(f"{group.name}-kl", title, note, finished(chart, records, ROW * len(names)))]


def _of_targets(subject: Subject) -> list[tuple[Any, dict[str, Any], list[dict[str, Any]]]]:
    """(arm, record, surprisals a seed), once an arm, whatever prompts its student was asked."""
    found: dict[str, Any] = {}
    for group in groups(subject, "shift"):
        for arm, record in group.records:
            targets = [each["targets"] for each in record["results"] if "targets" in each]
            if targets:
                found.setdefault(arm.name, (arm, record, targets))
    return list(found.values())


def _mean(of: list[dict[str, Any]], *path: str) -> float | None:
    """The mean over seeds of a number that lies deep; None where one lacks it."""
    values: list[Any] = of
    for name in path:
        values = [each.get(name) if each else None for each in values]
    return None if any(value is None for value in values) else sum(values) / len(values)


def _surprise(subject: Subject) -> list[Chart]:
    import altair as alt

    records = []
    for arm, record, targets in _of_targets(subject):
        rows = "rewritten" if all("rewritten" in each for each in targets) else "all"
        nll = {name: _mean(targets, rows, name, "nll") for name in ("reference", "target")}
        known = [value for value in nll.values() if value is not None]
        chosen = (("reference", "gold"), ("target", "rewritten")) if rows == "rewritten" else (("target", "gold"),)
        for name, series in chosen:
            values = {"mean": nll[name], "low": min(known), "high": max(known), "rows": rows}
            records.append(row_of(subject, arm, record, series, **values))
    if not records:
        return []
    look = Look(["gold", "rewritten"], ["gold", "self_distill"])
    title = "nats per token under the unpruned model"
    y, rows_ = _arms_axis(), rows_of_chart()
    x = alt.X("mean:Q", title=title, scale=alt.Scale(zero=True))
    chart = alt.layer(
        rows_.mark_rule(strokeWidth=1.5, color="#888888").encode(x=alt.X("low:Q", title=title), x2="high:Q", y=y),
        points_of(look, x, y, tooltip_of(("series", "targets"), ("mean", title), ("rows", "rows"), form=".3f")),
    )
    note = "How unlikely the unpruned model finds the answers: the reference, and what was written in its place."
    arms = len({row["arm"] for row in records})
    return [Chart("shift-targets", "Gold and rewritten targets", note, finished(chart, records, ROW * arms))]


def _targets(subject: Subject) -> list[dict[str, Any]]:
    """Rows, surprise and lengths of targets, and why rewrites were not taken."""
    lines, reasons = [], []
    for arm, _, targets in _of_targets(subject):
        cells = {}
        for rows in ("all", "rewritten"):
            count = _mean(targets, rows, "rows")
            cells[f"{rows} rows"] = plain("–" if count is None else f"{count:.0f}", count)
            for name, words in (("target", "targets"), ("reference", "gold")):
                nll = _mean(targets, rows, name, "nll")
                tokens = {key: _mean(targets, rows, name, "tokens", key) for key in ("mean", "p5", "p95")}
                if nll is not None:
                    cells[f"nats, {words} of {rows}"] = plain(f"{nll:.3f}", nll)
                    span = f"{tokens['p5']:.0f} to {tokens['p95']:.0f}"
                    cells[f"tokens, {words} of {rows}"] = plain(f"{tokens['mean']:.1f}", tokens["mean"], span)
        lines.append(line_of(subject, arm, cells))
        counts: dict[str, float] = {}
        for each in targets:
            for name, count in each["reasons"].items():
                counts[name] = counts.get(name, 0) + count / len(targets)
        whole = sum(counts.values())
        shares = {
            name.replace("_", " "): plain(f"{count:.0f}", count, f"{100 * count / whole:.1f}%")
            for name, count in sorted(counts.items(), key=lambda each: (each[0] != "ok", -each[1]))
        }
        reasons.append(line_of(subject, arm, shares))
    if not lines:
        return []
    return [
        table("Targets: nats per token, and tokens with their 5th to 95th percentile", lines),
        table("Targets by reason: ok is a rewrite that was kept, all else the reference", reasons),
    ]


def _lengths(subject: Subject, group: Group) -> list[dict[str, Any]]:
    lines = []
    for arm, record in group.records:
        found = [each["tokens_per_answer"] for each in record["results"] if "tokens_per_answer" in each]
        cells = {"KL, nats per token": cell(record["measures"].get("kl"), 3, 1)}
        cells["similarity"] = cell(record["measures"].get("similarity"), 3, 1)
        for who, words in (("student", "tokens an answer"), ("teacher", "the unpruned model's")):
            values = {key: _mean(found, who, key) for key in ("mean", "p5", "p95")} if found else {}
            if values and None not in values.values():
                span = f"{values['p5']:.0f} to {values['p95']:.0f}"
                cells[words] = plain(f"{values['mean']:.1f}", values["mean"], span)
        lines.append(line_of(subject, arm, cells))
    return [table(titled("Answers", group), lines)]


def _forgetting(subject: Subject, group: Group) -> list[Chart]:
    """Shift against forgetting with its correlation, of the largest comparison in which it was taken."""
    import altair as alt

    asked = asked_of(group.records[0][1])
    found = next((each for each in subject.analyses["forgetting"] if asked_of(each) == asked), None)
    if not found:
        return []
    arms = {arm.name: arm for arm in subject.arms}
    addresses = {arm.name: " ".join(record["addresses"]) for arm, record in group.records}
    names = [f"{number}  {point['arm']}" for number, point in enumerate(found["points"], 1)]
    records = []
    for number, (point, name) in enumerate(zip(found["points"], names, strict=True), 1):
        across = {"across": point["kl"]["mean"], "across_low": point["kl"]["low"], "across_high": point["kl"]["high"]}
        values = {**across, **in_percent(point["change"]), "number": str(number), "evaluated": addresses[point["arm"]]}
        records.append(record_of(subject, arms[point["arm"]], series=name, **values))
    look = Look(names, [arms[point["arm"]].mode for point in found["points"]])
    kl, change = "KL(unpruned model || student), nats per token", "change on tasks not trained on, points"
    x = alt.X("across:Q", title=kl, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=8))
    y = alt.Y("mean:Q", title=change, scale=alt.Scale(zero=False))
    about = [("across", "KL"), ("across_low", "95% from"), ("across_high", "95% to"), ("mean", "change"), *INTERVAL]
    rows = rows_of_chart()
    chart = alt.layer(
        rows.mark_rule(strokeWidth=1.2).encode(x=x, y=alt.Y("low:Q", title=change), y2="high:Q", color=look.colour),
        rows.mark_rule(strokeWidth=1.2).encode(
            x=alt.X("across_low:Q", title=kl), x2="across_high:Q", y=y, color=look.colour
        ),
        points_of(look, x, y, tooltip_of(*about, form=".3f")),
        rows.mark_text(dx=9, dy=-9, fontSize=11, fontWeight="bold").encode(x=x, y=y, text="number:N"),
    )
    both = ", ".join(
        f"{name.title()} {found[name]:+.2f}" for name in ("pearson", "spearman") if found[name] is not None
    )
    note = (
        f"Correlation over {found['arms']} arms: {both or 'none, since one of both does not vary'}. Descriptive only: "
        "arms share models, data and seeds, and it does not follow the filters. Whiskers: 95% bootstrap intervals."
    )
    title = titled("Shift against forgetting", group)
    return [Chart(f"{group.name}-forgetting", title, note, finished(chart, records, 380))]
