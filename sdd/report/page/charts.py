"""The interactive figures, as Vega-Lite specifications made with Altair, of the numbers in the table.

Charts show the largest comparison of the study; `heat_map` has the one of scores.
"""

import json
import re
from typing import Any

from sdd.report.arms import Arm, text_of
from sdd.report.contrasts import changes as of_contrasts
from sdd.report.measures import trained_tasks
from sdd.report.page.marks import (
    ACROSS,
    INTERVAL,
    Look,
    across,
    arms_axis,
    curves_of,
    finished,
    in_percent,
    numbered,
    record_of,
    rows_of_chart,
    scatter_of,
    series_of,
    tooltip_of,
)
from sdd.report.page.section import Chart, Section, Subject
from sdd.report.selection import by_series, labels


def retention(subject: Subject) -> Section | None:
    """Share of the unpruned model's average that is left, against the number of blocks removed."""
    import altair as alt

    groups = by_series(arm for arm in subject.retained if arm.run.base and arm.run.blocks_removed is not None)
    if not groups:
        return None
    step = min(0.07, 0.5 / len(groups))
    records = [
        record_of(
            subject,
            arm,
            series=name,
            x=(arm.run.blocks_removed or 0) + step * aside,
            blocks=arm.run.blocks_removed,
            **in_percent(subject.rows[arm.name]["retention"]["ratio_of_means"]),
        )
        for name, aside in series_of(groups).items()
        for arm in groups[name]
    ]
    sizes = sorted({record["blocks"] for record in records})
    x = alt.X(
        "x:Q",
        title="blocks removed",
        scale=alt.Scale(domain=[sizes[0] - 0.7, sizes[-1] + 0.7], nice=False),
        axis=alt.Axis(values=sizes, format="d", grid=False),
    )
    look = Look(list(groups), [arms[0].look for arms in groups.values()])
    unpruned = alt.Chart(alt.InlineData([{"y": 100}])).mark_rule(strokeDash=[5, 4]).encode(y="y:Q")
    chart = unpruned + curves_of(look, x, "retention, %", ("blocks", "blocks removed"))
    note = "Average over tasks as a share of the unpruned model's (dashed line). Whiskers: 95% intervals."
    return Section(
        "retention",
        "Retention against blocks removed",
        "How much of the unpruned model's quality is left at each size, without and with each kind of fine-tuning.",
        [Chart("retention", "Retention by blocks removed", note, finished(chart, records))],
    )


def gain(subject: Subject) -> Section | None:
    """What fine-tuning changed, task by task, and on tasks trained on against the others."""
    changes = of_contrasts(subject.study, subject.comparison)
    arms = [arm for arm in subject.comparison.arms if arm.name in changes]
    if not arms:
        return None
    charts = [_gain_by_task(subject, arms, changes)]
    both = [arm for arm in arms if {"trained_on", "not_trained_on"} <= set(changes[arm.name])]
    if both:
        charts.append(_gain_and_forgetting(subject, both, changes))
    return Section(
        "gain",
        "Gain and forgetting",
        "What fine-tuning changed against the same model before it: on the tasks whose families it was trained on, and "
        "on the others.",
        charts,
    )


def _gain_by_task(subject: Subject, arms: list[Arm], changes: dict[str, dict[str, dict[str, Any]]]) -> Chart:
    import altair as alt

    tasks = subject.comparison.tasks
    trained = {arm.name: trained_tasks(arm, tasks) or set() for arm in arms}
    any_trained = set().union(*trained.values())
    tasks = sorted(tasks, key=lambda task: task not in any_trained)
    records = []
    for arm, label in zip(arms, labels(arms)[0], strict=True):
        for task in tasks:
            value = in_percent(changes[arm.name][task])
            on = task in trained[arm.name]
            rounded = round(value["mean"])
            text = ("0" if rounded == 0 else f"{rounded:+d}".replace("-", "−")) + ("*" if on else "")
            values = {
                "label": label,
                "task": task.replace("_", " "),
                "change": value.pop("mean"),
                **value,
                "text": text,
            }
            records.append(record_of(subject, arm, **values, on="yes" if on else "no", data=arm.run.dataset or ""))
    most = max(1.0, *(abs(record["change"]) for record in records))
    x = alt.X("task:N", title="evaluated on", sort=None, axis=alt.Axis(orient="top", labelAngle=-40, grid=False))
    y = arms_axis("label")
    about = [("data", "trained on"), ("task", "evaluated on"), ("on", "trained on its family"), ("change", "change")]
    colour = alt.Color(
        "change:Q",
        title="change, points",
        scale=alt.Scale(domain=[-most, 0, most], range=["#B35806", "#F7F7F7", "#2166AC"]),
        legend=alt.Legend(gradientLength=180),
    )
    cells = rows_of_chart().mark_rect(stroke="white", strokeWidth=1)
    words = rows_of_chart().mark_text(fontSize=11)
    ink = alt.condition(f"abs(datum.change) > {0.6 * most}", alt.value("white"), alt.value("#222222"))
    chart = alt.layer(
        cells.encode(x=x, y=y, color=colour, href="href:N", tooltip=tooltip_of(*about, *INTERVAL)),
        words.encode(x=x, y=y, text="text:N", color=ink, href="href:N", tooltip=tooltip_of(*about, *INTERVAL)),
    ).resolve_scale(color="independent")
    least = 200 + 36 * len(tasks)
    note = "Change in percentage points against the model before fine-tuning. * the task's family was trained on."
    return Chart("gain-by-task", "Trained on, evaluated on", note, finished(chart, records, 34 * len(arms), least))


