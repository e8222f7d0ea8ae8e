"""From arms to differences: two arms that share a base model, a pruned model and a dataset, and each with its base;
and an arm on a repaired model with the same on the model as it was cut.

A difference is paired: the same resampled seeds and items enter both arms, so it is better known than two separate
intervals suggest. It is always the later mode minus the earlier one (untuned, sft, logit_distill, self_distill, gold,
merged). Pairs whose settings differ, apart from who wrote the answers and how they are taught, are kept and say in
what they differ. The likelihood is contrasted over seeds alone, because its items are not on disk; with one seed it has
no interval.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sdd.report.arms import MODES, Arm, settings_differ
from sdd.report.intervals import Array, interval, over_seeds
from sdd.report.measures import Comparison, Measures, compare_items, nll_values, row_of, seeds_alone, trained_tasks


@dataclass
class Study:
    """All that the tables and plots show."""

    comparisons: list[Comparison]
    rows: list[dict[str, Any]]
    contrasts: list[dict[str, Any]]
    arms: dict[str, Arm]
    notes: list[str] = field(default_factory=list)


def pairs(comparison: Comparison) -> list[tuple[Arm, Arm]]:
    """Each tuned arm with the model it was tuned from, and with the tuned arms before it of that base and dataset."""
    untuned = {arm.run.base: arm for arm in comparison.arms if not arm.tuned}
    tuned = [arm for arm in comparison.arms if arm.tuned]
    tuned.sort(key=lambda arm: MODES.index(arm.mode) if arm.mode in MODES else len(MODES))
    against_base = [(arm, untuned[arm.run.base]) for arm in tuned if arm.run.base in untuned]
    among = [
        (later, earlier)
        for index, later in enumerate(tuned)
        for earlier in tuned[:index]
        if (later.run.base, later.run.dataset) == (earlier.run.base, earlier.run.dataset)
    ]
    return against_base + among + _repaired_pairs(comparison.arms)


def _repaired_pairs(arms: list[Arm]) -> list[tuple[Arm, Arm]]:
    """Each arm on a repaired model with the one that differs from it in the repair alone."""

    def differ_in_repair_alone(a: Arm, b: Arm) -> bool:
        names = settings_differ(a, b) if a.tuned else {}
        return (a.mode, a.run.dataset) == (b.mode, b.run.dataset) and all(n.startswith("pruning.") for n in names)

    repaired = [arm for arm in arms if arm.run.base != arm.run.cut]
    return [(a, b) for a in repaired for b in arms if b.run.base == a.run.cut and differ_in_repair_alone(a, b)]


def _contrast(a: Arm, b: Arm, measures: Measures, notes: list[str]) -> list[dict[str, Any]]:
    """a minus b by every measure, on the seeds that both have."""
    seeds = sorted(set(a.seeds) & set(b.seeds)) if a.seeds and b.seeds else a.seeds or b.seeds
    if a.seeds and b.seeds and not seeds:
        notes.append(f"no contrast of {a.name} and {b.name}: they have no seed in common.")
        return []
    tasks = measures.comparison.tasks
    sets = [trained for arm in (a, b) if (trained := trained_tasks(arm, tasks)) is not None]
    trained_on = [task for task in tasks if sets and all(task in each for each in sets)]
    not_trained_on = [task for task in tasks if sets and not any(task in each for each in sets)]

    def paired(arm: Arm, values: Array) -> Array:
        """The columns of the shared seeds, averaged; a deterministic arm has one column."""
        return over_seeds(values[:, [arm.seeds.index(seed) for seed in seeds] if arm.seeds else [0]], seeds)

    def difference(value: Callable[[Arm, list[str]], Array], chosen: list[str]) -> dict[str, Any] | None:
        return interval(paired(a, value(a, chosen)) - paired(b, value(b, chosen))) if chosen else None

    found = {
        "average": difference(measures.average, tasks),
        "trained_on": difference(measures.average, trained_on),
        "not_trained_on": difference(measures.average, not_trained_on),
        "retention": difference(measures.ratio_of_means, tasks if measures.teacher_average is not None else []),
    }
    left, right = nll_values(a), nll_values(b)
    if left is not None and right is not None:
        found["nll"] = seeds_alone(paired(a, left) - paired(b, right), seeds)
    found |= {task: difference(measures.average, [task]) for task in tasks}
    differ = settings_differ(a, b) if a.tuned and b.tuned else {}
    return [
        {
            "a": a.name,
            "b": b.name,
            "measure": measure,
            "better": "lower" if measure == "nll" else "higher",
            **values,
            "seeds": seeds,
            "settings_differ": differ,
        }
        for measure, values in found.items()
        if values is not None
    ]


def changes(study: Study, comparison: Comparison) -> dict[str, dict[str, dict[str, Any]]]:
    """For each fine-tuned arm its differences to the model before fine-tuning, by measure."""
    bases = {arm.run.base: arm.name for arm in comparison.arms if not arm.tuned}
    before = {arm.name: bases.get(arm.run.base) for arm in comparison.arms if arm.tuned}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in study.contrasts:
        if before.get(row["a"]) == row["b"]:
            found.setdefault(row["a"], {})[row["measure"]] = row
    return found


def compare(arms: list[Arm], notes: list[str]) -> Study:
    """Rows and contrasts of all arms, each comparison (unpruned model and evaluation) on its own."""
    comparisons: list[Comparison] = []
    rows: list[dict[str, Any]] = []
    contrasts: list[dict[str, Any]] = []
    for key in dict.fromkeys(arm.run.comparison for arm in arms):
        comparison = compare_items([arm for arm in arms if arm.run.comparison == key], notes)
        measures = Measures(comparison)
        rows += [row_of(arm, measures) for arm in comparison.arms]
        for a, b in pairs(comparison):
            contrasts += _contrast(a, b, measures, notes)
        comparisons.append(comparison)
        bases = {arm.run.base for arm in comparison.arms if not arm.tuned}
        alone = sum(arm.tuned and bool(arm.run.base) and arm.run.base not in bases for arm in comparison.arms)
        if alone:
            notes.append(
                f"{alone} fine-tuned arm{'s lack' if alone > 1 else ' lacks'} the pruned model to be compared with: "
                "`finetune=none`, with the same evaluation settings, gives it."
            )
    return Study(comparisons, rows, contrasts, {arm.name: arm for arm in arms}, list(dict.fromkeys(notes)))
