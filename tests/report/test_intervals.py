"""The bootstrap on cases done by hand or with a known answer."""

import time

import numpy as np
import pytest

from sdd.report.intervals import (
    RESAMPLES,
    draw_counts,
    generator,
    interval,
    item_means,
    normal_noise,
    over_seeds,
    ratio,
)


def coins(seed: int, items: int, share: float = 0.5) -> np.ndarray:
    return (np.random.default_rng(seed).random(items) < share).astype(float)


def test_first_row_is_the_sample_itself():
    scores = np.array([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]])
    means = item_means(scores, "task")
    assert means.shape == (1 + RESAMPLES, 2)
    assert means[0].tolist() == [0.75, 0.25]
    found = interval(over_seeds(means, [0, 1]))
    assert found is not None
    assert found["mean"] == 0.5


def test_counts_draw_as_many_as_there_are():
    counts = draw_counts(7, 50, generator("x"))
    assert counts.shape == (50, 7)
    assert (counts.sum(axis=1) == 7).all()
    assert (counts == np.round(counts)).all()


def test_same_key_same_draw_whatever_else_is_scored():
    scores = coins(1, 60)
    alone = item_means(scores[None], "task")
    beside = item_means(np.stack([coins(2, 60), scores, coins(3, 60)]), "task")
    assert (alone[:, 0] == beside[:, 1]).all()
    assert (alone != item_means(scores[None], "another task")).any()


def test_chunks_do_not_change_the_draw(monkeypatch):
    scores = np.stack([coins(1, 30), coins(2, 30)])
    whole = item_means(scores, "task", 100)
    monkeypatch.setattr("sdd.report.intervals.CHUNK", 90)
    assert (item_means(scores, "task", 100) == whole).all()


def test_identical_arms_differ_by_exactly_zero():
    scores = np.stack([coins(seed, 101) for seed in (1, 2, 3)])
    means = item_means(np.concatenate([scores, coins(9, 101)[None], scores]), "task")
    difference = over_seeds(means[:, :3], [0, 1, 2]) - over_seeds(means[:, 4:], [0, 1, 2])
    assert interval(difference) == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_constant_shift_has_no_width():
    """Every item one point better for b: whatever is drawn, the difference is the shift."""
    a = coins(4, 80)
    means = item_means(np.stack([a, a + 1.0]), "task")
    found = interval(means[:, 1] - means[:, 0])
    assert found is not None
    assert [round(found[name], 12) for name in ("mean", "low", "high")] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_items_alone_agree_with_the_normal_interval(share):
    scores = coins(5, 900, share)
    found = interval(item_means(scores[None], "task")[:, 0])
    half = 1.96 * np.sqrt(scores.mean() * (1 - scores.mean()) / 900)
    assert found is not None
    assert found["low"] == pytest.approx(scores.mean() - half, abs=0.12 * half)
    assert found["high"] == pytest.approx(scores.mean() + half, abs=0.12 * half)


def test_seeds_alone_agree_with_the_normal_interval():
    """Items without variance: the interval is the one of a mean of S seeds, with the bootstrap's (S - 1) / S."""
    seeds = 30
    values = np.random.default_rng(6).normal(0.6, 0.05, seeds)
    found = interval(over_seeds(np.tile(values, (1 + RESAMPLES, 1)), range(seeds)))
    half = 1.96 * values.std() / np.sqrt(seeds)
    assert found is not None
    assert found["high"] - found["low"] == pytest.approx(2 * half, rel=0.1)
    assert found["mean"] == pytest.approx(values.mean())


def test_seeds_and_items_add_their_variances():
    items, seeds = 400, 20
    rng = np.random.default_rng(7)
    scores = rng.normal(0, 0.4, items)[None] + rng.normal(0, 0.03, seeds)[:, None]
    resampled = over_seeds(item_means(scores, "task"), range(seeds))[1:]
    expected = scores.mean(axis=0).var() / items + scores.mean(axis=1).var() / seeds
    assert resampled.var() == pytest.approx(expected, rel=0.15)


def test_pairing_narrows_a_difference():
    """Two arms that fail on the same items: paired, the items cancel; drawn apart, they do not."""
    a = coins(8, 300)
    b = a.copy()
    b[:15] = 1 - b[:15]
    together = item_means(np.stack([a, b]), "task")
    paired = interval(together[:, 0] - together[:, 1])
    apart = interval(item_means(a[None], "task a")[:, 0] - item_means(b[None], "task b")[:, 0])
    assert paired is not None
    assert apart is not None
    assert paired["mean"] == apart["mean"]
    assert paired["high"] - paired["low"] < 0.5 * (apart["high"] - apart["low"])


def test_same_seeds_are_drawn_together():
    """A shift that is the same for every seed is known exactly, however far the seeds are apart."""
    values = np.tile([0.1, 0.5, 0.9], (1 + RESAMPLES, 1))
    found = interval(over_seeds(values + 0.25, [3, 4, 5]) - over_seeds(values, [3, 4, 5]))
    assert found == {"mean": pytest.approx(0.25), "low": pytest.approx(0.25), "high": pytest.approx(0.25)}
    other = interval(over_seeds(values + 0.25, [3, 4, 5]) - over_seeds(values, [6, 7, 8]))
    assert other is not None
    assert other["high"] - other["low"] > 0.3


def test_ratio_to_itself_is_one_and_to_nothing_is_undefined():
    means = item_means(coins(10, 50)[None], "task")
    assert interval(ratio(means, means)[:, 0]) == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert interval(ratio(means, np.zeros_like(means))[:, 0]) is None


def test_retention_draws_the_teacher_along():
    """A student right on exactly the teacher's items but half of them: the ratio varies less than either share."""
    teacher = np.concatenate([np.ones(100), np.zeros(100)])
    student = np.where(np.arange(200) % 2 == 0, teacher, 0.0)
    means = item_means(np.stack([student, teacher]), "task")
    joint = interval(ratio(means[:, 0], means[:, 1]))
    apart = interval(ratio(item_means(student[None], "a")[:, 0], item_means(teacher[None], "b")[:, 0]))
    assert joint is not None
    assert apart is not None
    assert joint["mean"] == 0.5
    assert joint["high"] - joint["low"] < 0.9 * (apart["high"] - apart["low"])


def test_normal_noise_has_the_given_error():
    noise = normal_noise(0.02, "nll")
    assert noise[0] == 0
    assert noise[1:].std() == pytest.approx(0.02, rel=0.1)


def test_a_large_study_is_quick():
    """30 arms of 5 seeds on one task of 1000 items, in processor seconds, with a wide margin."""
    scores = (np.random.default_rng(11).random((150, 1000)) < 0.5).astype(float)
    started = time.process_time()
    means = item_means(scores, "task")
    assert means.shape == (1 + RESAMPLES, 150)
    assert time.process_time() - started < 20
