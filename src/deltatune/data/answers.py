"""Answers of every kind: how right one is, and how it is written."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from deltatune.data.images import named
from deltatune.data.spans import squad_match
from deltatune.data.split import as_text
from deltatune.data.task import INPUTS, NUMBERS, Kind, Row


def hit(kind: Kind, prediction: Any, gold: Any) -> float:
    """Return how right a prediction is, by row: 1 or 0, or for numbers minus the distance.

    Right is the label, all tags or labels, one of the accepted texts (white space apart; of spans whatever SQuAD's
    script leaves out), the positive that is ranked first, or a reward that prefers the chosen answer. Of a conversation
    it is the mean log-probability of a token.
    """
    if kind == "chat":
        return float(prediction[0] / max(1, prediction[1]))
    if kind == "preference":
        return (prediction > 0) + 0.5 * (prediction == 0)
    if kind == "embedding":
        return float(prediction[:1] == [gold])
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
    """Return the inputs of a row as texts, choices with their numbers, an image by its file or its digest."""
    texts = []
    for field in INPUTS[kind]:
        if field == "choices":
            texts += [f"({i}) {choice}" for i, choice in enumerate(row[field])]
        elif field == "image":
            texts.append(named(row[field]))
        elif field in row:
            texts.append(as_text(row[field]))
    return texts


def written(kind: Kind, answer: Any, row: Row | None = None) -> str:
    """Return a label, tags, labels, a number, a choice, accepted texts, a preference or what is nearest as one text.

    A choice has its words where the row is given.
    """
    if kind == "multiple_choice":
        return f"({answer}) {row['choices'][answer]}" if row else f"({answer})"
    if kind == "preference" and not isinstance(answer, str):
        return "chosen" if answer > 0 else "rejected" if answer < 0 else "neither"
    if kind == "chat" and not isinstance(answer, str):
        return f"perplexity {math.exp(-answer[0] / answer[1]):.3g}" if answer[1] else "no token of it read"
    if kind == "embedding" and isinstance(answer, list):
        numbers = answer and not isinstance(answer[0], str)
        return f"{len(answer)} numbers: " + ", ".join(f"{x:.3f}" for x in answer[:4]) if numbers else answer[0]
    if kind in NUMBERS:
        return f"{answer:.4g}"
    if kind == "multi_label":
        return ", ".join(answer) or "none"
    return " ".join(answer) if isinstance(answer, list) else str(answer)
