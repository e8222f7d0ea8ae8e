"""From arms to the rows of the table.

    average             unweighted mean over tasks of the mean over items
    ratio of means      average of the student / average of the unpruned model (retention)
    mean of ratios      mean over tasks of student / unpruned model, over tasks on which that model scores at all
    trained on          mean over tasks whose family was in the fine-tuning targets; `x_choice` belongs to family x
    nll                 mean negative log-likelihood in nats per token; lower is better, and kept out of the average

Every value is recomputed from the per-sample records, joined by item id. The statistics are `intervals`'. Of the
likelihood only a mean and a standard error are on disk, which enters as normal noise.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from sdd.errors import UserError
from sdd.report.arms import Arm
from sdd.report.collect import Run
from sdd.report.intervals import RESAMPLES, Array, interval, item_means, normal_noise, over_seeds, ratio
from sdd.store.files import AGAIN, shown_rows
from sdd.untrusted import check_shape

SAMPLE = {"id": (str, int), "score": (float, bool), "task?": (str, None)}


@dataclass
class Comparison:
    """Arms scored on the same items; `means[arm.run.key][task]` is (1 + R, S), a column per seed."""

    tasks: list[str]
    arms: list[Arm]
    items: dict[str, int]
    means: dict[str, dict[str, Array]]

    @property
    def teacher(self) -> Arm | None:
        return next((arm for arm in self.arms if arm.mode == "teacher"), None)


def read_scores(run: Run, task: str) -> dict[str, float]:
    """Score per item id of one task, so that their mean is the task's value.

    In a group that is the plain mean over its tasks, an item's score is scaled by what its task is smaller than the
    others.
    """
    path = run.path / "samples" / f"{task}.jsonl"
    scores: dict[str, float] = {}
    parts: dict[str, list[str]] = {}
    for row in shown_rows(path, run.path):
        check_shape(row, SAMPLE, f"{path} has a broken row; {AGAIN}: row")
        if str(row["id"]) in scores:
            raise UserError(f"{path} has item {row['id']} twice; {AGAIN}")
        scores[str(row["id"])] = float(row["score"])
        parts.setdefault(row.get("task") or task, []).append(str(row["id"]))
    if run.results["tasks"][task].get("weight_by_size", True):
        return scores
    return {id: scores[id] * len(scores) / len(parts) / len(ids) for ids in parts.values() for id in ids}


def compare_items(arms: list[Arm], notes: list[str]) -> Comparison:
    """Read the samples of arms that share an evaluation and resample them jointly."""
    runs = [run for arm in arms for run in arm.runs]
    tasks = [task for task in runs[0].results["tasks"] if all(task in run.results["tasks"] for run in runs)]
    if not tasks:
        raise UserError(
            f"evaluated/{runs[0].address}: no task was evaluated for every arm; evaluate all on the same tasks"
        )
    means: dict[str, dict[str, Array]] = {arm.run.key: {} for arm in arms}
    items = {}
    for task in tasks:
        scores = [read_scores(run, task) for run in runs]
        shared = sorted(set.intersection(*(set(each) for each in scores)))
        if not shared:
            raise UserError(f"task {task}: no item was answered by every arm; evaluate all arms on the same items")
        if any(len(each) > len(shared) for each in scores):
            notes.append(f"{task}: only the {len(shared)} items that every arm answered are counted.")
        table = np.array([[each[item] for item in shared] for each in scores])
        for run, row in zip(runs, table, strict=True):
            stated = run.results["tasks"][task].get("value")
            if len(scores[0]) == len(shared) and stated is not None and abs(stated - row.mean()) > 1e-6:
                notes.append(
                    f"evaluated/{run.address}: {task} is {stated:g} in results.json, {row.mean():g} in samples."
                )
        resampled, column = item_means(table, f"items {task}"), 0
        for arm in arms:
            means[arm.run.key][task] = resampled[:, column : column + len(arm.runs)]
            column += len(arm.runs)
        items[task] = len(shared)
    return Comparison(tasks, arms, items, means)


def trained_tasks(arm: Arm, tasks: list[str]) -> set[str] | None:
    """Tasks whose family is among the targets' groups; None where the groups are not known."""
    groups = arm.run.groups
    return (
        None if groups is None else {task for task in tasks if task in groups or task.removesuffix("_choice") in groups}
    )


