"""95% percentile intervals from a paired bootstrap over seeds and items.

A score is a table of seeds by items. Seeds and items are crossed: every seed answers the same items. One resample
draws seeds with replacement, then items of each task with replacement, and uses *the same draw* for every arm of a
comparison, the teacher included, so that what arms share (hard items, lucky row samples) cancels in a difference or a
ratio. Each task is drawn on its own; the average over tasks is unweighted. Scores of deterministic arms have one row
and only items are drawn. Method: percentile bootstrap (Efron 1979) on crossed factors, which is slightly conservative
(Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1).

Row 0 of every array here is the sample itself and the rows after it are the resamples, so that any formula applied
to the whole array gives its point estimate and its resamples at once.

What the intervals do not cover: another teacher, another pruned model, another data set or another set of tasks.
With few seeds they are too narrow (by sqrt((S - 1) / S) for the part that seeds cause, and with one seed that part is
missing altogether). Tasks that share items are drawn as if they did not. Nothing is corrected for many comparisons.
"""

import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

RESAMPLES = 2000
LEVEL = 0.95
GENERATOR_SEED = 20240
CHUNK = 4_000_000
"""Numbers drawn at a time, which bounds memory at about 64 MB whatever the number of items."""


def generator(key: str) -> np.random.Generator:
    """Random draws that are a function of `key`: the same for every arm, whatever else is in the report."""
    return np.random.default_rng([GENERATOR_SEED, zlib.crc32(key.encode())])


def draw_counts(size: int, rows: int, rng: np.random.Generator) -> Array:
    """How often each of `size` things is drawn when `size` are drawn with replacement: -> (rows, size)."""
    return np.asarray(rng.multinomial(size, np.full(size, 1.0 / size), size=rows), dtype=np.float64)


def item_means(scores: Array, key: str, resamples: int = RESAMPLES) -> Array:
    """Means over jointly resampled items, (A, N) -> (1 + resamples, A); row 0 is the plain mean.

    Counts are whole numbers, so sums of 0/1 scores are exact and equal rows stay equal to the last bit.
    """
    items = scores.shape[1]
    rng = generator(key)
    means = np.empty((1 + resamples, scores.shape[0]))
    means[0] = scores.sum(axis=1)
    step = max(1, CHUNK // items)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        means[1 + start : 1 + start + rows] = draw_counts(items, rows, rng) @ scores.T
    means /= items
    return means


def over_seeds(values: Array, seeds: Sequence[int]) -> Array:
    """Mean over jointly resampled seeds, (1 + R, S) -> (1 + R,); a single column is returned as it is.

    The draw depends on the seeds alone, so that two arms with the same seeds get the same draw.
    """
    if values.shape[1] == 1:
        return values[:, 0]
    assert values.shape[1] == len(seeds), (values.shape, seeds)
    mean: Array = (_seed_counts(tuple(seeds), len(values) - 1) * values).sum(axis=1) / len(seeds)
    return mean


@lru_cache(maxsize=64)
def _seed_counts(seeds: tuple[int, ...], resamples: int) -> Array:
    drawn = draw_counts(len(seeds), resamples, generator(f"seeds {list(seeds)}"))
    return np.concatenate([np.ones((1, len(seeds))), drawn])


def ratio(student: Array, teacher: Array) -> Array:
    """student / teacher, elementwise with broadcasting; NaN where the teacher scores nothing."""
    undefined: Array = np.full(np.broadcast(student, teacher).shape, np.nan)
    return np.divide(student, teacher, out=undefined, where=teacher > 0)


def normal_noise(stderr: float, key: str, resamples: int = RESAMPLES) -> Array:
    """Sampling noise of a mean of which only the standard error is known: -> (1 + resamples,), row 0 is zero."""
    noise = np.zeros(1 + resamples)
    noise[1:] = generator(key).normal(0.0, stderr, resamples)
    return noise


def interval(values: Array) -> dict[str, float] | None:
    """Point estimate and percentile interval of (1 + R,) values; None if the estimate itself is undefined."""
    if np.isnan(values[0]):
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(values[1:], [tail, 1 - tail])
    return {"mean": float(values[0]), "low": float(low), "high": float(high)}
