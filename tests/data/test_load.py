"""Sources, and rows or labels that do not make a task."""

from __future__ import annotations

import re

import pytest
from tests.data.writing import reviews, write

from deltatune.data import load_task, task
from deltatune.errors import TaskError, UnknownName


def folder(tmp_path, **splits):
    for name, rows in splits.items():
        write(tmp_path, name, rows)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "review.csv",
            r"no task '.*/review.csv': no file or folder of that name, nor an embedded task; nearest: .*/reviews.csv",
        ),
        ("reviews.jsonl", "nearest: .*/reviews.csv"),
        ("nowhere/reviews.csv", r"no file or folder of that name \(there is no folder .*nowhere\)"),
    ],
)
def test_an_absent_path_names_what_is_near(name, message, tmp_path):
    write(tmp_path, "reviews", reviews(), ".csv")
    with pytest.raises(TaskError, match=message):
        load_task(tmp_path / name)


def test_an_absent_name_names_the_nearest_embedded_tasks():
    with pytest.raises(TaskError, match="nearest: stdlib_package"):
        load_task("stdlib_pakage")


def test_a_folder_without_train(tmp_path):
    write(tmp_path, "test", reviews())
    with pytest.raises(TaskError, match=r"no train.jsonl \(or .json, .csv, .tsv, .parquet, each .gz\); got test.jsonl"):
        load_task(tmp_path)


def test_a_folder_with_two_files_of_a_split(tmp_path):
    folder(tmp_path, train=reviews(), dev=reviews())
    write(tmp_path, "validation", reviews(), ".csv")
    with pytest.raises(TaskError, match=r"dev.jsonl and validation.csv are both dev; keep one of them"):
        load_task(tmp_path)


def test_a_split_with_other_columns(tmp_path):
    folder(tmp_path, train=reviews(), test=[{"review": r["text"], "label": r["label"]} for r in reviews()])
    with pytest.raises(TaskError, match=r"test.jsonl has columns review, label; expected column 'text', as train has"):
        load_task(tmp_path)


def test_a_split_of_fewer_than_three_rows(tmp_path):
    with pytest.raises(TaskError, match="test has 2 rows; expected 3 or more"):
        load_task(folder(tmp_path, train=reviews(), dev=reviews(9), test=reviews(2)))


def test_a_label_that_train_lacks_is_named_with_its_row(tmp_path):
    rows = [*reviews(4), {"text": "x", "label": "godo"}, {"text": "y", "label": "godo"}]
    folder(tmp_path, train=reviews(), dev=reviews(9), test=rows)
    with pytest.raises(
        TaskError, match=r"test.jsonl: line 5 and 1 more rows: label 'godo' is not in train; nearest: good; correct it"
    ):
        load_task(tmp_path)
    dropped = load_task(tmp_path, unseen="drop")
    assert len(dropped.test) == 4 and dropped.labels == ("bad", "good")
    assert "2 rows of dev and test with a label that train lacks left out" in dropped.source


def test_one_class_only(tmp_path):
    with pytest.raises(TaskError, match="every label is 'good'; expected two classes or more"):
        load_task(write(tmp_path, "rows", reviews(60, ("good",))))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [str(i) for i in range(40)],
            r"look like a regression: 40 different numbers in 40 rows \(0, 1, 10, 11, \.\.\.\)",
        ),
        ([f"{i % 15 / 4}" for i in range(40)], "look like a regression: 11 different fractions"),
        ([f"reason {i}" for i in range(40)], "40 different labels in 40 rows .* are not classes"),
    ],
)
def test_labels_that_are_no_classes(labels, message, tmp_path):
    rows = [{"text": f"t {i}", "label": label} for i, label in enumerate(labels)]
    with pytest.raises(TaskError, match=message):
        load_task(write(tmp_path, "rows", rows))


def test_half_stars_are_classes(tmp_path):
    rows = [{"text": f"t {i}", "label": i % 10 / 2} for i in range(60)]
    assert len(load_task(write(tmp_path, "rows", rows)).labels) == 10


def test_texts_keep_their_white_space_and_labels_do_not(tmp_path):
    rows = [{"text": f" {row['text']}\n", "label": f" {row['label']} "} for row in reviews()]
    found = load_task(write(tmp_path, "rows", rows, ".csv"))
    assert found.labels == ("bad", "good")
    assert {row["text"] for row in found.train} < {row["text"] for row in rows}


