"""Cost against quality: FLOPs, memory and bytes as they follow from the shapes, and time as a machine took it."""

from typing import Any

from sdd.report.arms import Arm
from sdd.report.page.analysed import Group, groups, joined, row_of, timings_of, titled
from sdd.report.page.cells import line_of, plain, table
from sdd.report.page.marks import Look, curves_of, finished, in_percent, record_of, series_of
from sdd.report.page.section import Chart, Section, Subject, render
from sdd.report.selection import by_series, labels

MEGA = 1e6


def cost(subject: Subject) -> Section | None:
    """Retention against FLOPs saved and against measured speed; what models cost, counted and measured."""
    charts = _against_saved(subject)
    tables: list[dict[str, Any]] = []
    for group in groups(subject, "cost"):
        charts += _against_speed(subject, group)
        tables += [_counted(subject, group), *_measured(subject, group)]
    if not charts and not tables:
        return None
    lead = (
        "What a smaller model costs in quality. The paper counts removed over all parameters as FLOPs saved; really, "
        "a token also costs attention over its context and, when it is generated, the head."
    )
    return Section("cost", "Cost against quality", lead, charts, render("table.html", tables=tables))


def _against_saved(subject: Subject) -> list[Chart]:
    """Quality against the share of FLOPs that pruning saves."""
    import altair as alt

    arms = [arm for arm in subject.retained if subject.rows[arm.name]["flops_saved"] is not None]
    groups = by_series(arms)
    saved = [subject.rows[arm.name]["flops_saved"] for arm in arms]
    if len(set(saved)) < 2:
        return []
    step = min(1.2, 6 / len(groups)) * (max(saved) - min(saved))
    records = []
    for name, aside in series_of(groups).items():
        for arm in sorted(groups[name], key=lambda arm: subject.rows[arm.name]["flops_saved"]):
            row = subject.rows[arm.name]
            size = "unknown" if row["parameters"] is None else f"{row['parameters']:,}"
            values = {"series": name, "saved": 100 * row["flops_saved"], "parameters": size}
            x = values["saved"] + (0.0 if arm.mode == "teacher" else step * aside)
            records.append(record_of(subject, arm, **values, x=x, **in_percent(row["retention"]["ratio_of_means"])))
    look = Look(list(groups), [arms[0].look for arms in groups.values()])
    axis = alt.Axis(grid=False, tickCount=8)
    x = alt.X(
        "x:Q", title="FLOPs saved (removed / all parameters), %", axis=axis, scale=alt.Scale(nice=False, padding=18)
    )
    chart = curves_of(look, x, "retention, %", ("saved", "FLOPs saved, %"), ("parameters", "parameters"))
    note = "FLOPs saved as the paper counts them; series stand side by side where they would cover each other."
    return [Chart("cost", "Retention against FLOPs saved", note, finished(chart, records, 400))]


def _speed_of(timings: list[dict[str, Any]]) -> dict[str, float]:
    """Decoding speed over that of the unpruned model in the same run: mean over seeds, least and greatest."""
    medians = [
        [timing[model]["decode_seconds_per_token"]["median"] for model in ("teacher", "student")] for timing in timings
    ]
    ratios = [teacher / student for teacher, student in medians]
    return {"mean": sum(ratios) / len(ratios), "low": min(ratios), "high": max(ratios)}


def _against_speed(subject: Subject, group: Group) -> list[Chart]:
    """Retention against measured decoding speed, a chart a machine."""
    import altair as alt

    by_machine: dict[str, dict[str, list[tuple[Arm, dict[str, Any], float]]]] = {}
    for arm, record in group.records:
        retained = (subject.rows[arm.name]["retention"] or {}).get("ratio_of_means")
        for machine, timings in timings_of(record, "student") if retained else ():
            name = labels([arm], without_pruning=True)[0][0]
            by_machine.setdefault(machine, {}).setdefault(name, []).append((arm, record, _speed_of(timings)["mean"]))
    charts = []
    for number, (machine, series) in enumerate(by_machine.items(), 1):
        records = []
        for name, points in series.items():
            for arm, record, speed in sorted(points, key=lambda point: point[2]):
                retention = in_percent(subject.rows[arm.name]["retention"]["ratio_of_means"])
                records.append(row_of(subject, arm, record, name, x=speed, speed=f"{speed:.2f}", **retention))
        look = Look(list(series), [points[0][0].look for points in series.values()])
        title = "decoding speed, as a multiple of the unpruned model's"
        x = alt.X("x:Q", title=title, scale=alt.Scale(zero=False, nice=False, padding=18), axis=alt.Axis(tickCount=8))
        chart = curves_of(look, x, "retention, %", ("speed", "times as fast"))
        note = f"Batch 1, both models in one run and in turns, on {machine}. Whiskers: 95% intervals."
        name = f"{group.name}-speed-{number}"
        charts.append(Chart(name, titled("Retention against measured speed", group), note, finished(chart, records)))
    return charts


