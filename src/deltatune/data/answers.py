"""Answers of every kind: how right one is, and how it is written."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from deltatune.data.spans import squad_match
from deltatune.data.task import INPUTS, NUMBERS, Kind, Row


def hit(kind: Kind, prediction: Any, gold: Any) -> float:
    """Return how right a prediction is, by row: 1 or 0, or for numbers minus the distance.

    Right is the label, all tags or labels, or one of the accepted texts (white space apart; of spans whatever SQuAD's
    script leaves out).
    """
    if kind in NUMBERS:
        return -abs(float(prediction) - float(gold))
    if kind == "extractive_span":
        return max(squad_match(prediction, answer) for answer in gold)
    if kind == "generation":
        accepted = gold if isinstance(gold, list) else [gold]
        return float(prediction.split() in [answer.split() for answer in accepted])
    return float(prediction == gold)


def within(kind: Kind, golds: Sequence[float]) -> float | None:
    """Return the distance up to which a number counts as right: half a standard deviation; None for other kinds."""
    return 0.5 * statistics.pstdev(golds) if kind in NUMBERS else None


def inputs_written(kind: Kind, row: Row) -> list[str]:
    """Return the inputs of a row as texts, choices with their numbers."""
    texts = []
    for field in INPUTS[kind]:
        if field == "choices":
            texts += [f"({i}) {choice}" for i, choice in enumerate(row[field])]
        elif field in row:
            texts.append(" ".join(row[field]) if isinstance(row[field], list) else str(row[field]))
    return texts


def written(kind: Kind, answer: Any, row: Row) -> str:
    """Return a label, tags, labels, a number, the chosen or the accepted texts as one text."""
    if kind == "multiple_choice":
        return f"({answer}) {row['choices'][answer]}"
    if kind in NUMBERS:
        return f"{answer:.4g}"
    if kind == "multi_label":
        return ", ".join(answer) or "none"
    return " ".join(answer) if isinstance(answer, list) else str(answer)
