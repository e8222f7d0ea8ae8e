"""From pairs of arms to differences.

A difference is paired by seed and item, so it is better known than two separate intervals suggest. Which arms are
subtracted from which is `pairing`'s. Pairs whose settings differ, apart from what the pair is about, are kept and say
in what they differ; they are not comparable, unless each arm was tuned by itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdd.report.arms import Arm
from sdd.report.intervals import Estimate, interval
from sdd.report.measures import Comparison, Measures, compare_items, row_of, trained_tasks
from sdd.report.pairing import Pair, check_baselines, pairs


@dataclass
class Study:
    """All that the tables and plots show."""

    comparisons: list[Comparison]
    rows: list[dict[str, Any]]
    pairs: list[Pair]
    contrasts: list[dict[str, Any]]
    arms: dict[str, Arm]
    notes: list[str] = field(default_factory=list)


TUNED = {"finetune.learning_rate", "finetune.epochs", "adapter.rank"}
"""What is tuned for each way of fine-tuning by itself."""


def comparable(pairs: list[Pair]) -> set[tuple[str, str]]:
    """The names of pairs with equal settings; and where two modes have none on a model and dataset, of tuned ones."""

    def group(pair: Pair) -> tuple[Any, ...]:
        return pair.a.mode, pair.b.mode, pair.a.run.base, pair.a.run.dataset, pair.a.run.merge, pair.baseline

    differences = [(pair, pair.settings_differ) for pair in pairs]
    equal = {group(pair) for pair, differ in differences if not differ}
    return {
        (pair.a.name, pair.b.name)
        for pair, differ in differences
        if not differ or (differ.keys() <= TUNED and group(pair) not in equal)
    }


def _contrast(pair: Pair, is_comparable: bool, measures: Measures, notes: list[str]) -> list[dict[str, Any]]:
    """a minus b by every measure, on the seeds that both have."""
    a, b = pair.a, pair.b
    seeds = sorted(set(a.seeds) & set(b.seeds)) if a.seeds and b.seeds else a.seeds or b.seeds
    if a.seeds and b.seeds and not seeds:
        notes.append(f"no contrast of {a.name} and {b.name}: they have no seed in common.")
        return []
    tasks = measures.comparison.tasks
    sets = [trained for arm in (a, b) if (trained := trained_tasks(arm, tasks)) is not None]
    trained_on = [task for task in tasks if sets and all(task in trained for trained in sets)]
    not_trained_on = [task for task in tasks if sets and not any(task in trained for trained in sets)]

    def difference(value: Callable[..., Estimate | None], chosen: list[str]) -> dict[str, Any] | None:
        left, right = (value(arm, chosen, seeds) if chosen else None for arm in (a, b))
        return interval(left - right) if left and right else None

    intervals = {
        "average": difference(measures.average, tasks),
        "trained_on": difference(measures.average, trained_on),
        "not_trained_on": difference(measures.average, not_trained_on),
        "retention": difference(measures.ratio_of_means, tasks if measures.teacher_average is not None else []),
    }
    left, right = measures.nll(a, seeds), measures.nll(b, seeds)
    intervals["nll"] = interval(left - right) if left and right else None
    intervals |= {task: difference(measures.average, [task]) for task in tasks}
    return [
        {
            "a": a.name,
            "b": b.name,
            "measure": measure,
            "better": "lower" if measure == "nll" else "higher",
            **values,
            "seeds": seeds,
            "baseline": pair.baseline,
            "settings_differ": pair.settings_differ,
            "comparable": is_comparable,
        }
        for measure, values in intervals.items()
        if values is not None
    ]


def changes(study: Study, comparison: Comparison) -> dict[str, dict[str, dict[str, Any]]]:
    """For each fine-tuned arm its differences to the model before fine-tuning, by measure."""
    bases = {arm.run.base: arm.name for arm in comparison.arms if not arm.tuned}
    before = {arm.name: bases.get(arm.run.base) for arm in comparison.arms if arm.tuned}
    by_arm: dict[str, dict[str, dict[str, Any]]] = {}
    for row in study.contrasts:
        if before.get(row["a"]) == row["b"]:
            by_arm.setdefault(row["a"], {})[row["measure"]] = row
    return by_arm


def compare(arms: list[Arm], notes: list[str], baselines: Sequence[str] = ()) -> Study:
    """Rows and contrasts of all arms, each comparison (unpruned model and evaluation) on its own."""
    check_baselines(arms, baselines)
    comparisons: list[Comparison] = []
    rows: list[dict[str, Any]] = []
    all_pairs: list[Pair] = []
    contrasts: list[dict[str, Any]] = []
    for key in dict.fromkeys(arm.run.comparison for arm in arms):
        comparison = compare_items([arm for arm in arms if arm.run.comparison == key], notes)
        measures = Measures(comparison)
        rows += [row_of(arm, measures) for arm in comparison.arms]
        compared = pairs(comparison.arms, baselines)
        alike = comparable(compared)
        for pair in compared:
            contrasts += _contrast(pair, (pair.a.name, pair.b.name) in alike, measures, notes)
        all_pairs += compared
        comparisons.append(comparison)
        bases = {arm.run.base for arm in comparison.arms if not arm.tuned}
        alone = sum(arm.tuned and bool(arm.run.base) and arm.run.base not in bases for arm in comparison.arms)
        if alone:
            notes.append(
                f"{alone} fine-tuned arm{'s lack' if alone > 1 else ' lacks'} the pruned model to be compared with: "
                "`finetune=none`, with the same evaluation settings, gives it."
            )
    return Study(comparisons, rows, all_pairs, contrasts, {arm.name: arm for arm in arms}, list(dict.fromkeys(notes)))
