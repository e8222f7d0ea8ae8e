"""Analyses of the students that the report shows, put side by side: `analyses.json`, for programs.

    {"arms": [...], "contrasts": [...], "forgetting": [...]}

A record an arm, kind of analysis, and setting of it:

    arm, kind (speculative, shift, cost), prompts_of (a dataset's name; null for cost), settings, seeds, addresses
    answers             address of the unpruned model's answers; null for cost
    prompts             how many every seed has
    measures            name -> {"mean", "low", "high", "by_seed"}: 95% intervals over seeds, then prompts
    results             what the artifacts state, a seed each (acceptance by draft length; histogram, targets; costs)
    timings             what was measured when each was built, with the machine; null where nothing was

A contrast is a minus b of a measure, paired by seed and prompt as in `contrasts`. Every measure is a ratio of sums over
prompts (accepted tokens / tokens, nats / tokens, ...), recomputed from the records of single prompts. A prompt that
not every seed has is left out. `forgetting` is `sdd.report.forgetting`'s.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdd.report.arms import Arm
from sdd.report.contrasts import Study
from sdd.report.files import write
from sdd.report.forgetting import against_forgetting
from sdd.report.intervals import Estimate, interval, ratio_of_sums
from sdd.report.library import Artifact, Library, read_artifact
from sdd.store import STAGES
from sdd.store.files import AGAIN, shown_json, shown_rows
from sdd.untrusted import check_shape

RESULT = {"drafted": "drafted.json", "shifted": "shift.json", "measured": "costs.json"}

SHIFT_ROW = {"id": (str, int), "tokens": int, "kl": float, "similarity?": float}
COUNTS = {"passes": int, "drafted": int, "accepted": int}
DRAFT_ROW = {"id": (str, int), "tokens": int, "matched": int, "sampling_acceptance": float, "lengths": {str: COUNTS}}

Rows = dict[str, dict[str, Any]]
"""A seed's records by the prompt's id."""


@dataclass
class Analysis:
    """One kind of analysis of one arm: an artifact and its prompts' records a seed."""

    arm: Arm
    kind: str
    setting: str
    seeds: list[int]
    artifacts: list[Artifact]
    rows: list[Rows]

    @property
    def prompts(self) -> list[str]:
        """Ids of the prompts that every seed has."""
        return sorted(set.intersection(*(set(rows) for rows in self.rows))) if self.rows else []


