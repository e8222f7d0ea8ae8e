"""From arms to the rows of the table.

    average             unweighted mean over tasks of the mean over items
    ratio of means      average of the student / average of the unpruned model (retention)
    mean of ratios      mean over tasks of student / unpruned model, over tasks on which that model scores at all
    trained on          mean over tasks whose family was in the fine-tuning targets; `x_choice` belongs to family x
    nll                 mean negative log-likelihood in nats per token; lower is better, and kept out of the average

Every value is recomputed from the per-sample records, joined by item id. The statistics are `intervals`'.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from sdd.errors import UserError
from sdd.report.arms import Arm
from sdd.report.collect import Run
from sdd.report.facts import SHAPE, cut_in, facts_of
from sdd.report.intervals import Array, Estimate, average, interval, mean_of, ratio, ratio_of_sums
from sdd.store.files import AGAIN, shown_rows
from sdd.untrusted import check_shape

ANSWER = {"id": (str, int), "log_likelihood": float, "tokens": int}
SAMPLE = {"id": (str, int), "score": (float, bool), "task?": (str, None), **SHAPE}

Facts = dict[str, dict[str, dict[str, Array]]]
"""Fact -> task -> key of an arm -> (S, N), of the tasks of which every item has it in every run."""


@dataclass
class Comparison:
    """Arms scored on the same items: `scores[arm.run.key][task]` is (S, N), a row per seed.

    `likelihoods[arm.run.key]` are nats and tokens of the same answers, both (S, N); empty where an arm has none.
    """

    tasks: list[str]
    arms: list[Arm]
    items: dict[str, int]
    scores: dict[str, dict[str, Array]]
    likelihoods: dict[str, tuple[Array, Array]]
    facts: Facts

    @property
    def teacher(self) -> Arm | None:
        return next((arm for arm in self.arms if arm.mode == "teacher"), None)


def read_samples(run: Run, task: str) -> list[dict[str, Any]]:
    """The samples of one task, each item once."""
    path = run.path / "samples" / f"{task}.jsonl"
    samples = list(shown_rows(path, run.path))
    ids: set[str] = set()
    for row in samples:
        check_shape(row, SAMPLE, f"{path} has a broken row; {AGAIN}: row")
        if str(row["id"]) in ids:
            raise UserError(f"{path} has item {row['id']} twice; {AGAIN}")
        ids.add(str(row["id"]))
    return samples


def scores_of(samples: list[dict[str, Any]], is_weighted: bool) -> dict[str, float]:
    """Score per item id of one task, so that their mean is the task's value.

    In a group that is the plain mean over its tasks, an item's score is scaled by what its task is smaller than the
    others.
    """
    scores = {str(row["id"]): float(row["score"]) for row in samples}
    if is_weighted:
        return scores
    parts: dict[str, list[str]] = {}
    for row in samples:
        parts.setdefault(row.get("task") or "", []).append(str(row["id"]))
    return {id: scores[id] * len(scores) / len(parts) / len(ids) for ids in parts.values() for id in ids}


def compare_items(arms: list[Arm], notes: list[str]) -> Comparison:
    """Read the samples of arms that share an evaluation, on the items that all of them have."""
    runs = [run for arm in arms for run in arm.runs]
    tasks = [task for task in runs[0].results["tasks"] if all(task in run.results["tasks"] for run in runs)]
    if not tasks:
        raise UserError(
            f"evaluated/{runs[0].address}: no task was evaluated for every arm; evaluate all on the same tasks"
        )
    by_arm: dict[str, dict[str, Array]] = {arm.run.key: {} for arm in arms}
    items = {}
    facts: Facts = {}
    are_cut = cut_in(runs)
    for task in tasks:
        scores: list[dict[str, float]] = []
        named: list[dict[str, dict[str, float]]] = []
        for run in runs:
            samples = read_samples(run, task)
            scores.append(scores_of(samples, run.results["tasks"][task].get("weight_by_size", True)))
            named.append(dict(zip(scores[-1], facts_of(samples, are_cut), strict=True)))
        shared = sorted(set.intersection(*(set(by_item) for by_item in scores)))
        if not shared:
            raise UserError(f"task {task}: no item was answered by every arm; evaluate all arms on the same items")
        if any(len(by_item) > len(shared) for by_item in scores):
            notes.append(f"{task}: only the {len(shared)} items that every arm answered are counted.")
        table = np.array([[by_item[item] for item in shared] for by_item in scores])
        for run, row in zip(runs, table, strict=True):
            stated = run.results["tasks"][task].get("value")
            if len(scores[0]) == len(shared) and stated is not None and abs(stated - row.mean()) > 1e-6:
                notes.append(
                    f"evaluated/{run.address}: {task} is {stated:g} in results.json, {row.mean():g} in samples."
                )
        for arm, rows in zip(arms, _by_arm(arms, table), strict=True):
            by_arm[arm.run.key][task] = rows
        items[task] = len(shared)
        for name in set.intersection(*(set(by_item[item]) for by_item in named for item in shared)):
            table = np.array([[by_item[item][name] for item in shared] for by_item in named])
            own = zip(arms, _by_arm(arms, table), strict=True)
            facts.setdefault(name, {})[task] = {arm.run.key: rows for arm, rows in own}
    return Comparison(tasks, arms, items, by_arm, _likelihoods(arms), facts)


def _by_arm(arms: list[Arm], table: Array) -> list[Array]:
    """The rows of each arm's runs, of a table with a row a run."""
    ends = np.cumsum([len(arm.runs) for arm in arms])
    return np.split(table, ends[:-1])


