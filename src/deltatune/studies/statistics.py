"""Intervals at 95 %: Student's t over seeds, paired percentile bootstrap over examples.

The t interval covers what another seed would give on the same rows; the bootstrap covers what other rows would give
with the same trained deltas. Neither covers both, and neither corrects for having picked the best of many.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean with its interval; `low` and `high` are None where one value gives none."""

    mean: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval exists and lies on one side of zero."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def t_interval(values: Sequence[float]) -> Estimate:
    """Return the mean of one score per seed and its Student t interval.

    Raises ValueError when there is no value, or one that is not finite: a diverged seed has no score, and leaving it
    out is the caller's decision.
    """
    from scipy import stats

    n = len(values)
    if n == 0:
        raise ValueError("t_interval: got no values, expected one score per seed")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"t_interval: got {list(values)}, expected finite scores")
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, None)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * deviation / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half)


def paired_interval(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Return the mean of `a - b`, paired by seed, and its Student t interval.

    Raises ValueError when the lengths differ or `t_interval` would.
    """
    return t_interval(_differences(a, b))


def bootstrap_paired(
    correct_a: Sequence[float], correct_b: Sequence[float], resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """Return the mean of `correct_a - correct_b` over the same examples and its percentile bootstrap interval.

    The scores are per example: 0 or 1 for right and wrong, or any number. Raises ValueError when the lengths differ
    or there is no example. Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    import numpy as np
    from scipy import stats

    differences = np.asarray(_differences(correct_a, correct_b), dtype=float)
    n = len(differences)
    if n == 0:
        raise ValueError("bootstrap_paired: got no examples")
    mean = float(differences.mean())
    if n == 1:
        return Estimate(mean, None, None)
    found = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=resamples,
        # 10,000 resamples of 2,000 rows at once would take 160 MB.
        batch=max(1, 1_000_000 // n),
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return Estimate(mean, float(found.confidence_interval.low), float(found.confidence_interval.high))


def tied_with(
    best: Sequence[float], others: Mapping[str, Sequence[float]], resamples: int = 10_000, seed: int = 0
) -> list[str]:
    """Return the names in `others` whose scores cannot be told apart from those of `best`, in their order.

    All are scores per example on the same rows. One that is told apart and better is not in the list either.
    """
    return [
        name
        for name, scores in others.items()
        if not bootstrap_paired(best, scores, resamples=resamples, seed=seed).excludes_zero
    ]


def _differences(a: Sequence[float], b: Sequence[float]) -> list[float]:
    if len(a) != len(b):
        raise ValueError(f"paired scores: got {len(a)} and {len(b)} values, expected the same seeds or rows in both")
    return [float(x) - float(y) for x, y in zip(a, b, strict=True)]