def _sums(kind: str, row: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """What one prompt adds to the numerator and to the denominator of every measure."""
    tokens = row["tokens"]
    if kind == "shift":
        terms = {"kl": (row["kl"] * tokens, tokens)}
        return terms | ({"similarity": (row["similarity"], 1.0)} if "similarity" in row else {})
    terms = {"acceptance_rate": (row["matched"], tokens)}
    terms["sampling_acceptance"] = (row["sampling_acceptance"] * tokens, tokens)
    for length, counts in row["lengths"].items():
        terms[f"block_efficiency@{length}"] = (tokens, counts["passes"])
        terms[f"mean_accepted_length@{length}"] = (counts["accepted"], counts["passes"])
        terms[f"accepted_share@{length}"] = (counts["accepted"], counts["drafted"])
    return terms


def values(analysis: Analysis, prompts: list[str], seeds: Sequence[int] = ()) -> dict[str, Estimate]:
    """Measures with their uncertainty over seeds (those given; else all) and prompts."""
    chosen = [analysis.seeds.index(seed) for seed in seeds] if seeds and analysis.seeds else range(len(analysis.rows))
    sums = [[_sums(analysis.kind, analysis.rows[place][prompt]) for prompt in prompts] for place in chosen]
    names = list(sums[0][0]) if sums and prompts else []
    if not names:
        return {}
    table = np.array([[[row[name] for row in rows] for rows in sums] for name in names], dtype=np.float64)
    estimates = {
        name: ratio_of_sums(terms[..., 0], terms[..., 1], name) for name, terms in zip(names, table, strict=True)
    }
    return {name: estimate for name, estimate in estimates.items() if estimate is not None}


def _rows(artifact: Artifact) -> Rows:
    path = artifact.path / "prompts.jsonl"
    if not path.is_file():
        return {}
    shape = SHIFT_ROW if artifact.stage == "shifted" else DRAFT_ROW
    rows = {}
    for row in shown_rows(path, artifact.path):
        check_shape(row, shape, f"{path} has a broken row; {AGAIN}: row")
        rows[str(row["id"])] = row
    return rows


def find(arms: list[Arm], library: Library) -> list[Analysis]:
    """The analyses of the arms' students, by arm, kind and setting."""
    of_model: dict[str, list[Artifact]] = {}
    for artifact in library.of_stages(RESULT):
        of_model.setdefault(artifact.inputs.get("model", ""), []).append(artifact)
    analyses: dict[tuple[str, str, str], Analysis] = {}
    for arm in arms:
        for run in arm.runs:
            model = read_artifact(run.path).inputs.get("model")
            for artifact in of_model.get(model or "", []):
                kind = str(STAGES[artifact.stage].analysis)
                setting = json.dumps([artifact.version, artifact.spec, artifact.inputs.get("answers")], sort_keys=True)
                analysis = analyses.setdefault((arm.name, kind, setting), Analysis(arm, kind, setting, [], [], []))
                if artifact.address not in {other.address for other in analysis.artifacts}:
                    analysis.artifacts.append(artifact)
                    analysis.seeds += [] if run.seed is None else [run.seed]
                    if kind != "cost":
                        analysis.rows.append(_rows(artifact))
    return list(analyses.values())


def _record(analysis: Analysis) -> dict[str, Any]:
    first = analysis.artifacts[0]
    measures = {}
    for name, estimate in values(analysis, analysis.prompts).items():
        measures[name] = (interval(estimate) or {}) | {"by_seed": estimate.by_seed}
    timings = [artifact.path / "timings.json" for artifact in analysis.artifacts]
    return {
        "arm": analysis.arm.name,
        "kind": analysis.kind,
        "prompts_of": first.labels.get("prompts"),
        "answers": first.inputs.get("answers"),
        "settings": first.spec,
        "seeds": analysis.seeds,
        "prompts": len(analysis.prompts),
        "measures": measures,
        "results": [shown_json(artifact.path / RESULT[artifact.stage]) for artifact in analysis.artifacts],
        "timings": [shown_json(path) if path.is_file() else None for path in timings],
        "addresses": [artifact.address for artifact in analysis.artifacts],
    }


def _contrasts(a: Analysis, b: Analysis) -> Iterator[dict[str, Any]]:
    """a minus b by every measure, on the seeds and prompts that both have."""
    seeds = sorted(set(a.seeds) & set(b.seeds)) if a.seeds and b.seeds else a.seeds or b.seeds
    prompts = sorted(set(a.prompts) & set(b.prompts))
    if (a.seeds and b.seeds and not seeds) or not prompts:
        return

    left, right = values(a, prompts, seeds), values(b, prompts, seeds)
    for name in left:
        spread = interval(left[name] - right[name]) if name in right else None
        if spread is not None:
            names = {"a": a.arm.name, "b": b.arm.name, "kind": a.kind, "measure": name}
            first = a.artifacts[0]
            basis = {"prompts_of": first.labels.get("prompts"), "prompts": len(prompts), "seeds": seeds}
            basis |= {"answers": first.inputs.get("answers"), "settings": first.spec}
            yield {**names, **spread, **basis}


def analyse(study: Study, library: Library) -> dict[str, list[dict[str, Any]]]:
    """What `analyses.json` holds; lists are empty where no student of the study was analysed."""
    analyses = find(list(study.arms.values()), library)
    contrasts = []
    for pair in study.pairs:
        left = [analysis for analysis in analyses if analysis.arm is pair.a and analysis.kind != "cost"]
        right = {(analysis.kind, analysis.setting): analysis for analysis in analyses if analysis.arm is pair.b}
        matches = [
            (analysis, right[analysis.kind, analysis.setting])
            for analysis in left
            if (analysis.kind, analysis.setting) in right
        ]
        contrasts += [contrast for a, b in matches for contrast in _contrasts(a, b)]
    records = [_record(analysis) for analysis in analyses]
    return {"arms": records, "contrasts": contrasts, "forgetting": against_forgetting(study, records)}


def write_analyses(analyses: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Write `analyses.json`, unless there are none."""
    if analyses["arms"]:
        write(out / "analyses.json", json.dumps(analyses, indent=1) + "\n")
