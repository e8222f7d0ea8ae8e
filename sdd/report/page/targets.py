"""Targets: how likely the unpruned model finds gold and rewritten ones, their lengths, and why rewrites were left."""

from typing import Any

from sdd.report.arms import Arm
from sdd.report.page.analysed import Group, mean_of, row_of
from sdd.report.page.cells import line_of, plain, table
from sdd.report.page.marks import REFERENCE, ROW, Look, arms_of, finished
from sdd.report.page.section import Chart, Subject
from sdd.report.selection import labels

Surprises = tuple[Arm, dict[str, Any], list[dict[str, Any]]]
"""An arm, its record, and the surprisals of its targets, a seed each."""


def of_arms(groups: list[Group]) -> list[Surprises]:
    """Once an arm, whatever prompts its student was asked."""
    by_arm: dict[str, Surprises] = {}
    for group in groups:
        for arm, record in group.records:
            targets = [result["targets"] for result in record["results"] if "targets" in result]
            if targets:
                by_arm.setdefault(arm.name, (arm, record, targets))
    return list(by_arm.values())


def chart(subject: Subject, surprises: list[Surprises]) -> list[Chart]:
    """Where each arm's targets are, and the reference answers in whose place they stand."""
    import altair as alt

    records = []
    names = labels([arm for arm, _, _ in surprises])[0]
    for (arm, record, targets), label in zip(surprises, names, strict=True):
        rows = "rewritten" if all("rewritten" in summary for summary in targets) else "all"
        nll = {name: mean_of(targets, rows, name, "nll") for name in ("reference", "target")}
        means = [value for value in nll.values() if value is not None]
        chosen = (("reference", "gold"), ("target", "rewritten")) if rows == "rewritten" else (("target", "gold"),)
        for name, series in chosen:
            values = {"mean": nll[name], "low": min(means), "high": max(means), "rows": rows, "label": label}
            records.append(row_of(subject, arm, record, series, **values))
    if not records:
        return []
    look = Look(["gold", "rewritten"], ["gold", "self_distill"])
    title = "nats per token under the unpruned model"
    about = [("series", "targets"), ("mean", title), ("rows", "rows")]
    drawn = arms_of(look, "label", title, *about, colour=alt.value(REFERENCE))
    note = "How unlikely the unpruned model finds the answers: the reference, and what was written in its place."
    arms = len({row["arm"] for row in records})
    return [Chart("shift-targets", "Gold and rewritten targets", note, finished(drawn, records, ROW * arms))]


def tables(subject: Subject, surprises: list[Surprises]) -> list[dict[str, Any]]:
    """Rows, surprise and lengths of targets, and why rewrites were not taken."""
    lines, reasons = [], []
    for arm, record, targets in surprises:
        cells = {}
        for rows in ("all", "rewritten"):
            count = mean_of(targets, rows, "rows")
            cells[f"{rows} rows"] = plain("–" if count is None else f"{count:.0f}", count)
            for name, words in (("target", "targets"), ("reference", "gold")):
                nll = mean_of(targets, rows, name, "nll")
                tokens = {key: mean_of(targets, rows, name, "tokens", key) for key in ("mean", "p5", "p95")}
                if nll is not None:
                    cells[f"nats, {words} of {rows}"] = plain(f"{nll:.3f}", nll)
                    span = f"{tokens['p5']:.0f} to {tokens['p95']:.0f}"
                    cells[f"tokens, {words} of {rows}"] = plain(f"{tokens['mean']:.1f}", tokens["mean"], span)
        lines.append(line_of(subject, arm, cells, seeds=record["seeds"]))
        by_reason: dict[str, float] = {}
        for summary in targets:
            for name, count in summary["reasons"].items():
                by_reason[name] = by_reason.get(name, 0) + count / len(targets)
        total = sum(by_reason.values())
        shares = {
            name.replace("_", " "): plain(f"{count:.0f}", count, f"{100 * count / total:.1f}%")
            for name, count in sorted(by_reason.items(), key=lambda item: (item[0] != "ok", -item[1]))
        }
        reasons.append(line_of(subject, arm, shares, seeds=record["seeds"]))
    if not lines:
        return []
    return [
        table("Targets: nats per token, and tokens with their 5th to 95th percentile", lines),
        table("Targets by reason: ok is a rewrite that was kept, all else the reference", reasons),
    ]
