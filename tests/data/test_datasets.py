"""Objects of `datasets`, and streams: of which no more is read than was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import pytest
from tests.data.writing import reviews, write

from deltatune.data import load_task, task
from deltatune.data.task import Task
from deltatune.errors import TaskError

FEATURES = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})


def endless(read: list[int]) -> datasets.IterableDataset:
    def rows() -> Iterator[dict[str, Any]]:
        number = 0
        while True:
            assert number < 1000, "a stream was read on and on"
            read.append(number)
            yield {"text": f"row {number}", "label": number % 2}
            number += 1

    return datasets.IterableDataset.from_generator(rows, features=FEATURES)


def test_a_dataset_is_the_task_of_its_rows(tmp_path):
    rows = reviews(60)
    file = load_task(write(tmp_path, "reviews", rows))
    made = load_task(datasets.Dataset.from_list(rows))
    assert made.fingerprint == file.fingerprint and made.name == "dataset"
    assert made.source.startswith("Dataset of datasets; cut into train, dev and test")
    renamed = datasets.Dataset.from_list([{"body": row["text"], "stars": row["label"]} for row in rows])
    assert task(renamed, text="body", label="stars").fingerprint == file.fingerprint


def test_splits_of_a_dictionary_are_kept_and_class_numbers_are_named():
    rows = [{"text": f"t {i}", "label": i % 2} for i in range(60)]
    parts = {"train": rows[:40], "validation": rows[40:50], "test": rows[50:]}
    made = load_task(
        datasets.DatasetDict({name: datasets.Dataset.from_list(p, features=FEATURES) for name, p in parts.items()})
    )
    assert [len(made.train), len(made.dev), len(made.test)] == [40, 10, 10] and made.labels == ("neg", "pos")
    assert made.dev[0] == {"text": "t 40", "label": "neg"}


def test_of_a_stream_so_many_rows_are_read_and_no_more():
    read: list[int] = []
    made = load_task(endless(read), max_rows=50)
    assert 50 <= len(read) <= 51  # datasets looks one row ahead
    assert sorted(row["text"] for part in (made.train, made.dev, made.test) for row in part) == sorted(
        f"row {i}" for i in range(50)
    )
    assert made.labels == ("neg", "pos") and "the first 50 rows of each split" in made.source
    again = load_task(endless([]), max_rows=50)
    assert again.fingerprint == made.fingerprint


def test_a_mapped_stream_learns_its_columns_from_its_rows():
    stream = endless([]).map(
        lambda row: {"sentence": row["text"], "mood": "ab"[row["label"]]}, remove_columns=["text", "label"]
    )
    assert stream.column_names is None or "mood" in stream.column_names
    made = task(stream, text="sentence", label="mood", max_rows=40)
    assert isinstance(made, Task) and made.labels == ("a", "b")


def test_a_stream_of_splits():
    splits = datasets.IterableDatasetDict({"train": endless([]), "validation": endless([]), "test": endless([])})
    made = load_task(splits, max_rows=20)
    assert [len(made.train), len(made.dev), len(made.test)] == [20, 20, 20]


def test_a_name_of_the_hub_is_streamed_when_rows_are_counted(monkeypatch):
    seen: dict[str, Any] = {}

    def load_dataset(path, name=None, **options):
        seen.update(options)
        return datasets.IterableDatasetDict({"train": endless(seen.setdefault("read", []))})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    made = load_task("hf:a/b", max_rows=40)
    assert seen["streaming"] is True and len(seen["read"]) <= 41 and len(made.train) == 32


def test_a_stream_that_breaks_off_is_said_in_one_line(monkeypatch):
    def rows():
        yield {"text": "a", "label": 0}
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(
        datasets, "load_dataset",
        lambda *_, **__: datasets.IterableDatasetDict({"train": datasets.IterableDataset.from_generator(rows, features=FEATURES)}),
    )  # fmt: skip
    with pytest.raises(TaskError, match="hf:a/b: the hub cannot be reached"):
        load_task("hf:a/b", max_rows=40)


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        (endless([]), {}, "IterableDataset: a stream may have no end; say how many rows .* max_rows="),
        (endless([]), {"max_rows": 0}, "max_rows=0: expected 1 or more"),
        ("stdlib_kind", {"max_rows": 9}, "max_rows=9: expected .* for other tasks there is limit="),
        (datasets.DatasetDict({"test": datasets.Dataset.from_list(reviews(9))}), {}, "no train split with labels; splits: test"),
        (datasets.Dataset.from_list([{"body": "a", "stars": "b"}] * 9), {}, r"Dataset\[train\] has columns body, stars"),
    ],
)  # fmt: skip
def test_what_makes_no_task_is_refused(source, options, said):
    with pytest.raises(TaskError, match=said):
        load_task(source, **options)
