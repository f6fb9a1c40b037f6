"""Intervals against scipy's own tests and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from deltatune.data.intervals import Interval, bootstrap_paired, interval, paired_interval

scores = st.lists(st.floats(-10, 10, allow_nan=False), min_size=2, max_size=12)


@given(scores)
def test_t_interval_equals_scipy(values: list[float]) -> None:
    ours = interval(values)
    assert ours.mean == pytest.approx(np.mean(values), abs=1e-12)
    if np.std(values) > 1e-6:  # scipy divides by it
        theirs = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-9, abs=1e-12)


def test_t_interval_closed_form_of_two_values() -> None:
    # With one degree of freedom t is Cauchy: the quantile is tan(pi * 0.475), the standard error |a - b| / 2.
    estimate = interval([0.90, 0.94])
    half = math.tan(math.pi * 0.475) * 0.02
    assert estimate == pytest.approx((0.92, 0.92 - half, 0.92 + half))


def test_one_seed_has_no_interval_and_none_is_an_error() -> None:
    assert interval([0.9]) == Interval(0.9, None, None)
    with pytest.raises(ValueError, match="no values"):
        interval([])
    with pytest.raises(ValueError, match="finite"):
        interval([0.9, math.nan])


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert interval([0.5, 0.5, 0.5]) == Interval(0.5, 0.5, 0.5)


def test_paired_interval_equals_scipy_and_is_narrower_than_unpaired() -> None:
    generator = np.random.default_rng(3)
    shared = generator.normal(0.9, 0.05, 5)
    a, b = list(shared + 0.02 + generator.normal(0, 0.002, 5)), list(shared)
    ours, theirs = paired_interval(a, b), stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    assert ours.excludes_zero
    assert ours.high - ours.low < interval(a).high - interval(a).low  # type: ignore[operator]


def test_pairs_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 and 3"):
        paired_interval([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="no examples"):
        bootstrap_paired([], [])


def test_bootstrap_agrees_with_the_normal_limit() -> None:
    # 400 paired differences: the percentile interval must come near mean ± 1.96 standard errors.
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 2, 400), generator.integers(0, 2, 400)
    estimate = bootstrap_paired(list(a), list(b))
    difference = a - b
    error = difference.std() / math.sqrt(400)
    assert estimate.mean == pytest.approx(difference.mean())
    assert estimate.low == pytest.approx(difference.mean() - 1.96 * error, abs=0.1 * error)
    assert estimate.high == pytest.approx(difference.mean() + 1.96 * error, abs=0.1 * error)


def test_bootstrap_of_three_rows_equals_the_exact_distribution() -> None:
    # Differences 0, 0, 1: the resampled mean is Binomial(3, 1/3) / 3, whose 2.5 % and 97.5 % points are 0 and 1.
    assert stats.binom.cdf(0, 3, 1 / 3) > 0.025 and stats.binom.sf(2, 3, 1 / 3) > 0.025
    assert bootstrap_paired([0, 0, 1], [0, 0, 0]) == pytest.approx((1 / 3, 0.0, 1.0))


def test_bootstrap_is_deterministic_for_a_seed_antisymmetric_in_mean_and_needs_two_rows() -> None:
    a, b = [1, 0, 1, 1, 0, 1, 1], [0, 0, 1, 0, 1, 1, 0]
    assert bootstrap_paired(a, b, seed=4) == bootstrap_paired(a, b, seed=4)
    assert bootstrap_paired(a, b).mean == -bootstrap_paired(b, a).mean
    assert bootstrap_paired([1], [0]) == Interval(1.0, None, None)


def test_bootstrap_covers_the_truth_about_nineteen_times_in_twenty() -> None:
    generator = np.random.default_rng(11)
    covered = 0
    for trial in range(200):
        a, b = generator.random(150) < 0.80, generator.random(150) < 0.75
        low, high = bootstrap_paired(list(a), list(b), resamples=500, seed=trial)[1:]
        covered += low is not None and high is not None and low <= 0.05 <= high
    assert 0.90 <= covered / 200 <= 0.99
