"""Shift against forgetting over the arms of a study, which only describes: arms share models, data and seeds.

Shift is KL(unpruned model || student) in nats per token; forgetting, the change on tasks not trained on against the
same model before fine-tuning, as a share in [-1, 1]. With both, at least `LEAST` arms on the same
prompts are correlated: Pearson's r, and Spearman's, which is Pearson's of the ranks (ties get their mean rank).

A record, per comparison and setting of the analysis: {"prompts_of", "answers", "settings", "arms", "pearson",
"spearman", "points": [{"arm", "kl", "change"}]}; intervals as in `analyses.json` and `contrasts.json`.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from sdd.report.contrasts import Study, changes
from sdd.report.intervals import Array

LEAST = 5


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's r in [-1, 1]; None where either does not vary."""
    across, up = (np.asarray(values, dtype=np.float64) - np.mean(values) for values in (x, y))
    spread = float(np.linalg.norm(across) * np.linalg.norm(up))
    return float(across @ up / spread) if spread else None


def ranks(values: Sequence[float]) -> Array:
    """Ranks from 1 on; equal values share the mean of theirs."""
    _, place, ties = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(ties)
    return np.asarray((last - (ties - 1) / 2)[place], dtype=np.float64)


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    return pearson(ranks(x).tolist(), ranks(y).tolist())


def _ends(value: dict[str, Any]) -> dict[str, float]:
    return {name: value[name] for name in ("mean", "low", "high")}


def against_forgetting(study: Study, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record for each comparison and setting with enough arms."""
    correlations = []
    for comparison in study.comparisons:
        change = changes(study, comparison)
        names = {arm.name for arm in comparison.arms}
        by_setting: dict[str, list[dict[str, Any]]] = {}
        settings: dict[str, dict[str, Any]] = {}
        for record in records:
            kl, forgetting = record["measures"].get("kl"), change.get(record["arm"], {}).get("not_trained_on")
            if record["kind"] == "shift" and record["arm"] in names and kl and forgetting:
                setting = {name: record[name] for name in ("prompts_of", "answers", "settings")}
                key = json.dumps(setting, sort_keys=True)
                settings[key] = setting
                by_setting.setdefault(key, []).append(
                    {"arm": record["arm"], "kl": _ends(kl), "change": _ends(forgetting)}
                )
        for key, points in by_setting.items():
            if len(points) >= LEAST:
                x, y = ([point[name]["mean"] for point in points] for name in ("kl", "change"))
                correlation = {"pearson": pearson(x, y), "spearman": spearman(x, y)}
                correlations.append({**settings[key], "arms": len(points), **correlation, "points": points})
    return correlations
