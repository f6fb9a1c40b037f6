"""Columns that do not match are answered with the option to give, and that option works."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from tests.data.writing import reviews, write

from deltatune.data import load_task, task
from deltatune.errors import TaskError, UnknownName


def renamed(count: int = 60, **columns):
    """Rows with made-up columns: `{i}` counts, `{p}` takes turns among two, `{s}` among five."""
    return [{name: value.format(i=i, p="PQ"[i % 2], s=i % 5) for name, value in columns.items()} for i in range(count)]


LONG = "a rather long text about thing {i} and more of it"


@pytest.mark.parametrize(
    ("columns", "kind", "option"),
    [
        ({"id": "{i}", "review": LONG, "stars": "{s}"}, "classification", "--columns text=review,label=stars"),
        ({"text": LONG, "stars": "{s}"}, "classification", "--columns label=stars"),
        ({"x1": "{i}", "x2": LONG, "x3": "{p}"}, "classification", "--columns text=x2,label=x3"),
        ({"Text": LONG, "Label": "{p}"}, "classification", "--columns text=Text,label=Label"),
        ({"the review": LONG, "label": "{p}"}, "classification", "--columns 'text=the review'"),
        (
            {"sentence1": LONG, "sentence2": LONG + " or not", "gold": "{p}"},
            "pair_classification",
            "--columns text=sentence1,text_b=sentence2,label=gold",
        ),
        (
            {"premise": LONG, "hypothesis": LONG + " or not", "label": "{p}"},
            "pair_classification",
            "--columns text=premise,text_b=hypothesis",
        ),
        ({"question": LONG, "answer": LONG + "?"}, "generation", "--columns source=question,target=answer"),
        ({"article": LONG, "summary": "thing {i} again"}, "generation", "--columns source=article,target=summary"),
    ],
)
def test_the_option_that_is_proposed_works(columns, kind, option, tmp_path):
    path = write(tmp_path, "rows", renamed(**columns), ".csv")
    with pytest.raises(TaskError, match=rf"has columns {', '.join(columns)}; expected text, label \(or ") as caught:
        load_task(path)
    assert str(caught.value).endswith(f"; give {option}")
    given = dict(pair.split("=") for pair in shlex.split(option)[1].split(","))
    assert load_task(path, columns=given).kind == kind


def test_lists_are_proposed_as_tokens_and_tags(tmp_path):
    rows = [{"words": ["a", f"b{i}"], "ner_tags": ["O", "B-X"]} for i in range(40)]
    path = write(tmp_path, "rows", rows)
    with pytest.raises(TaskError, match=r"give --columns tokens=words,tags=ner_tags$"):
        load_task(path)
    assert task(path, tokens="words", tags="ner_tags").kind == "token_classification"


def test_a_file_of_three_rows_is_enough_for_a_proposal(tmp_path):
    path = write(tmp_path, "rows", renamed(3, id="{i}", review=LONG, stars="{i}"), ".csv")
    with pytest.raises(TaskError, match=r"give --columns text=review,label=stars$"):
        load_task(path)


def test_nothing_is_proposed_where_nothing_fits(tmp_path):
    path = write(tmp_path, "rows", renamed(id="{i}", code="{i}"), ".csv")
    with pytest.raises(TaskError, match=r"columns id, code; expected .*; name them with --columns FIELD=COLUMN,"):
        load_task(path)


def test_a_wanted_kind_is_what_is_expected_and_proposed(tmp_path):
    path = write(tmp_path, "rows", renamed(question=LONG, verdict="{p} x"), ".csv")
    with pytest.raises(TaskError, match=r"expected source, target; give --columns source=question,target=verdict$"):
        load_task(path, kind="generation")


def test_a_column_that_is_not_there(tmp_path):
    path = write(tmp_path, "rows", renamed(review=LONG, stars="{s}"), ".csv")
    with pytest.raises(TaskError, match=r"--columns label=star: .*rows.csv has no column 'star'; nearest: stars$"):
        load_task(path, columns={"text": "review", "label": "star"})


def test_a_field_that_is_not_known(tmp_path):
    path = write(tmp_path, "rows", renamed(review=LONG, stars="{s}"), ".csv")
    with pytest.raises(TaskError, match=r"--columns txt=review: no field 'txt'; nearest: text"):
        task(path, txt="review", label="stars")


def test_a_kind_that_is_not_known(tmp_path):
    with pytest.raises(UnknownName, match="unknown kind 'clasification'; nearest: classification"):
        load_task(write(tmp_path, "rows", reviews()), kind="clasification")


def test_keywords_name_columns(tmp_path):
    path = write(tmp_path, "rows", renamed(review=LONG, stars="{s}", text="{i}"), ".csv")
    found = task(path, text="review", label="stars", seed=3)
    assert found.labels == ("0", "1", "2", "3", "4")
    assert all(row.keys() == {"text", "label"} and row["text"].startswith("a rather") for row in found.train)
    assert found.fingerprint == load_task(path, columns={"text": "review", "label": "stars"}, seed=3).fingerprint


def test_fields_that_were_named_say_the_kind(tmp_path):
    both = [{"text": f"t {i}", "label": "ab"[i % 2], "source": f"s {i}", "target": f"u {i}"} for i in range(40)]
    path = write(tmp_path, "both", both)
    with pytest.raises(TaskError, match="fits classification and generation; say which one with kind='classification'"):
        load_task(path)
    assert load_task(path, kind="generation").kind == "generation"
    assert task(path, text="source", label="label").kind == "classification"


def test_a_second_text_makes_a_pair_unless_told_otherwise(tmp_path):
    rows = [{**row, "text_b": f"b{i}"} for i, row in enumerate(reviews())]
    path = write(tmp_path, "pairs", rows)
    assert load_task(path).kind == "pair_classification"
    assert load_task(path, kind="classification").kind == "classification"


def test_tables_and_references_are_taken_as_source_and_targets(tmp_path):
    rows = [
        {"table": [["name", f"n{i}"], ["food", "fish"]], "target": f"t{i}", "refs": [f"t{i}", "u"]} for i in range(30)
    ]
    found = load_task(write(tmp_path, "rows", rows))
    row = min(found.train, key=lambda row: row["source"])
    assert re.fullmatch(r"name: n\d+ \| food: fish", row["source"])
    assert row["targets"] == [row["target"], "u"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "line 3 has no label (column 'label' is empty or absent); fill it or delete the row"),
        ({"text": " \n", "label": "a"}, "line 3 has no text (column 'text' is empty"),
        ({"text": None, "label": "a"}, "line 3 has no text"),
        ({"text": float("nan"), "label": "a"}, "line 3 has no text"),
        ({"text": ["a"], "label": "a"}, "line 3: text is a list; expected a text"),
        ({"text": {"a": 1}, "label": "a"}, "line 3: text is a record; expected a text"),
        ({"text": "half \ud800", "label": "a"}, "line 3: text has half a character at place 6"),
    ],
)
def test_a_bad_cell_is_named_with_its_row(row, message, tmp_path):
    path = write(tmp_path, "rows", reviews(2))
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(TaskError, match=re.escape(f"rows.jsonl: {message}")):
        load_task(path)
