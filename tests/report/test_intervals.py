"""Intervals on cases done by hand, with a known answer, or simulated with a known truth."""

import math
import time

import numpy as np
import pytest

from sdd.report.intervals import Estimate, average, half_width, interval, mean_of, ratio, ratio_of_sums


def coins(seed: int, items: int, share: float = 0.5) -> np.ndarray:
    return (np.random.default_rng(seed).random(items) < share).astype(float)


def one(*rows: np.ndarray) -> Estimate:
    return mean_of({"task": np.stack(rows)})


def width(estimate: Estimate | None) -> float:
    spread = interval(estimate)
    assert spread is not None
    return spread["high"] - spread["low"]


def test_value_is_the_mean_over_tasks_of_means():
    tables = {"a": np.array([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]]), "b": np.array([[1.0, 1.0], [1.0, 1.0]])}
    estimate = mean_of(tables)
    assert estimate.value == (0.5 + 1.0) / 2
    assert estimate.by_seed == [0.875, 0.625]
    both = average([mean_of({"a": tables["a"]}), mean_of({"b": tables["b"]})])
    assert (both.value, both.by_seed) == (estimate.value, estimate.by_seed)
    assert interval(both) == interval(estimate)


def test_identical_arms_differ_by_exactly_zero():
    scores = [coins(seed, 101) for seed in (1, 2, 3)]
    assert interval(one(*scores) - one(*scores)) == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_constant_shift_has_no_width():
    """Every item one point better for b, whatever the seed."""
    a = np.stack([coins(4, 80), coins(5, 80), coins(6, 80)])
    difference = interval(one(*(a + 1.0)) - one(*a))
    assert difference == {name: pytest.approx(1.0, abs=1e-12) for name in ("mean", "low", "high")}


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_items_alone_are_the_t_interval(share):
    scores = coins(5, 900, share)
    found = interval(one(scores))
    half = 1.9626 * scores.std(ddof=1) / 30
    assert found is not None
    assert found["low"] == pytest.approx(scores.mean() - half, rel=1e-4)
    assert found["high"] == pytest.approx(scores.mean() + half, rel=1e-4)


@pytest.mark.parametrize(("seeds", "quantile"), [(2, 12.7062), (3, 4.30265), (5, 2.77645), (8, 2.36462)])
def test_seeds_alone_are_the_t_interval(seeds, quantile):
    """Items without variance: the interval is the one of a mean of S values."""
    values = np.random.default_rng(6).normal(0.6, 0.05, seeds)
    assert half_width([np.tile(values[:, None], (1, 40))]) == pytest.approx(
        quantile * values.std(ddof=1) / math.sqrt(seeds), rel=1e-4
    )


def test_components_of_a_table_done_by_hand():
    """Seeds' means 1 and 3 (variance of their mean 1), items' means 0 and 4 (4); what is left 0, then 1 and -1 (1)."""
    quantile = 12.7062  # one degree of freedom each
    assert half_width([np.array([[-1.0, 3.0], [1.0, 5.0]])]) == pytest.approx(quantile * math.sqrt(1 + 4), rel=1e-4)
    assert half_width([np.array([[0.0, 2.0], [0.0, 6.0]])]) == pytest.approx(quantile * math.sqrt(0 + 4), rel=1e-4)


def test_pairing_narrows_a_difference():
    """Two arms that fail on the same items: paired, the items cancel."""
    a = coins(8, 300)
    b = a.copy()
    b[:15] = 1 - b[:15]
    assert width(one(a) - one(b)) < 0.5 * math.hypot(width(one(a)), width(one(b)))


def test_same_seeds_cancel():
    """A shift that is the same for every seed is known exactly, however far the seeds are apart."""
    values = np.tile(np.array([[0.1], [0.5], [0.9]]), (1, 30))
    same = interval(one(*(values + 0.25)) - one(*values))
    assert same == {name: pytest.approx(0.25) for name in ("mean", "low", "high")}
    assert width(one(*(values + 0.25)) - one(*values[[1, 2, 0]])) > 0.3


def test_an_arm_without_seeds_is_the_same_for_every_seed():
    scores, fixed = np.stack([coins(seed, 50) for seed in (1, 2, 3)]), coins(9, 50)
    difference = one(*scores) - one(fixed)
    assert difference.tables["task"].shape == (3, 50)
    assert interval(difference) == interval(one(*scores) - one(fixed, fixed, fixed))


def test_ratio_to_itself_is_one_and_to_nothing_is_undefined():
    scores = one(coins(10, 50))
    assert interval(ratio(scores, scores)) == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert interval(ratio(scores, one(np.zeros(50)))) is None


def test_retention_is_paired_with_the_teacher():
    """A student right on exactly the teacher's items but half of them: the ratio varies less than either share."""
    teacher = np.concatenate([np.ones(100), np.zeros(100)])
    student = np.where(np.arange(200) % 2 == 0, teacher, 0.0)
    found = ratio(one(student), one(teacher))
    assert found is not None
    assert found.value == 0.5
    assert width(found) < 0.9 * math.hypot(width(one(student)) / 0.5, width(one(teacher)) * 0.5 / 0.5)


def test_ratio_of_sums_has_the_spread_of_its_linearisation():
    """Nats over tokens against 4,000 studies simulated with the same lengths."""
    rng = np.random.default_rng(3)
    items = 300

    def study():
        tokens = rng.integers(4, 20, (1, items)).astype(float)
        return tokens * rng.normal(0.4, 0.1, (1, items)), tokens

    ratios = [above.sum() / below.sum() for above, below in (study() for _ in range(4000))]
    halves = [width(ratio_of_sums(*study(), "nll")) / 2 for _ in range(50)]
    assert np.mean(halves) == pytest.approx(1.96 * np.std(ratios), rel=0.05)
    above, below = study()
    known = ratio_of_sums(np.tile(above, (2, 1)), np.tile(below, (2, 1)), "nll")
    assert known is not None
    assert known.by_seed == pytest.approx([above.sum() / below.sum()] * 2)
    assert ratio_of_sums(above, np.zeros_like(below), "nll") is None


@pytest.mark.parametrize("seeds", [3, 5, 8])
@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0])
def test_intervals_cover_the_truth(seeds, spread):
    """600 simulated studies of 4 tasks, true difference 0: 92 to 98.5% covered. `benchmarks/coverage.py` has more."""
    rng = np.random.default_rng([seeds, round(10 * spread)])
    covered = 0
    for _ in range(600):
        own = rng.normal(0, math.sqrt(spread) / 100, (seeds, 1))
        tables = [
            (own + rng.normal(0, 0.26, 60) + rng.normal(0, 0.25, (seeds, 60))) / 4 for _ in range(4)
        ]  # shares as the embedded study has them
        covered += abs(sum(table.mean() for table in tables)) <= half_width(tables)
    assert 0.92 <= covered / 600 <= 0.985


def test_a_large_study_is_quick():
    """435 differences of 30 arms of 5 seeds on 9 tasks of 250 items, in processor seconds, with a wide margin."""
    rng = np.random.default_rng(11)
    arms = [mean_of({str(task): (rng.random((5, 250)) < 0.5).astype(float) for task in range(9)}) for _ in range(30)]
    started = time.process_time()
    found = [interval(a - b) for place, a in enumerate(arms) for b in arms[:place]]
    assert len(found) == 435
    assert time.process_time() - started < 10
