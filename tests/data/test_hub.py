"""Data sets of the hub: read through `datasets`, with no network a sentence that says what to do."""

from __future__ import annotations

import re

import datasets
import pytest
from tests.data.writing import reviews, write

from deltatune.data import load_task
from deltatune.errors import TaskError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_folder_read_by_datasets_is_the_same_task(tmp_path):
    rows = reviews(60)
    for name, part in {"train": rows[:40], "validation": rows[40:50], "test": rows[50:]}.items():
        write(tmp_path / "set", name, part)
    assert load_task(f"hf:{tmp_path / 'set'}").fingerprint == load_task(tmp_path / "set").fingerprint


def hub_set(monkeypatch, **splits):
    seen = {}

    def load_dataset(path, name=None, revision=None):
        seen.update(path=path, name=name, revision=revision)
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return seen


def test_class_numbers_become_names_and_hidden_labels_no_test(monkeypatch):
    names = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    train = {"sentence": [f"s {i}" for i in range(50)], "label": [i % 2 for i in range(50)]}
    hidden = {"sentence": [f"t {i}" for i in range(20)], "label": [-1] * 20}
    made = {name: datasets.Dataset.from_dict(rows, names) for name, rows in {"train": train, "test": hidden}.items()}
    seen = hub_set(monkeypatch, **made)
    found = load_task("hf:nyu-mll/glue:sst2@v1", columns={"text": "sentence"})
    assert seen == {"path": "nyu-mll/glue", "name": "sst2", "revision": "v1"}
    assert found.name == "glue_sst2" and found.labels == ("neg", "pos")
    assert all(row["text"].startswith("s ") for row in found.test)
    assert all(row["label"] == ["neg", "pos"][int(row["text"][2:]) % 2] for row in found.train)


def test_numbered_tags_become_names(monkeypatch):
    tags = datasets.List(datasets.ClassLabel(names=["O", "B-PER", "I-PER"]))
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": tags})
    rows = {"tokens": [["Ann", f"w{i}"] for i in range(40)], "ner_tags": [[1, 0]] * 40}
    hub_set(monkeypatch, train=datasets.Dataset.from_dict(rows, features))
    assert load_task("hf:x/ner", columns={"tags": "ner_tags"}).labels == ("B-PER", "O")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ConnectionError("Couldn't reach 'a/b' on the Hub"),
            "hf:a/b: the hub cannot be reached and the data set is not",
        ),
        (ValueError("Config name is missing.\nPlease pick one"), "hf:a/b: Config name is missing.; give hf:a/b:CONFIG"),
        (FileNotFoundError("no a/b"), "hf:a/b: FileNotFoundError: no a/b; check the name on the hub"),
    ],
)
def test_what_the_hub_answers_is_said_in_one_line(error, message, monkeypatch):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(TaskError, match=re.escape(message)) as caught:
        load_task("hf:a/b")
    assert "\n" not in str(caught.value)


def test_a_set_without_train(monkeypatch):
    hub_set(monkeypatch, test=datasets.Dataset.from_list(reviews(9)))
    with pytest.raises(TaskError, match="hf:a/b: no train split with labels; splits: test"):
        load_task("hf:a/b")
