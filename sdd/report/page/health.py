"""How arms write: repetition, cut and malformed answers, lengths, flips and calibration beside the unpruned model."""

from typing import Any

from sdd.report.health import RATES
from sdd.report.health_table import CRITERION, METHOD, NO_SAMPLING, damage
from sdd.report.page.cells import cell, line_of, plain, table
from sdd.report.page.section import Section, Subject, render
from sdd.report.tables import evaluation_of


def _cells(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    flips, calibration = record["flips"] or {}, record["calibration"]
    error = 100 * calibration["error"] if calibration else None
    return {
        "hidden by the average": plain(*(("⚠ yes", 1.0) if record["hidden"] else ("–", None))),
        **{name: cell(record[name]) for name in RATES},
        "words": cell(record["words"], scale=1),
        "length ratio": cell(record["length"], 2, 1),
        "right to wrong": cell(flips.get("right_to_wrong")),
        "wrong to right": cell(flips.get("wrong_to_right")),
        "calibration error": plain("–" if error is None else f"{error:.1f}", error),
    }


def health(subject: Subject) -> Section | None:
    """A table for each evaluation, and what is worse in words; absent where nothing of it could be told."""
    tables, worse = [], []
    for comparison in subject.study.comparisons:
        records = [subject.study.health[arm.name] for arm in comparison.arms]
        lines = [line_of(subject, arm, _cells(r)) for arm, r in zip(comparison.arms, records, strict=True)]
        tables.append(table(f"Health ({evaluation_of(comparison)})", lines))
        worse += [(record["arm"], damage(record), record["hidden"]) for record in records if record["symptoms"]]
    tables = [made for made in tables if made["columns"]]
    if not tables:
        return None
    body = render("health.html", tables=tables, worse=worse, anchors=subject.anchors, notes=[CRITERION, NO_SAMPLING])
    return Section("health", "Health of the answers", METHOD, body=body)
