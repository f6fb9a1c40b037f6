"""Scores of saved deltas over examples, with intervals, for `eval` and `compare`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

from deltatune.data.intervals import Interval, bootstrap_interval
from deltatune.data.metrics import score
from deltatune.errors import UnknownName

SPLITS = ("train", "dev", "test")
SLOW = ("entity_f1", "bleu", "chrf", "macro_f1", "macro_recall", "matthews")  # metrics of a whole set that take a while


def split_of(name: str) -> Literal["train", "dev", "test"]:
    """Check the name of a split. UnknownName otherwise."""
    if name not in SPLITS:
        raise UnknownName("split", name, SPLITS)
    return cast(Literal["train", "dev", "test"], name)


def resamples(metric: str) -> int:
    """Number of resamples of the bootstrap: fewer where the metric has to be computed from the whole set each time."""
    return 200 if metric in SLOW else 1000


def scored(metric: str, predictions: Sequence[Any], gold: Sequence[Any], labels: Sequence[str]) -> Interval:
    """Return the score of predictions with its 95 % percentile bootstrap interval over examples."""

    def statistic(pairs: Sequence[tuple[Any, Any]]) -> float:
        return score(metric, [p for p, _ in pairs], [g for _, g in pairs], labels)

    return bootstrap_interval(list(zip(predictions, gold, strict=True)), statistic, resamples=resamples(metric))


def difference(
    metric: str, first: Sequence[Any], second: Sequence[Any], gold: Sequence[Any], labels: Sequence[str]
) -> Interval:
    """Return the score of `first` minus that of `second` with its paired bootstrap interval over examples."""

    def statistic(rows: Sequence[tuple[Any, Any, Any]]) -> float:
        references = [g for _, _, g in rows]
        return score(metric, [a for a, _, _ in rows], references, labels) - score(
            metric, [b for _, b, _ in rows], references, labels
        )

    return bootstrap_interval(list(zip(first, second, gold, strict=True)), statistic, resamples=resamples(metric))


def right(prediction: Any, gold: Any) -> bool:
    """Whether a prediction is the gold one: the label, all tags, or one of the accepted texts (white space apart)."""
    if isinstance(prediction, str) and isinstance(gold, list):
        return prediction.split() in [answer.split() for answer in gold]
    return bool(prediction == gold)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the p-value of the exact McNemar test: how likely so uneven a disagreement is between equals."""
    from scipy.stats import binomtest

    both = only_first + only_second
    return float(binomtest(only_first, both, 0.5).pvalue) if both else 1.0


def said(value: Interval) -> dict[str, float | None]:
    """Return an interval as plain data."""
    return {"value": value.mean, "low": value.low, "high": value.high}


def shown(value: dict[str, float | None]) -> str:
    """Return `0.812 [0.790, 0.834]` of what `said` returned."""
    if value["low"] is None or value["high"] is None:
        return f"{value['value']:.3f}"
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
