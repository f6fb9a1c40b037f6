"""Scores of predictions with their interval over examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltatune.data.intervals import Interval, bootstrap_interval
from deltatune.data.metrics import score

SLOW = (
    "entity_f1",
    "bleu",
    "chrf",
    "macro_f1",
    "macro_recall",
    "matthews",
    "squad_f1",
    "squad_match",
)  # metrics of a whole set that take a while


def resamples(metric: str) -> int:
    """Number of resamples of the bootstrap: fewer where the metric has to be computed from the whole set each time."""
    return 200 if metric in SLOW else 1000


def score_interval(metric: str, predictions: Sequence[Any], gold: Sequence[Any], labels: Sequence[str]) -> Interval:
    """Return the score of predictions with its 95 % percentile bootstrap interval over examples."""

    def statistic(pairs: Sequence[tuple[Any, Any]]) -> float:
        return score(metric, [p for p, _ in pairs], [g for _, g in pairs], labels)

    return bootstrap_interval(list(zip(predictions, gold, strict=True)), statistic, resamples=resamples(metric))


def difference_interval(
    metric: str, first: Sequence[Any], second: Sequence[Any], gold: Sequence[Any], labels: Sequence[str]
) -> Interval:
    """Return the score of `first` minus that of `second` with its paired bootstrap interval over examples."""

    def statistic(rows: Sequence[tuple[Any, Any, Any]]) -> float:
        references = [g for _, _, g in rows]
        return score(metric, [a for a, _, _ in rows], references, labels) - score(
            metric, [b for _, b, _ in rows], references, labels
        )

    return bootstrap_interval(list(zip(first, second, gold, strict=True)), statistic, resamples=resamples(metric))