def test_what_the_system_refuses_is_one_line():
    with pytest.raises(TaskError, match=r"'aaaa.*a' cannot be read: File name too long"):
        load_task("a" * 5000)
    with pytest.raises(TaskError, match=r"'~nobody-here/x.csv' cannot be read: Could not determine home directory"):
        load_task("~nobody-here/x.csv")


def test_templates_and_verbalizers_are_kept(tmp_path):
    words = {"bad": "terrible", "good": "great"}
    found = load_task(write(tmp_path, "rows", reviews()), template="Review: {text}\nIt was", verbalizer=words)
    assert found.template == "Review: {text}\nIt was" and found.verbalizer == words


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "Review:"}, "has no input; expected {text} in it"),
        ({"template": "{txt}"}, "{txt} is no input; nearest: text"),
        ({"template": "{text} {label}"}, "{label} is the answer, not an input"),
        ({"template": "{text"}, "write a brace that is meant as one twice"),
        ({"verbalizer": {"bad": "x"}}, "verbalizer has no words for label 'good'"),
        ({"verbalizer": {"bad": "x", "goood": "y"}}, "verbalizer names 'goood', which is no label; nearest: good"),
        ({"verbalizer": {"bad": "x", "good": " x"}}, "verbalizer has 'x' for 2 labels"),
    ],
)
def test_wordings_that_cannot_work(options, message, tmp_path):
    with pytest.raises(TaskError, match=re.escape(message)):
        load_task(write(tmp_path, "rows", reviews()), **options)


def test_metrics_by_kind(tmp_path):
    path = write(tmp_path, "rows", reviews())
    assert load_task(path).metric == "accuracy"
    assert load_task(path, metric="mcc").metric == "matthews"
    assert load_task(path, metric="f1_good").metric == "f1_good"
    with pytest.raises(UnknownName, match=r"unknown metric 'f1'; .*say of which label: f1_bad, f1_good"):
        load_task(path, metric="f1")
    with pytest.raises(UnknownName, match=r"unknown metric 'entity_f1'.* it is no metric of classification"):
        load_task(path, metric="entity_f1")


def test_a_task_passes_through(tmp_path):
    found = load_task(write(tmp_path, "rows", reviews()))
    again = load_task(found, metric="macro_f1")
    assert again.metric == "macro_f1" and again.fingerprint == found.fingerprint
    with pytest.raises(
        TaskError, match=r"task 'rows' has its fields and kind \(classification\); leave columns and kind out"
    ):
        task(found, text="review")


def test_tokens_and_tags_of_different_length(tmp_path):
    rows = [{"tokens": ["a", "b"], "tags": ["O", "B-X"]}] * 2 + [{"tokens": ["a", "b"], "tags": ["O"]}] * 10
    with pytest.raises(TaskError, match=r"rows.jsonl: line 3 has 2 tokens and 1 tags; expected one tag for each token"):
        load_task(write(tmp_path, "rows", rows))


@pytest.mark.parametrize("tokens", [["a", ""], ["a", None], "", [["a"], "b"]])
def test_tokens_that_are_no_list_of_texts(tokens, tmp_path):
    rows = [{"tokens": tokens, "tags": ["O", "O"]}]
    with pytest.raises(
        TaskError, match=r"line 1( has no tokens|: tokens has to be a list of texts, none of them empty)"
    ):
        load_task(write(tmp_path, "rows", rows))


def test_tags_without_spans_are_classes_of_tokens(tmp_path):
    rows = [{"tokens": f"dog {i} barks", "tags": "NOUN NUM VERB"} for i in range(40)]
    found = load_task(write(tmp_path, "rows", rows, ".csv"))
    assert found.metric == "token_accuracy" and found.labels == ("NOUN", "NUM", "VERB")


def test_a_tag_that_train_lacks_is_kept(tmp_path):
    rows = [{"tokens": ["a", f"b{i}"], "tags": ["O", "B-X"]} for i in range(20)]
    other = [{"tokens": ["c", f"d{i}"], "tags": ["B-X", "I-X"]} for i in range(5)]
    assert load_task(folder(tmp_path, train=rows, dev=other, test=other)).labels == ("B-X", "I-X", "O")
