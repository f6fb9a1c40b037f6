"""Every shared task of a kind that is read here loads, with the sizes, labels and metric that its table states."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from deltatune.data import constant, load_task, majority, references, score
from deltatune.errors import TaskError

FOLDER = Path(os.environ.get("DELTATUNE_TASKS", Path(__file__).parents[3] / "shared" / "data"))
TABLE = FOLDER / "TASKS.tsv"
KINDS = {
    "ner": "token_classification",
    "extractive_qa": "extractive_span",
    **{k: k for k in ("classification", "pair_classification", "multiple_choice", "generation")},
}
SEVERAL = {"preference": "preference", "embedding_pairs": "embedding", "chat": "chat"}
METRICS = {"em+f1": "squad_f1"}
# Their tables say "f1"; the data set's own paper says of which label.
F1_OF = {"tweet_irony": "f1_irony"}
# A header line among the labels of one, labels of a single example in the other.
UNSEEN = {"mag_fields": (0, 1, 0), "atis_intent": (0, 1, 5)}


def rows():
    if not TABLE.is_file():
        return []
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not TABLE.is_file(), reason=f"no shared tasks at {FOLDER} (set DELTATUNE_TASKS)"),
]


@pytest.mark.parametrize("stated", [row for row in rows() if row["kind"] in KINDS], ids=lambda row: row["name"])
def test_a_shared_task_loads(stated):
    name = stated["name"]
    metric = F1_OF.get(name, METRICS.get(stated["metric"], stated["metric"]))
    task = load_task(FOLDER / name, metric=metric, unseen="drop" if name in UNSEEN else "refuse")
    assert task.kind == KINDS[stated["kind"]]
    sizes = [int(stated[f"n_{split}"]) for split in ("train", "dev", "test")]
    dropped = UNSEEN.get(name, (0, 0, 0))
    assert [len(task.train), len(task.dev), len(task.test)] == [n - d for n, d in zip(sizes, dropped, strict=True)]
    if stated["kind"] in ("classification", "pair_classification") and "," in stated["labels"]:
        assert set(task.labels) <= set(stated["labels"].split(","))
    some = task.limited(200, 50, 50).test
    gold = references(task.kind, some)
    assert 0 <= score(task.metric, constant(majority(task), task, some), gold, task.labels) <= 1
    best = [one[0] for one in gold] if task.kind in ("generation", "extractive_span") else gold
    # A sample may lack the label in question, or have no entity; bleu is 0 for answers of fewer than four words.
    if task.metric not in ("bleu", "entity_f1"):
        assert score(task.metric, best, gold, task.labels) == pytest.approx(1.0)


@pytest.mark.parametrize("stated", [row for row in rows() if row["kind"] in SEVERAL], ids=lambda row: row["name"])
def test_a_shared_task_of_several_texts_loads(stated):
    name = stated["name"]
    if name == "chat_toolcall_en":
        with pytest.raises(TaskError, match="message 4 has role 'function_call'"):
            load_task(FOLDER / name)
        return
    task = load_task(FOLDER / name)
    assert task.kind == SEVERAL[stated["kind"]] and task.labels == ()
    sizes = [int(stated[f"n_{split}"]) for split in ("train", "dev", "test")]
    assert [len(task.train), len(task.dev), len(task.test)] == sizes
    gold = references(task.kind, task.test)
    assert 0 <= score(task.metric, constant(majority(task), task, task.test), gold) <= 0.5


@pytest.mark.parametrize("name", UNSEEN)
@pytest.mark.skipif(not TABLE.is_file(), reason=f"no shared tasks at {FOLDER} (set DELTATUNE_TASKS)")
def test_labels_that_train_lacks_are_refused(name):
    with pytest.raises(TaskError, match="is not in train"):
        load_task(FOLDER / name)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pair_regression", "look like a regression"),
    ],
)
def test_other_kinds_are_refused_with_the_reason(kind, message):
    names = [row["name"] for row in rows() if row["kind"] == kind]
    assert names
    for name in names:
        with pytest.raises(TaskError, match=message):
            load_task(FOLDER / name)
