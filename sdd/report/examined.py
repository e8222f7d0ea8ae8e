"""What arms wrote, answer by answer, as records of their health beside the unpruned model's.

A record an arm, as in `health.json`:

    arm, seeds, items           items of the tasks with answers in the model's own words
    repeated, cut, malformed    shares of those answers; null where the evaluation cannot tell
    words, length               mean words of an answer; ratio to the unpruned model's
    changes                     the three shares minus the unpruned model's
    flips                       {"scored", "right_to_wrong", "wrong_to_right"}: shares of items scored right or wrong
    calibration                 {"error", "confidence", "accuracy", "choices", "tasks"} of choices by likelihood
    symptoms, hidden            what is worse than the unpruned model's; whether the average hides it

Shares are {"mean", "low", "high"}, means over tasks with the intervals of `intervals`, paired by seed and item. All of
it is derived from samples; the formulas and the criterion are `health`'s.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sdd.report.arms import Arm
from sdd.report.health import FINE, RATES, calibration_error, flips, symptoms
from sdd.report.intervals import Estimate, interval, mean_of, ratio
from sdd.report.measures import Comparison, Facts, share_of


def _mean(facts: Facts, name: str, arm: Arm) -> Estimate | None:
    by_task = facts.get(name)
    return mean_of({task: by_arm[arm.run.key] for task, by_arm in by_task.items()}) if by_task else None


def _calibration(facts: Facts, arm: Arm) -> dict[str, Any] | None:
    """Means over tasks of the error over all seeds' choices, of their confidence and accuracy."""
    if "confidence" not in facts:
        return None
    sure, right = ({t: by[arm.run.key] for t, by in facts[name].items()} for name in ("confidence", "right"))
    return {
        "error": float(np.mean([calibration_error(sure[task].ravel(), right[task].ravel()) for task in sure])),
        "confidence": float(np.mean([table.mean() for table in sure.values()])),
        "accuracy": float(np.mean([table.mean() for table in right.values()])),
        "choices": sum(table.size for table in sure.values()),
        "tasks": list(sure),
    }


def _flips(facts: Facts, arm: Arm, teacher: Arm) -> dict[str, Any] | None:
    by_task = facts.get("score")
    if not by_task:
        return None
    ways = {task: flips(by_arm[arm.run.key], by_arm[teacher.run.key]) for task, by_arm in by_task.items()}
    broken, mended = (mean_of({task: pair[way] for task, pair in ways.items()}) for way in (0, 1))
    scored = sum(pair[0].shape[1] for pair in ways.values())
    return {"scored": scored, "right_to_wrong": share_of(broken), "wrong_to_right": share_of(mended)}


def examine(comparison: Comparison, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A record for each arm; `rows` are the comparison's of the table, in the same order."""
    facts, teacher = comparison.facts, comparison.teacher
    items = sum(by_arm[comparison.arms[0].run.key].shape[1] for by_arm in facts.get("words", {}).values())
    records = []
    for arm, row in zip(comparison.arms, rows, strict=True):
        means = {name: _mean(facts, name, arm) for name in (*RATES, "words")}
        record: dict[str, Any] = {"arm": arm.name, "seeds": arm.seeds, "items": items}
        record |= {name: share_of(means[name]) for name in RATES} | {"words": interval(means["words"])}
        record |= {"length": None, "changes": None, "flips": None, "calibration": _calibration(facts, arm)}
        record |= {"symptoms": [], "hidden": False}
        if teacher is not None and arm is not teacher:
            of_teacher = {name: _mean(facts, name, teacher) for name in means}
            pairs = {name: (means[name], of_teacher[name]) for name in means}
            changes = {name: interval(a - b) if a and b else None for name, (a, b) in pairs.items() if name in RATES}
            ours, theirs = pairs["words"]
            length = interval(ratio(ours, theirs)) if ours and theirs else None
            flipped = _flips(facts, arm, teacher)
            ways = [flipped["right_to_wrong"], flipped["wrong_to_right"]] if flipped else []
            named = symptoms(changes, items, length, ways, flipped["scored"] if flipped else 0)
            kept = (row["retention"] or {}).get("ratio_of_means")
            record |= {"length": length, "changes": changes, "flips": flipped, "symptoms": named}
            record["hidden"] = bool(named and kept and kept["mean"] >= FINE)
        records.append(record)
    return records