def _gain_and_forgetting(subject: Subject, arms: list[Arm], changes: dict[str, dict[str, dict[str, Any]]]) -> Chart:
    import altair as alt

    pairs = [(changes[arm.name]["not_trained_on"], changes[arm.name]["trained_on"]) for arm in arms]
    sides = [across(in_percent(untrained)) | in_percent(trained) for untrained, trained in pairs]
    look, records = numbered(subject, list(zip(arms, sides, strict=True)))
    ticks = alt.Axis(tickCount=8)
    x = alt.X("across:Q", title="change on tasks not trained on, points", axis=ticks)
    y = alt.Y("mean:Q", title="change on tasks trained on, points", axis=ticks)
    about = [("mean", "on trained tasks"), *INTERVAL, ("across", "on other tasks"), *ACROSS]
    zero = alt.Chart(alt.InlineData([{"zero": 0}])).mark_rule(strokeDash=[5, 4])
    chart = zero.encode(y="zero:Q") + zero.encode(x="zero:Q") + scatter_of(look, x, y, "number", *about)
    note = "Up: gained on what was trained on. Left of the dashed line: forgot something else."
    return Chart("gain-forgetting", "Gain against forgetting", note, finished(chart, records, 380))


def _companions(arms: list[Arm], setting: str) -> set[str]:
    """Settings that change together with `setting`, one value for one value: a rank and the alpha that follows it."""
    companions = {setting}
    for other in {name for arm in arms for name in arm.differs} - {setting}:
        pairs = {(json.dumps(arm.differs.get(setting)), json.dumps(arm.differs.get(other))) for arm in arms}
        if len(pairs) == len({left for left, _ in pairs}) == len({right for _, right in pairs}) > 1:
            companions.add(other)
    return companions


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def scaling(subject: Subject) -> Section | None:
    """A curve for every number that differs between arms that are alike in all else."""
    arms = [arm for arm in subject.comparison.arms if arm.tuned]
    charts = []
    taken: set[str] = set()
    for setting in dict.fromkeys(name for arm in arms for name in arm.differs):
        having = [arm for arm in arms if _number(arm.differs.get(setting))]
        if setting in taken or len({arm.differs[setting] for arm in having}) < 2:
            continue
        together = _companions(having, setting)
        by_words: dict[tuple[str, ...], list[Arm]] = {}
        for arm in having:
            fixed = [f"{name.split('.')[-1]}={text_of(v)}" for name, v in arm.differs.items() if name not in together]
            parts = (arm.mode, arm.run.pruning, arm.run.metric or "", arm.run.dataset or "", *fixed)
            by_words.setdefault(tuple(part for part in parts if part), []).append(arm)
        by_words = {
            words: alike for words, alike in by_words.items() if len({arm.differs[setting] for arm in alike}) > 1
        }
        shared = set.intersection(*map(set, by_words)) if by_words else set()
        shared -= {words[0] for words in by_words}
        curves = {" ".join(word for word in words if word not in shared): alike for words, alike in by_words.items()}
        if curves:
            taken |= together
            charts.append(_scaling(subject, setting, curves))
    if not charts:
        return None
    lead = "Arms that differ in one number only. Settings that follow it (such as alpha the rank) move along with it."
    return Section("scaling", "Scaling curves", lead, charts)


def _scaling(subject: Subject, setting: str, curves: dict[str, list[Arm]]) -> Chart:
    import altair as alt

    records = [
        record_of(subject, arm, series=name, x=arm.differs[setting], **in_percent(subject.rows[arm.name]["average"]))
        for name, arms in curves.items()
        for arm in sorted(arms, key=lambda arm: arm.differs[setting])
    ]
    values = sorted({record["x"] for record in records})
    wide = values[0] > 0 and values[-1] / values[0] >= 4
    x = alt.X(
        "x:Q",
        title=setting,
        scale=alt.Scale(**({"type": "log"} if wide else {"zero": False}), nice=False, padding=24),
        axis=alt.Axis(values=values, format="~g", grid=False),
    )
    look = Look(list(curves), [arms[0].look for arms in curves.values()])
    note = f"Average over tasks against {setting}{' (logarithmic)' if wide else ''}; 95% intervals."
    name = re.sub(r"[^A-Za-z\d]", "-", setting)
    chart = curves_of(look, x, "average, %", ("x", setting))
    return Chart(f"scaling-{name}", f"Average against {setting}", note, finished(chart, records))
