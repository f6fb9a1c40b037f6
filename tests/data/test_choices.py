"""Multiple choice in files: how choices are written, and which one is meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.data.writing import FORMATS, write

from deltatune.data import constant, load_task, majority, references, score
from deltatune.data.answers import hit, inputs_written, written
from deltatune.errors import TaskError


def rows(count: int = 40, **more: Any) -> list[dict[str, Any]]:
    return [
        {"text": f"what is {i}", "choices": [f"n{i}", f"m{i}", f"o{i}"], "label": i % 3, **more} for i in range(count)
    ]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_of_choices_is_a_task(suffix: str, tmp_path: Path) -> None:
    task = load_task(write(tmp_path, "rows", rows(), suffix))
    assert (task.kind, task.metric, task.labels) == ("multiple_choice", "accuracy", ())
    assert task.fingerprint == load_task(write(tmp_path / "again", "rows", rows())).fingerprint
    row = min(task.train, key=lambda row: row["text"])
    assert row["choices"][row["label"]][1:] == row["text"].split()[-1] and isinstance(row["label"], int)
    gold = references(task.kind, task.test)
    assert score("accuracy", constant(majority(task), task, task.test), gold) == gold.count(majority(task)) / len(gold)


@pytest.mark.parametrize(
    ("choices", "label", "meant"),
    [
        (["x", "y"], 1, 1),
        (["x", "y"], "1", 1),
        (["x", "y"], "b", 1),
        (["x", "y"], "B", 1),
        (["x", "y"], " y ", 1),
        ("x | y | z", "z", 2),
        ('["x", "y"]', "y", 1),
        ({"text": ["x", "y"], "label": ["1", "2"]}, "2", 1),
        ({"text": ["x", "y"], "label": ["B", "A"]}, "A", 1),
        (json.dumps({"text": ["x", "y"], "label": ["B", "A"]}), "A", 1),
        (["1", "0"], 1, 1),
        (["a", "b"], "a", 0),
    ],
)
def test_the_right_choice_is_a_number_a_letter_a_name_or_the_text(
    choices: Any, label: Any, meant: int, tmp_path: Path
) -> None:
    content = [{"text": f"t{i}", "choices": choices, "label": label} for i in range(20)]
    task = load_task(write(tmp_path, "rows", content))
    assert {row["label"] for row in task.train} == {meant}
    assert all(isinstance(choice, str) for choice in task.train[0]["choices"])


@pytest.mark.parametrize(
    ("choices", "label", "said"),
    [
        (["x", "y"], 2, r"label 2 is no choice; expected 0 to 1, a letter from A, or the text of one choice"),
        (["x", "y"], -1, "label -1 is no choice"),
        (["x", "y"], 0.5, "label 0.5 is no choice"),
        (["x", "y"], True, "label True is no choice"),
        (["x", "y"], "C", "label 'C' is no choice"),
        (["1", "2"], "1", "label '1' means choices 0 and 1"),
        (["x", "x"], "x", "label 'x' means choices 0 and 1"),
        ({"text": ["x", "y"], "label": ["1", "2"]}, "3", "label '3' is no choice; expected 1, 2"),
        (["x"], 0, r"got choices \['x'\]; expected two or more"),
        (["x", " "], 0, "none of them empty"),
        ([["x"], "y"], 0, "choices has to be a list of texts"),
        ({"label": ["1", "2"]}, "1", "choices has to be a list of texts"),
    ],
)
def test_what_cannot_be_told_is_refused_with_its_row(choices: Any, label: Any, said: str, tmp_path: Path) -> None:
    file = write(tmp_path, "rows", [*rows(), {"text": "t", "choices": choices, "label": label}])
    with pytest.raises(TaskError, match=r"rows.jsonl: line 41.*" + said):
        load_task(file)


def test_a_context_is_an_input_where_there_is_one(tmp_path: Path) -> None:
    content = rows(context="a story")
    content[3]["context"] = ""
    task = load_task(write(tmp_path, "rows", content))
    told = [row for row in (*task.train, *task.dev, *task.test) if "context" in row]
    assert len(told) == 39 and told[0]["context"] == "a story"
    # The same question and choices about two texts are two rows.
    twice = [{**row, "context": text} for row in rows() for text in ("one", "two")]
    assert len(load_task(write(tmp_path, "twice", twice)).train) == 64
    assert inputs_written("multiple_choice", told[0])[:2] == ["a story", told[0]["text"]]


def test_columns_are_proposed_to_who_names_choices(tmp_path: Path) -> None:
    content = [{"stem": f"a long question about {i}", "options": r["choices"], "gold": "ABC"[i % 3]}
               for i, r in enumerate(rows())]  # fmt: skip
    file = write(tmp_path, "rows", content)
    with pytest.raises(TaskError, match=r"--columns text=stem,choices=options,label=gold"):
        load_task(file, kind="multiple_choice")
    assert load_task(file, columns={"text": "stem", "choices": "options", "label": "gold"}).kind == "multiple_choice"
    assert load_task(write(tmp_path, "both", rows()), kind="classification").kind == "classification"


def test_an_answer_is_shown_with_its_text() -> None:
    row = rows(1)[0]
    assert written("multiple_choice", 2, row) == "(2) o0"
    assert inputs_written("multiple_choice", row) == ["what is 0", "(0) n0", "(1) m0", "(2) o0"]
    assert (hit("multiple_choice", 2, 2), hit("multiple_choice", 2, 1)) == (1.0, 0.0)