def _models(subject: Subject, group: Group) -> list[tuple[Arm, dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """(arm, costs, shares saved, artifact's result): the unpruned model where it is an arm, then the students."""
    models: list[tuple[Arm, dict[str, Any], dict[str, Any], dict[str, Any]]] = []
    first = group.records[0][1]["results"][0]
    teacher = next((arm for arm in subject.comparison.arms if arm.mode == "teacher"), None)
    if teacher and "teacher" in first:
        models.append((teacher, first["teacher"], {}, {}))
    for arm, record in group.records:
        result = record["results"][0]
        if "student" in result:
            models.append((arm, result["student"], result["saved"], result))
    return models


def _counted(subject: Subject, group: Group) -> dict[str, Any]:
    context = group.records[0][1]["settings"].get("context")
    lines = []
    for arm, costs, saved, result in _models(subject, group):
        cells = {"parameters": plain(f"{costs['parameters']:,}", costs["parameters"])}
        for kind in ("generated", "prompt"):
            flops = costs[f"flops_per_{kind}_token"]["total"]
            share = saved.get(f"flops_per_{kind}_token")
            span = "" if share is None else f"{100 * share:.1f}% saved"
            cells[f"MFLOPs a {kind} token"] = plain(f"{flops / MEGA:,.2f}", flops, span)
        share = saved.get("flops_as_in_the_paper")
        cells["saved as the paper counts, %"] = plain("–" if share is None else f"{100 * share:.1f}", share)
        for name, key in (("KV cache, MB", "cache_bytes_at_context"), ("checkpoint, MB", "checkpoint_bytes")):
            cells[name] = plain(f"{costs[key] / MEGA:,.2f}", costs[key])
        size = result.get("adapter_bytes")
        cells["adapter, MB"] = plain(f"{size / MEGA:,.2f}" if size else "–", size or None)
        lines.append(line_of(subject, arm, cells))
    title = "Counted" if "context=" in group.about else f"Counted, at a context of {context} tokens"
    return table(titled(title, group), lines)


def _measured(subject: Subject, group: Group) -> list[dict[str, Any]]:
    """A table a machine: the student, and below it the unpruned model in the same run."""
    by_machine: dict[str, list[dict[str, Any]]] = {}
    for arm, record in group.records:
        for machine, timings in timings_of(record, "student"):
            how = timings[0]
            columns = {
                f"prefill of {how['prompt_tokens']} tokens, ms": ("prefill_seconds", 1e3),
                "decoding a token, ms": ("decode_seconds_per_token", 1e3),
                f"tokens a second, batch {how['batch_size']}": ("tokens_per_second", 1.0),
            }
            cells = {}
            for name, (key, factor) in columns.items():
                student, teacher = (
                    joined([timing[model][key] for timing in timings]) for model in ("student", "teacher")
                )
                values = [
                    factor * value for value in (student["mean"], student["low"], student["high"], teacher["mean"])
                ]
                mean, low, high, unpruned = (f"{value:,.1f}" for value in values)
                cells[name] = plain(mean, student["mean"], f"{low} to {high}; unpruned {unpruned}")
            peak, teacher_peak = (
                max(timing[model]["peak_bytes"] for timing in timings) for model in ("student", "teacher")
            )
            cells["peak memory, MB"] = plain(f"{peak / MEGA:,.1f}", peak, f"unpruned {teacher_peak / MEGA:,.1f}")
            speed = _speed_of(timings)
            cells["times as fast"] = plain(f"{speed['mean']:.2f}", speed["mean"])
            by_machine.setdefault(machine, []).append(line_of(subject, arm, cells, seeds=record["seeds"]))
    return [table(titled(f"Measured on {machine}", group), lines) for machine, lines in by_machine.items()]
