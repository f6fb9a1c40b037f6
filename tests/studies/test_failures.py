"""Where a delta fails, against scikit-learn and by hand."""

from __future__ import annotations

import re
from typing import Any

import pytest
from sklearn.metrics import confusion_matrix
from tests.studies.sample_result import make_result

from deltatune.studies import failures
from deltatune.studies.schema import Result, check_result

A, B = "lora(r=8, at=attn.{q,v})", "adapter(d=64)"


def checked(**settings: Any) -> Result:
    return check_result(make_result(**settings))


@pytest.mark.parametrize("labels", [2, 8])
def test_confusion_equals_scikit_learn(labels: int) -> None:
    result = checked(labels=labels, rows=300)
    found = failures.confusion(result, A)
    assert found
    gold, predicted = zip(*((row["gold"], row["predictions"][A]) for row in result["examples"]), strict=True)
    assert found.counts == confusion_matrix(gold, predicted, labels=found.labels).tolist()
    assert found.labels == result["task"]["labels"] and found.hidden == 0
    assert found.errors == found.shown_errors == len(failures.errors(result, A)) > 0


def test_confusion_counts_tags_by_word() -> None:
    result = checked(kind="token_classification", rows=1)
    result["examples"] = [{"row": 0, "input": "Ada left", "gold": "B-PER O", "predictions": {A: "B-PER B-LOC"}}]
    found = failures.confusion(result, A)
    assert found and found.worst == [("O", "B-LOC", 1)]
    assert sum(map(sum, found.counts)) == 2


def test_of_many_labels_those_confused_with_each_other_are_kept() -> None:
    result = checked(labels=40, rows=0)
    names = result["task"]["labels"]
    result["examples"] = [
        {"row": 0, "input": "", "gold": gold, "predictions": {A: predicted}}
        for gold, predicted, n in [(names[30], names[31], 5), (names[31], names[32], 3), (names[2], names[9], 2)]
        for _ in range(n)
    ]
    found = failures.confusion(result, A)
    assert found and len(found.labels) == 12 and found.hidden == 28
    assert {names[30], names[31], names[32], names[2], names[9]} <= set(found.labels)
    assert found.labels == [name for name in names if name in found.labels]
    assert found.shown_errors == found.errors == 10
    assert found.worst == [(names[30], names[31], 5), (names[31], names[32], 3), (names[2], names[9], 2)]


def test_of_many_confused_pairs_the_frequent_ones_are_kept() -> None:
    result = checked(labels=40, rows=0)
    names = result["task"]["labels"]
    result["examples"] = [
        {"row": 0, "input": "", "gold": names[2 * pair], "predictions": {A: names[2 * pair + 1]}}
        for pair in range(20)
        for _ in range(pair + 1)
    ]
    found = failures.confusion(result, A)
    assert found and found.labels == names[28:] and found.shown_errors == 15 + 16 + 17 + 18 + 19 + 20


def test_a_label_outside_the_task_is_shown_too() -> None:
    result = checked(rows=1)
    result["examples"] = [{"row": 0, "input": "", "gold": "positive", "predictions": {A: "neutral"}}]
    found = failures.confusion(result, A)
    assert found and found.labels == ["negative", "positive", "neutral"]


def test_errors_come_surest_first() -> None:
    result = checked(rows=0)
    result["examples"] = [
        {"row": row, "input": "", "gold": "positive", "predictions": {A: label}, "confidence": {A: confidence}}
        for row, label, confidence in [(0, "negative", 0.6), (1, "positive", 0.99), (2, "negative", 0.9)]
    ]
    assert [row["row"] for row in failures.errors(result, A)] == [2, 0]


def test_disagreement_counts_each_row_once() -> None:
    result = checked(rows=0)
    answers = [("p", "p"), ("p", "p"), ("p", "n"), ("n", "p"), ("n", "p"), ("n", "n"), ("n", "o")]
    result["examples"] = [
        {"row": row, "input": "", "gold": "p", "predictions": {A: a, B: b}} for row, (a, b) in enumerate(answers)
    ]
    found = failures.disagreement(result, A, B)
    assert found
    assert (found.both, found.only_first, found.only_second, found.neither) == (2, 1, 2, 2)
    assert found.difference.mean == pytest.approx(-1 / 7)
    # First those that the second would have got right, then both wrong, then those that the first got right.
    assert [row["row"] for row in found.rows] == [3, 4, 6, 2]


def test_the_first_two_are_the_chosen_and_the_one_with_predictions() -> None:
    result = checked(rows=5)
    assert failures.first_two(result) == [A, B]
    result["chosen"] = B
    assert failures.first_two(result) == [B, A]
    result["chosen"], result["examples"] = None, []
    best = sorted((row for row in result["summary"] if not row["baseline"]), key=lambda row: -(row["dev"]["mean"] or 0))
    assert failures.first_two(result) == [row["delta"] for row in best[:2]]


def test_words_carry_the_tags_of_both() -> None:
    row: Any = {"row": 0, "input": "Ada left", "gold": "B-PER O", "predictions": {A: "B-PER B-LOC", B: "O O"}}
    found = failures.words(row, [A, B])
    assert found and [(word.text, word.gold, word.predicted, word.right) for word in found] == [
        ("Ada", "B-PER", ("B-PER", "O"), False),
        ("left", "O", ("B-LOC", "O"), False),
    ]
    row["predictions"][B] = "O"
    assert failures.words(row, [A, B]) is None


def test_spaces_do_not_make_an_error() -> None:
    row: Any = {"row": 0, "input": "", "gold": "get  path\n", "predictions": {A: " get path", B: "getpath"}}
    right = failures.judge(of_kind("generation"))
    assert right(row, A) and not right(row, B)
    assert re.sub(r"\s", "", row["gold"]) == row["predictions"][B]


def of_kind(kind: str, *gold: str) -> Any:
    """A result with no more than a kind and gold answers."""
    return {"task": {"kind": kind}, "examples": [{"gold": text} for text in gold]}


def test_right_is_what_the_kind_calls_so() -> None:
    row: Any = {"row": 0, "input": "", "gold": "the Panthers", "predictions": {A: "Panthers!", B: "Panther"}}
    assert not failures.judge(of_kind("generation"))(row, A)
    span = failures.judge(of_kind("extractive_span"))
    assert span(row, A) and not span(row, B)
    # Half a standard deviation of 1 and 3 is a half.
    number = failures.judge(of_kind("regression", "1", "3"))
    row = {"row": 0, "input": "", "gold": "3", "predictions": {A: "2.5", B: "2.4"}}
    assert number(row, A) and not number(row, B)
