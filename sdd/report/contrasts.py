"""From pairs of arms to differences.

A difference is paired by seed and item, so it is better known than two separate intervals suggest. Which arms are
subtracted from which is `pairing`'s. Pairs whose settings differ, apart from what the pair is about, are kept and say
in what they differ; they are not comparable, unless each arm was tuned by itself: that pair stands beside the one with
equal settings.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdd.report.arms import Arm
from sdd.report.examined import examine
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
    health: dict[str, dict[str, Any]]
    """By the name of the arm, as in `health.json`."""
    notes: list[str] = field(default_factory=list)


TUNED = {"finetune.learning_rate", "finetune.epochs", "adapter.rank"}
"""What is tuned for each way of fine-tuning by itself."""


def comparable(pairs: list[Pair], averages: Mapping[str, float]) -> set[tuple[str, str]]:
    """The names of pairs with equal settings, and beside them of two modes with each at its own tuned ones.

    Where several pairs differ in tuned settings alone, that one is meant whose arms score best, if no pair with equal
    settings scores better: the best of one evaluation, so tune on another split than the one that is reported.
    """

    def group(pair: Pair) -> tuple[Any, ...]:
        return pair.a.mode, pair.b.mode, pair.a.run.base, pair.a.run.dataset, pair.a.run.merge, pair.baseline

    def score(pair: Pair) -> float:
        return averages[pair.a.name] + averages[pair.b.name]

    by_group: dict[tuple[Any, ...], tuple[list[Pair], list[Pair]]] = {}
    for pair in pairs:
        differ = pair.settings_differ
        if differ.keys() <= TUNED:
            by_group.setdefault(group(pair), ([], []))[bool(differ)].append(pair)
    chosen: list[Pair] = []
    for equal, tuned in by_group.values():
        chosen += equal
        if not equal or len(tuned) == 1:
            chosen += tuned
        elif tuned and score(best := max(tuned, key=score)) >= max(map(score, equal)):
            chosen.append(best)
    return {(pair.a.name, pair.b.name) for pair in chosen}


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
    health: dict[str, dict[str, Any]] = {}
    for key in dict.fromkeys(arm.run.comparison for arm in arms):
        comparison = compare_items([arm for arm in arms if arm.run.comparison == key], notes)
        measures = Measures(comparison)
        own = [row_of(arm, measures) for arm in comparison.arms]
        rows += own
        health |= {record["arm"]: record for record in examine(comparison, own)}
        compared = pairs(comparison.arms, baselines)
        alike = comparable(compared, {row["arm"]: row["average"]["mean"] for row in own})
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
    by_name = {arm.name: arm for arm in arms}
    return Study(comparisons, rows, all_pairs, contrasts, by_name, health, list(dict.fromkeys(notes)))
