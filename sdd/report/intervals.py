"""95% intervals of values that seeds and items make uncertain, from their components of variance.

A score is a table of seeds by items. Seeds and items are crossed: every seed answers the same items. Seen so, a mean of
T tasks, each of S seeds by N items, has the variance

    seeds / S + sum over tasks of (items / N + noise / (S N)) / T^2

with the variances of what is a seed's in all items, what is an item's for all seeds, and what is left. They are
estimated by the mean squares of a two-way table (Searle, Casella and McCulloch 1992, "Variance components", ch. 4): the
variance of the S means over all items holds the first and the last, that of the N means over seeds the last two. So

    half-width^2 = t(S - 1)^2 * max(0, variance of seeds' means / S - noise) + t^2 * variance of items' means / N

where each part has the quantile of its own degrees of freedom, and the half-widths are added in squares, as of
independent errors. What arms of a comparison share (hard items, a lucky sample of rows) cancels: a difference is a
table itself, seed by seed and item by item. A ratio is the table of its linearisation (delta method). With one seed, or
for arms without any, items alone are uncertain. `benchmarks/coverage.py` simulates what these intervals cover.

What they do not cover: another teacher, another pruned model, another data set or another set of tasks; with one seed,
another seed. Tasks that share items count as if they did not. Nothing is corrected for many comparisons.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value, and for each part (task) a table (S, N) of what its seeds and items add: means of tables, summed up.

    Tables of a ratio are its linearisation, whose mean need not be the value.
    """

    value: float
    tables: Mapping[str, Array]

    def __sub__(self, other: "Estimate") -> "Estimate":
        """Paired by seed and item; one that has no seeds (one row) is the same for every seed of the other."""
        tables = {name: table - other.tables[name] for name, table in self.tables.items()}
        return Estimate(self.value - other.value, tables)

    @property
    def by_seed(self) -> list[float]:
        return [float(value) for value in sum(table.mean(axis=1) for table in self.tables.values())]


def mean_of(tables: Mapping[str, Array]) -> Estimate:
    """Unweighted mean over parts of the mean over seeds and items of each (S, N)."""
    value = float(np.mean([table.mean() for table in tables.values()]))
    return Estimate(value, {name: table / len(tables) for name, table in tables.items()})


def average(estimates: Sequence[Estimate]) -> Estimate:
    """Unweighted mean of estimates of different parts."""
    tables = {name: table / len(estimates) for estimate in estimates for name, table in estimate.tables.items()}
    return Estimate(float(np.mean([estimate.value for estimate in estimates])), tables)


def ratio(student: Estimate, teacher: Estimate) -> Estimate | None:
    """student / teacher, paired by item; None where the teacher scores nothing."""
    if not teacher.value > 0:
        return None
    value = student.value / teacher.value
    tables = {name: (table - value * teacher.tables[name]) / teacher.value for name, table in student.tables.items()}
    return Estimate(value, tables)


def ratio_of_sums(above: Array, below: Array, name: str) -> Estimate | None:
    """Mean over seeds of the ratio of sums over items, `above` / `below`, both (S, N); None where a sum is 0."""
    sums = below.sum(axis=1, keepdims=True)
    if not (sums > 0).all():
        return None
    ratios = above.sum(axis=1, keepdims=True) / sums
    table = ratios + (above - ratios * below) / (sums / below.shape[1])
    return Estimate(float(ratios.mean()), {name: table})


def interval(estimate: Estimate | None) -> dict[str, float] | None:
    """{"mean", "low", "high"} of an estimate; None of None."""
    if estimate is None:
        return None
    half = half_width(list(estimate.tables.values()))
    return {"mean": estimate.value, "low": estimate.value - half, "high": estimate.value + half}


def half_width(tables: Sequence[Array]) -> float:
    """Half of the interval of the sum of the tables' means, each (S, N) with one S. One item has no spread."""
    seeds = len(tables[0])
    items = np.array([_variance(table.mean(axis=0)) for table in tables])
    squared = 0.0
    if seeds > 1:
        means = np.sum([table.mean(axis=1) for table in tables], axis=0)
        noise = sum(_noise(table) for table in tables)
        squared += _quantile(seeds - 1) ** 2 * max(0.0, _variance(means) - noise)
    if items.sum() > 0:
        freedom = items.sum() ** 2 / sum(v**2 / (t.shape[1] - 1) for v, t in zip(items, tables, strict=True) if v > 0)
        squared += _quantile(float(freedom)) ** 2 * float(items.sum())
    return float(np.sqrt(squared))


def _variance(values: Array) -> float:
    """Of the mean of the values, as independent draws; identical ones have none, whatever rounding says."""
    return float(values.var(ddof=1) / len(values)) if len(values) > 1 and np.ptp(values) > 0 else 0.0


def _noise(table: Array) -> float:
    """Variance of the table's mean by what is neither a seed's nor an item's."""
    seeds, items = table.shape
    if items < 2:
        return 0.0
    rest = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
    return float((rest**2).sum() / ((seeds - 1) * (items - 1)) / (seeds * items))


def _quantile(freedom: float) -> float:
    """Of Student's t, two-sided."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + LEVEL) / 2))
