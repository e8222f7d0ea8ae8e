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

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sdd.report.arms import Arm
from sdd.report.collect import Run
from sdd.report.health import FINE, RATES, calibration_error, confidence, flips, repeats, symptoms, words
from sdd.report.intervals import Array, Estimate, interval, mean_of, ratio
from sdd.report.limits import cut_at
from sdd.report.measures import Comparison
from sdd.store.files import AGAIN, shown_rows
from sdd.untrusted import check_shape

ROW = {"id": (str, int), "score": (float, bool), "malformed?": (float, bool, None), "log_likelihoods?": [float]}
RIGHT = "acc,none"
"""lm-eval's metric of whether the likeliest choice is right, whatever metric counts."""

Tables = dict[str, dict[str, dict[str, Array]]]
"""Fact -> task -> key of an arm -> (S, N)."""


def _limit(run: Run) -> int | None:
    limit = run.settings.get("evaluation.max_new_tokens")
    return limit if type(limit) is int and limit > 0 else None


def _facts(rows: list[dict[str, Any]], are_cut: Callable[[Sequence[str]], list[bool]] | None) -> list[dict[str, float]]:
    """Numbers by name of every row of one task: of a written answer, or of a choice; `score` where it is 0 or 1."""
    facts: list[dict[str, float]] = []
    texts: list[tuple[int, str]] = []
    for number, row in enumerate(rows):
        own = {"score": float(row["score"])} if row["score"] in (0, 1) else {}
        facts.append(own)
        if len(nats := row.get("log_likelihoods") or []) > 1:
            metrics = row.get("metrics")
            right = metrics.get(RIGHT, row["score"]) if isinstance(metrics, dict) else row["score"]
            if right in (0, 1):
                own |= {"confidence": confidence(nats), "right": float(right)}
            continue
        written = row.get("response")
        answers = [text for text in (written if isinstance(written, list) else [written]) if isinstance(text, str)]
        if not answers or "log_likelihood" in row:
            continue
        texts += [(number, text) for text in answers]
        own |= {"words": float(np.mean([words(text) for text in answers]))}
        own |= {"repeated": float(np.mean([repeats(text) for text in answers]))}
        if row.get("malformed") is not None:
            own["malformed"] = float(row["malformed"])
    if are_cut is not None and texts:
        by_row: dict[int, list[bool]] = {}
        for (number, _), cut in zip(texts, are_cut([text for _, text in texts]), strict=True):
            by_row.setdefault(number, []).append(cut)
        for number, cuts in by_row.items():
            facts[number]["cut"] = float(np.mean(cuts))
    return facts


def read_tables(comparison: Comparison) -> Tables:
    """The facts that every item of a task has in every run of the comparison."""
    runs = [run for arm in comparison.arms for run in arm.runs]
    limit, folder = _limit(runs[0]), next((run.checkpoint for run in runs if run.checkpoint), None)
    are_cut = cut_at(limit, folder) if limit and folder else None
    tables: Tables = {}
    for task in comparison.tasks:
        by_run: list[dict[str, dict[str, float]]] = []
        for run in runs:
            path = run.path / "samples" / f"{task}.jsonl"
            rows = list(shown_rows(path, run.path))
            for row in rows:
                check_shape(row, ROW, f"{path} has a broken row; {AGAIN}: row")
            facts = _facts(rows, are_cut)
            by_run.append({str(row["id"]): own for row, own in zip(rows, facts, strict=True)})
        shared = sorted(set.intersection(*(set(by_item) for by_item in by_run)))
        names = set.intersection(*(set(by_item[item]) for by_item in by_run for item in shared))
        for name in names:
            table = np.array([[by_item[item][name] for item in shared] for by_item in by_run])
            ends = np.cumsum([len(arm.runs) for arm in comparison.arms])[:-1]
            own = zip(comparison.arms, np.split(table, ends), strict=True)
            tables.setdefault(name, {})[task] = {arm.run.key: part for arm, part in own}
    return tables


def _mean(tables: Tables, name: str, arm: Arm) -> Estimate | None:
    by_task = tables.get(name)
    return mean_of({task: by_arm[arm.run.key] for task, by_arm in by_task.items()}) if by_task else None


def _share(estimate: Estimate | None) -> dict[str, float] | None:
    share = interval(estimate)
    return share and share | {"low": max(share["low"], 0.0), "high": min(share["high"], 1.0)}


def _calibration(tables: Tables, arm: Arm) -> dict[str, Any] | None:
    """Means over tasks of the error over all seeds' choices, of their confidence and accuracy."""
    if "confidence" not in tables:
        return None
    sure, right = ({t: by[arm.run.key] for t, by in tables[name].items()} for name in ("confidence", "right"))
    return {
        "error": float(np.mean([calibration_error(sure[task].ravel(), right[task].ravel()) for task in sure])),
        "confidence": float(np.mean([table.mean() for table in sure.values()])),
        "accuracy": float(np.mean([table.mean() for table in right.values()])),
        "choices": sum(table.size for table in sure.values()),
        "tasks": list(sure),
    }


def _flips(tables: Tables, arm: Arm, teacher: Arm) -> dict[str, Any] | None:
    by_task = tables.get("score")
    if not by_task:
        return None
    ways = {task: flips(by_arm[arm.run.key], by_arm[teacher.run.key]) for task, by_arm in by_task.items()}
    broken, mended = (mean_of({task: pair[way] for task, pair in ways.items()}) for way in (0, 1))
    scored = sum(pair[0].shape[1] for pair in ways.values())
    return {"scored": scored, "right_to_wrong": _share(broken), "wrong_to_right": _share(mended)}


def examine(comparison: Comparison, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A record for each arm; `rows` are the comparison's of the table, in the same order."""
    tables, teacher = read_tables(comparison), comparison.teacher
    items = sum(by_arm[comparison.arms[0].run.key].shape[1] for by_arm in tables.get("words", {}).values())
    records = []
    for arm, row in zip(comparison.arms, rows, strict=True):
        means = {name: _mean(tables, name, arm) for name in (*RATES, "words")}
        record: dict[str, Any] = {"arm": arm.name, "seeds": arm.seeds, "items": items}
        record |= {name: _share(means[name]) for name in RATES} | {"words": interval(means["words"])}
        record |= {"length": None, "changes": None, "flips": None, "calibration": _calibration(tables, arm)}
        record |= {"symptoms": [], "hidden": False}
        if teacher is not None and arm is not teacher:
            of_teacher = {name: _mean(tables, name, teacher) for name in means}
            pairs = {name: (means[name], of_teacher[name]) for name in means}
            changes = {name: interval(a - b) if a and b else None for name, (a, b) in pairs.items() if name in RATES}
            ours, theirs = pairs["words"]
            length = interval(ratio(ours, theirs)) if ours and theirs else None
            flipped = _flips(tables, arm, teacher)
            ways = [flipped["right_to_wrong"], flipped["wrong_to_right"]] if flipped else []
            named = symptoms(changes, items, length, ways, flipped["scored"] if flipped else 0)
            kept = (row["retention"] or {}).get("ratio_of_means")
            record |= {"length": length, "changes": changes, "flips": flipped, "symptoms": named}
            record["hidden"] = bool(named and kept and kept["mean"] >= FINE)
        records.append(record)
    return records