class Measures:
    """Resampled values of an arm, (1 + R, S), by the name of a measure."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        teacher = comparison.teacher
        self.teacher_average = self.average(teacher, comparison.tasks) if teacher else None

    def average(self, arm: Arm, tasks: list[str]) -> Array:
        means = self.comparison.means[arm.run.key]
        total: Array = np.mean([means[task] for task in tasks], axis=0)
        return total

    def ratio_of_means(self, arm: Arm, tasks: list[str]) -> Array:
        assert self.teacher_average is not None
        return ratio(self.average(arm, tasks), self.teacher_average)

    def mean_of_ratios(self, arm: Arm) -> Array | None:
        teacher, means = self.comparison.teacher, self.comparison.means
        assert teacher is not None
        ratios = [ratio(means[arm.run.key][t], means[teacher.run.key][t]) for t in self.comparison.tasks]
        ratios = [each for each in ratios if not np.isnan(each[0, 0])]
        return np.asarray(np.mean(ratios, axis=0)) if ratios else None


def _nll(run: Run) -> dict[str, float] | None:
    found: dict[str, float] | None = (run.results.get("likelihood") or {}).get("nll")
    return found


def nll_values(arm: Arm) -> Array | None:
    """(1 + R, S) likelihoods, constant over resamples until seeds are drawn."""
    found = [_nll(run) for run in arm.runs]
    known = [each["value"] for each in found if each is not None]
    return np.tile(np.array(known), (1 + RESAMPLES, 1)) if len(known) == len(arm.runs) else None


def _nll_interval(arm: Arm) -> dict[str, Any] | None:
    values = nll_values(arm)
    if values is None:
        return None
    averaged = over_seeds(values, arm.seeds)
    stderrs = [each["stderr"] for run in arm.runs if (each := _nll(run)) and each.get("stderr") is not None]
    if len(stderrs) < len(arm.runs):
        return seeds_alone(averaged, arm.seeds)
    noise: Array = averaged + normal_noise(float(np.mean(stderrs)), "nll")
    return interval(noise)


def seeds_alone(values: Array, seeds: list[int]) -> dict[str, Any] | None:
    """The interval of (1 + R,) values in which only seeds were drawn: with fewer than two seeds there is none."""
    found = interval(values)
    return {**found, "low": None, "high": None} if found and len(seeds) < 2 else found


def row_of(arm: Arm, measures: Measures) -> dict[str, Any]:
    """One arm as in `table.json`."""
    tasks, run = measures.comparison.tasks, arm.run
    trained = trained_tasks(arm, tasks)
    untrained = None if trained is None else [task for task in tasks if task not in trained]

    def over(values: Array | None) -> dict[str, float] | None:
        return None if values is None else interval(over_seeds(values, arm.seeds))

    def over_tasks(chosen: list[str] | None) -> dict[str, float] | None:
        return over(measures.average(arm, chosen)) if chosen else None

    retention: dict[str, Any] | None = None
    if measures.teacher_average is not None:
        retention = {
            "ratio_of_means": over(measures.ratio_of_means(arm, tasks)),
            "mean_of_ratios": over(measures.mean_of_ratios(arm)),
        }
    per_task = {}
    for task in tasks:
        stated = [each.results["tasks"][task] for each in arm.runs]
        extra = {
            name: float(np.mean([each[name] for each in stated]))
            for name in ("lenient", "malformed")
            if all(each.get(name) is not None for each in stated)
        }
        mean = over(measures.comparison.means[run.key][task]) or {}
        per_task[task] = {**mean, "n": measures.comparison.items[task], "metric": stated[0].get("metric"), **extra}
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
        "nll": _nll_interval(arm),
        "tasks": per_task,
        "parameters": run.parameters,
        "flops_saved": run.flops_saved,
        "blocks_removed": run.blocks_removed,
        "addresses": [each.address for each in arm.runs],
    }
