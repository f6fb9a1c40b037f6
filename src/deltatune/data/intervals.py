"""Means with an interval: over seeds, over pairs, over examples."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

Example = TypeVar("Example")


class Interval(NamedTuple):
    """A mean and the ends of its interval, both None where one value cannot give any."""

    mean: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval exists and lies on one side of zero."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.3f} (one value, no interval)"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Return the mean of independent values (one a seed) with its t interval; with one value the ends are None.

    Raises ValueError where there is no value, or one that is not finite: to leave out a run that failed is for the
    caller to decide.
    """
    if not values:
        raise ValueError("no values to take an interval of")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"values have to be finite, got {list(values)}")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, None, None)
    from scipy.stats import t

    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def paired_interval(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval:
    """Return the mean of a - b with its t interval, `a[i]` and `b[i]` being of the same seed or task.

    Raises ValueError where the lengths differ or there is no pair.
    """
    return interval(_differences(a, b), level)


def bootstrap_interval(
    examples: Sequence[Example],
    statistic: Callable[[Sequence[Example]], float],
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Return `statistic` of the examples with its percentile bootstrap interval (Efron 1979) over examples.

    `examples` may be scores, with `statistics.fmean`, or pairs of prediction and reference for a metric of the whole
    set; the first value is the statistic of the examples as they are. One example gives no ends.
    Raises ValueError where there is no example.
    """
    if not examples:
        raise ValueError("no examples to take an interval of")
    whole = statistic(examples)
    if len(examples) == 1:
        return Interval(whole, None, None)
    rng = random.Random(seed)
    found = sorted(statistic(rng.choices(examples, k=len(examples))) for _ in range(resamples))
    tail = (1 - level) / 2
    return Interval(whole, found[math.floor(tail * (resamples - 1))], found[math.ceil((1 - tail) * (resamples - 1))])


def bootstrap_paired(
    correct_a: Sequence[float], correct_b: Sequence[float], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
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
        return Interval(mean, None, None)
    found = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=resamples,
        # 10,000 resamples of 2,000 rows at once would take 160 MB.
        batch=max(1, 1_000_000 // n),
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return Interval(mean, float(found.confidence_interval.low), float(found.confidence_interval.high))


def _differences(a: Sequence[float], b: Sequence[float]) -> list[float]:
    if len(a) != len(b):
        raise ValueError(f"paired scores: got {len(a)} and {len(b)} values, expected the same seeds or rows in both")
    return [float(x) - float(y) for x, y in zip(a, b, strict=True)]
