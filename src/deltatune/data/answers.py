"""Answers of every kind: how right one is, and how it is written."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from deltatune.data.task import NUMBERS, Kind


def hit(kind: Kind, prediction: Any, gold: Any) -> float:
    """Return how right a prediction is, by row: 1 or 0, or for numbers minus the distance.

    Right is the label, all tags or labels, or one of the accepted texts (white space apart).
    """
    if kind in NUMBERS:
        return -abs(float(prediction) - float(gold))
    if kind == "generation":
        accepted = gold if isinstance(gold, list) else [gold]
        return float(prediction.split() in [answer.split() for answer in accepted])
    return float(prediction == gold)


def within(kind: Kind, golds: Sequence[float]) -> float | None:
    """Return the distance up to which a number counts as right: half a standard deviation; None for other kinds."""
    return 0.5 * statistics.pstdev(golds) if kind in NUMBERS else None


def written(kind: Kind, answer: Any) -> str:
    """Return a label, tags, labels, a number or the accepted texts as one text."""
    if kind in NUMBERS:
        return f"{answer:.4g}"
    if kind == "multi_label":
        return ", ".join(answer) or "none"
    return " ".join(answer) if isinstance(answer, list) else str(answer)
