"""Extractive answers in files: where they stand; and how SQuAD compares them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.data.writing import FORMATS, write

from deltatune.data import check_metric, constant, load_task, majority, references, score
from deltatune.data.answers import hit
from deltatune.data.spans import normalised, squad_f1, squad_match
from deltatune.errors import TaskError, UnknownName

CONTEXT = "Ada met Bo in Rome; later Ada met Cy."


def rows(answers: Any, count: int = 40) -> list[dict[str, Any]]:
    return [{"context": CONTEXT, "question": f"who {i}?", "answers": answers} for i in range(count)]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_of_answers_is_a_task(suffix: str, tmp_path: Path) -> None:
    task = load_task(write(tmp_path, "rows", rows([{"text": "Ada", "start": 26}]), suffix))
    assert (task.kind, task.metric, task.labels) == ("extractive_span", "squad_f1", ())
    assert task.train[0]["answers"] == [{"text": "Ada", "start": 26}]
    assert references(task.kind, task.test[:1]) == [["Ada"]]
    gold = references(task.kind, task.test)
    assert score(task.metric, constant(majority(task), task, task.test), gold) == 1.0


@pytest.mark.parametrize(
    ("cell", "starts"),
    [
        ({"text": ["Ada"], "answer_start": [26]}, [26]),
        ('{"text": ["Ada"], "answer_start": [26]}', [26]),
        ([{"text": "Ada", "answer_start": 26}, {"text": "Bo", "start": 8}], [26, 8]),
        (["Ada", "Rome"], [0, 14]),
        ('["Rome"]', [14]),
        ("Rome", [14]),
    ],
)
def test_answers_are_read_in_every_common_form(cell: Any, starts: list[int], tmp_path: Path) -> None:
    task = load_task(write(tmp_path, "rows", rows(cell)))
    answers = task.train[0]["answers"]
    assert [answer["start"] for answer in answers] == starts
    assert all(CONTEXT.startswith(answer["text"], answer["start"]) for answer in answers)


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (["Eve"], "answer 'Eve' is not in the context"),
        ([{"text": "Ada", "start": 3}], "answer 'Ada' is said to start at character 3, where the context has ' me'"),
        ([{"text": "Ada", "start": -1}], "is said to start at character -1"),
        ({"text": ["Ada"], "answer_start": []}, "answers is a record; expected"),
        ({"text": [], "answer_start": []}, "has no answer: a question without one cannot be learnt here"),
        ([], "has no answers"),
        ([{"text": " ", "start": 3}], "expected a text"),
        ([7], "got answer 7; expected a text"),
    ],
)
def test_an_answer_that_is_not_there_is_refused_with_its_row(cell: Any, said: str, tmp_path: Path) -> None:
    file = write(tmp_path, "rows", [*rows(["Ada"]), *rows(cell, 1)])
    with pytest.raises(TaskError, match="rows.jsonl: line 41.*" + said):
        load_task(file)


def test_the_columns_that_lack_are_proposed(tmp_path: Path) -> None:
    content = [{"passage": CONTEXT + " x" * i, "query": f"who met {i}?", "answers": ["Ada"]} for i in range(40)]
    file = write(tmp_path, "rows", content)
    with pytest.raises(
        TaskError, match="expected context, question, answers; give --columns context=passage,question="
    ):
        load_task(file, kind="extractive_span")
    assert load_task(file, columns={"context": "passage", "question": "query"}).kind == "extractive_span"


def test_texts_are_compared_as_squad_does() -> None:
    assert normalised(" The  Panthers' an-swer, a win ") == "panthers answer win"
    assert squad_match("the Panthers.", "Panthers") == 1.0 and squad_match("Panther", "Panthers") == 0.0
    # Of "in rome" and "rome italy" one word of two is shared.
    assert squad_f1("in Rome", "Rome, Italy") == pytest.approx(2 * 1 / 4)
    assert squad_f1("b b c", "b c c") == pytest.approx(2 * 2 / 6)
    assert squad_f1("the", "an") == 1.0 and squad_f1("the", "x") == 0.0
    assert score("squad_f1", ["in Rome", "x"], [["Bo", "Rome, Italy"], ["y"]]) == pytest.approx(0.25)
    assert hit("extractive_span", "a Rome!", ["Bo", "rome"]) == 1.0


def test_metrics_agree_with_torchmetrics() -> None:
    squad = pytest.importorskip("torchmetrics.text").SQuAD()
    said = ["the cat sat", "on a Mat!", "nothing", "B. b", "x"]
    gold = [["cat sat down", "a dog"], ["on the mat"], ["something else"], ["b b b", "b"], ["y", "X."]]
    found = squad(
        [{"prediction_text": text, "id": str(i)} for i, text in enumerate(said)],
        [{"answers": {"answer_start": [0] * len(g), "text": g}, "id": str(i)} for i, g in enumerate(gold)],
    )
    assert 0 < float(found["exact_match"]) < 100
    assert 100 * score("squad_match", said, gold) == pytest.approx(float(found["exact_match"]))
    assert 100 * score("squad_f1", said, gold) == pytest.approx(float(found["f1"]))


def test_squads_metrics_are_for_spans_alone() -> None:
    assert check_metric("squad_match", "extractive_span", ()) == "squad_match"
    with pytest.raises(UnknownName, match="it is no metric of generation"):
        check_metric("squad_f1", "generation", ())
