"""Answers that stand in a text: where they are, and how they are compared.

Source: the evaluation script of SQuAD 1.1, Rajpurkar et al. 2016, arXiv:1606.05250.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from typing import Any

from deltatune.errors import TaskError

ARTICLES = re.compile(r"\b(a|an|the)\b")


def answers_of(cell: Any, context: str, where: str) -> list[dict[str, Any]]:
    """Return the answers of a cell as [{"text", "start"}], `start` in characters of the context.

    A cell is a list of such records, SQuAD's {"text": [...], "answer_start": [...]}, texts or one text, each taken
    where it first occurs, or JSON of any of these. Raises TaskError, the row named, for an answer that is not in the
    context, or not where it is said to be.
    """
    if isinstance(cell, str) and cell.lstrip().startswith(("[", "{")):
        try:
            cell = json.loads(cell)
        except json.JSONDecodeError:
            cell = [cell]
    if isinstance(cell, dict):
        texts, starts = cell.get("text") or [], cell.get("answer_start") or []
        if not isinstance(texts, list) or len(texts) != len(starts):
            raise TaskError(f'{where}: answers is a record; expected {{"text": [...], "answer_start": [...]}}')
        cell = [{"text": text, "start": start} for text, start in zip(texts, starts, strict=True)]
    found = [_answer(one, context, where) for one in (cell if isinstance(cell, list) else [cell])]
    if not found:
        raise TaskError(f"{where} has no answer: a question without one cannot be learnt here; delete the row")
    return found


def _answer(one: Any, context: str, where: str) -> dict[str, Any]:
    text = one.get("text") if isinstance(one, dict) else one
    start = one.get("start", one.get("answer_start")) if isinstance(one, dict) else None
    if not isinstance(text, str) or not text.strip() or not isinstance(start, int | None):
        raise TaskError(f'{where}: got answer {one!r}; expected a text, or {{"text": ..., "start": ...}}')
    if start is None:
        start = context.find(text)
        if start < 0:
            raise TaskError(f"{where}: answer {text!r} is not in the context; an extractive answer is copied from it")
    elif not context.startswith(text, start) or start < 0:
        there = context[max(start, 0) : max(start, 0) + len(text)]
        raise TaskError(
            f"{where}: answer {text!r} is said to start at character {start}, where the context has {there!r}"
        )
    return {"text": text, "start": start}


def normalised(text: str) -> str:
    """Return a text without letter case, punctuation, articles and surplus white space."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(ARTICLES.sub(" ", bare).split())


def squad_match(prediction: str, answer: str) -> float:
    """Return 1 if two texts are the same when normalised, else 0."""
    return float(normalised(prediction) == normalised(answer))


def squad_f1(prediction: str, answer: str) -> float:
    """Return the F1 of the bags of words of two normalised texts; two without a word agree."""
    p, a = normalised(prediction).split(), normalised(answer).split()
    shared = sum((Counter(p) & Counter(a)).values())
    return 2 * shared / (len(p) + len(a)) if p or a else 1.0
