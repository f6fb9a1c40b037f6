"""Intervals against tables of Student's t, and by how often they cover the truth."""

from __future__ import annotations

import random
import statistics

import pytest

from deltatune.data import bootstrap_interval, interval, paired_interval


def test_t_interval_by_hand():
    # t(0.975, 4) = 2.776 in any table; the standard deviation of 1..5 is sqrt(2.5)
    half = 2.776445 * 2.5**0.5 / 5**0.5
    found = interval([1, 2, 3, 4, 5])
    assert found == pytest.approx((3.0, 3 - half, 3 + half), rel=1e-5)
    # t(0.95, 1) = 6.314; two values, 90 %
    assert interval([0.0, 2.0], level=0.9) == pytest.approx((1.0, 1 - 6.313752, 1 + 6.313752), rel=1e-5)


def test_one_value_has_no_ends_and_none_is_an_error():
    assert interval([0.5]) == (0.5, None, None)
    assert str(interval([0.5])) == "0.500 (one value, no interval)"
    assert str(interval([0.5, 0.5])) == "0.500 [0.500, 0.500]"
    with pytest.raises(ValueError, match="no values"):
        interval([])
    with pytest.raises(ValueError, match=r"have to be finite, got \[0.5, nan\]"):
        interval([0.5, float("nan")])


def test_paired_interval_is_of_the_differences():
    a, b = [0.9, 0.5, 0.7], [0.8, 0.4, 0.6]
    assert paired_interval(a, b) == pytest.approx((0.1, 0.1, 0.1))
    assert paired_interval(a, b)[0] == pytest.approx(-paired_interval(b, a)[0])
    with pytest.raises(ValueError, match="paired scores: got"):
        paired_interval(a, b[:2])


def test_t_interval_covers_as_often_as_it_says():
    rng = random.Random(0)
    hits = 0
    for _ in range(1000):
        _, low, high = interval([rng.gauss(3, 2) for _ in range(5)])
        hits += low <= 3 <= high
    assert 0.93 < hits / 1000 < 0.97


def test_bootstrap_covers_as_often_as_it_says():
    rng = random.Random(0)
    hits = 0
    for seed in range(200):
        right = [float(rng.random() < 0.7) for _ in range(100)]
        mean, low, high = bootstrap_interval(right, statistics.fmean, resamples=200, seed=seed)
        assert mean == statistics.fmean(right)
        hits += low <= 0.7 <= high
    assert 0.89 < hits / 200 < 0.99


def test_bootstrap_agrees_with_the_normal_interval_of_a_large_sample():
    right = [1.0, 0.0] * 200
    _, low, high = bootstrap_interval(right, statistics.fmean, resamples=4000)
    half = 1.96 * (0.25 / 400) ** 0.5
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.004)


def test_bootstrap_takes_any_statistic_and_is_decided_by_its_seed():
    pairs = [("a", "a")] * 30 + [("a", "b")] * 10

    def accuracy(some):
        return sum(p == r for p, r in some) / len(some)

    found = bootstrap_interval(pairs, accuracy, seed=1)
    assert found == bootstrap_interval(pairs, accuracy, seed=1)
    assert found.low < found.mean == 0.75 < found.high
    assert bootstrap_interval(pairs[:1], accuracy) == (1.0, None, None)
    with pytest.raises(ValueError, match="no examples"):
        bootstrap_interval([], accuracy)