def _likelihoods(arms: list[Arm]) -> dict[str, tuple[Array, Array]]:
    runs = [run for arm in arms for run in arm.runs]
    if not all((run.results.get("likelihood") or {}).get("nll") for run in runs):
        return {}
    rows = [_read_likelihoods(run) for run in runs]
    shared = sorted(set.intersection(*(set(by_item) for by_item in rows)))
    if not shared:
        return {}
    nats, tokens = (np.array([[by_item[item][place] for item in shared] for by_item in rows]) for place in (0, 1))
    tables = zip(_by_arm(arms, nats), _by_arm(arms, tokens), strict=True)
    return {arm.run.key: pair for arm, pair in zip(arms, tables, strict=True)}


def _read_likelihoods(run: Run) -> dict[str, tuple[float, float]]:
    """(nats, tokens) of each answer by its item's id."""
    path = run.path / "samples" / "nll.jsonl"
    answers = {}
    for row in shown_rows(path, run.path):
        check_shape(row, ANSWER, f"{path} has a broken row; {AGAIN}: row")
        answers[str(row["id"])] = (-float(row["log_likelihood"]), float(row["tokens"]))
    return answers


def trained_tasks(arm: Arm, tasks: list[str]) -> set[str] | None:
    """Tasks whose family is among the targets' groups; None where the groups are not known."""
    groups = arm.run.groups
    return (
        None if groups is None else {task for task in tasks if task in groups or task.removesuffix("_choice") in groups}
    )


class Measures:
    """An arm's measures with their uncertainty; `seeds`, if given, are those of its seeds that count."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        teacher = comparison.teacher
        self.teacher_average = self.average(teacher, comparison.tasks) if teacher else None

    def average(self, arm: Arm, tasks: list[str], seeds: Sequence[int] = ()) -> Estimate:
        scores = self.comparison.scores[arm.run.key]
        return mean_of({task: _chosen(arm, scores[task], seeds) for task in tasks})

    def ratio_of_means(self, arm: Arm, tasks: list[str], seeds: Sequence[int] = ()) -> Estimate | None:
        assert self.teacher_average is not None
        return ratio(self.average(arm, tasks, seeds), self.teacher_average)

    def mean_of_ratios(self, arm: Arm) -> Estimate | None:
        teacher, tasks = self.comparison.teacher, self.comparison.tasks
        assert teacher is not None
        ratios = [ratio(self.average(arm, [task]), self.average(teacher, [task])) for task in tasks]
        defined = [estimate for estimate in ratios if estimate is not None]
        return average(defined) if defined else None

    def nll(self, arm: Arm, seeds: Sequence[int] = ()) -> Estimate | None:
        """Nats a token; None where not every run of the comparison has it of the same answers."""
        if not self.comparison.likelihoods:
            return None
        nats, tokens = (_chosen(arm, table, seeds) for table in self.comparison.likelihoods[arm.run.key])
        return ratio_of_sums(nats, tokens, "nll")


def _chosen(arm: Arm, table: Array, seeds: Sequence[int]) -> Array:
    """The rows of these seeds; all, or the one of an arm without seeds."""
    own = arm.seeds
    places = {seed: place for place, seed in enumerate(own)}
    return table[[places[seed] for seed in seeds]] if seeds and own else table


def share_of(estimate: Estimate | None) -> dict[str, float] | None:
    """The interval of a share, which lies in [0, 1]."""
    share = interval(estimate)
    return share and share | {"low": max(share["low"], 0.0), "high": min(share["high"], 1.0)}


def price_of(arm: Arm) -> dict[str, float] | None:
    """FLOPs of the student and of the unpruned model that recovery took, mean over seeds."""
    prices = [run.price for run in arm.runs if run.price is not None]
    if len(prices) < len(arm.runs):
        return None
    return {name: fmean(getattr(price, name) for price in prices) for name in ("student", "teacher")}


def row_of(arm: Arm, measures: Measures) -> dict[str, Any]:
    """One arm as in `table.json`."""
    tasks, run = measures.comparison.tasks, arm.run
    trained = trained_tasks(arm, tasks)
    untrained = None if trained is None else [task for task in tasks if task not in trained]

    def over_tasks(chosen: list[str] | None) -> dict[str, float] | None:
        return share_of(measures.average(arm, chosen)) if chosen else None

    retention: dict[str, Any] | None = None
    if measures.teacher_average is not None:
        retention = {
            "ratio_of_means": interval(measures.ratio_of_means(arm, tasks)),
            "mean_of_ratios": interval(measures.mean_of_ratios(arm)),
        }
    per_task = {}
    for task in tasks:
        results = [run.results["tasks"][task] for run in arm.runs]
        extra = {
            name: float(np.mean([result[name] for result in results]))
            for name in ("lenient", "malformed")
            if all(result.get(name) is not None for result in results)
        }
        mean = over_tasks([task]) or {}
        per_task[task] = {**mean, "n": measures.comparison.items[task], "metric": results[0].get("metric"), **extra}
    return {
        "arm": arm.name,
        "finetune": run.finetune,
        "metric": run.metric,
        "pruning": run.pruning,
        "dataset": run.dataset,
        "merge": run.merge,
        "settings": arm.differs,
        "seeds": arm.seeds,
        "average": over_tasks(tasks),
        "retention": retention,
        "trained_on": over_tasks(None if trained is None else [task for task in tasks if task in trained]),
        "not_trained_on": over_tasks(untrained),
        "nll": interval(measures.nll(arm)),
        "tasks": per_task,
        "parameters": run.parameters,
        "flops_saved": run.flops_saved,
        "price": price_of(arm),
        "blocks_removed": run.blocks_removed,
        "addresses": [run.address for run in arm.runs],
    }
