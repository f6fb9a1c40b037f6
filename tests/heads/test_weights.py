"""Weights of rows and of classes: 0 is left out, 2 is twice, and what is balanced counts the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.data.writing import reviews, write
from tests.fit.running import run
from tests.fit.tiny import QUICK, backbone, furthest, plan, task
from tests.heads.test_numbers_and_sets import write as write_numbers

from deltatune.data.load import load_task
from deltatune.data.task import Kind, Task
from deltatune.errors import TaskError, UnknownName, UserError
from deltatune.heads.base import collate
from deltatune.heads.choose import head_for
from deltatune.training.fit import fit_plans
from deltatune.training.settings import Settings
from deltatune.training.weights import class_weights

TIMES = (0, 2, 1, 2, 1, 0, 1, 1, 2, 1)
KINDS: tuple[Kind, ...] = (
    "classification", "pair_classification", "token_classification", "multiple_choice", "extractive_span",
)  # fmt: skip


def of_kind(kind: Kind, folder: Path) -> Task:
    return task(kind) if kind in KINDS else load_task(write_numbers(folder, kind))


def weighted_and_repeated(whole: Task) -> tuple[Task, Task]:
    """The first ten rows with weights, and the same rows left out or standing twice."""
    rows = whole.train[:10]
    weighted = [{**row, "weight": float(times)} for row, times in zip(rows, TIMES, strict=True)]
    repeated = [row for row, times in zip(rows, TIMES, strict=True) for _ in range(times)]
    return dataclasses.replace(whole, train=weighted), dataclasses.replace(whole, train=repeated)


@pytest.mark.parametrize("kind", [*KINDS, "multi_label", "regression"])
@pytest.mark.parametrize("probe", [False, True])
def test_a_weight_of_0_leaves_a_row_out_and_one_of_2_is_the_row_twice(kind: Kind, probe: bool, tmp_path: Path) -> None:
    made = []
    for one in weighted_and_repeated(of_kind(kind, tmp_path)):
        asked = plan("lora", one, settings=QUICK, batch=len(one.train), steps=6, warmup=0.5, probe=probe)
        made.append(run([asked], steps=6)[0][asked.name])
    ours, theirs = made
    assert len({round(loss, 6) for loss in ours.losses}) > 3
    near = 1e-9 if not probe else 5e-3  # a probe is fitted in float32, and stops when it is near enough
    assert ours.losses == pytest.approx(theirs.losses, abs=near)
    assert probe or furthest(ours.tensors, theirs.tensors) < 1e-9


def test_a_batch_of_rows_that_weigh_nothing_has_no_loss_and_moves_nothing() -> None:
    on, data = backbone(dtype=torch.float64), task()
    head = head_for(data, on, 0).double()
    batch = collate(head.encode([{**row, "weight": 0.0} for row in data.train[:4]], on, 64), on)
    loss = head.loss(on.trunk(**batch.inputs).last_hidden_state, batch, on)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


@pytest.mark.parametrize("kind", ["classification", "token_classification", "multi_label"])
def test_a_class_weight_multiplies_the_losses_of_its_label(kind: Kind, tmp_path: Path) -> None:
    on, data = backbone(dtype=torch.float64), of_kind(kind, tmp_path)
    head = head_for(data, on, 0).double()
    batch = collate(head.encode(data.train[:8], on, 64), on)
    hidden = on.trunk(**batch.inputs).last_hidden_state
    weights = [3.0, 0.0, 0.5]
    head.class_weights = tuple(weights)
    found = head.loss(hidden, batch, on)
    scores = head.scores(hidden, batch, on)
    total = counted = torch.zeros((), dtype=torch.float64)
    for n, row in enumerate(data.train[:8]):
        if kind == "multi_label":
            chances = scores[n].sigmoid()
            for i, label in enumerate(data.labels):
                there = label in row["labels"]
                total = total - (weights[i] * chances[i].log() if there else (1 - chances[i]).log())
            counted = counted + 1
            continue
        items = [(scores[n], row.get("label"))]
        if kind == "token_classification":
            items = [(scores[n, at], tag) for at, tag in zip(batch.examples[n].words, row["tags"], strict=True)]
        for one, label in items:
            i = data.labels.index(label)
            total, counted = total - weights[i] * one.log_softmax(dim=0)[i], counted + weights[i]
    assert float(found.detach()) == pytest.approx(float((total / counted).detach()), abs=1e-12)


def test_balanced_is_what_scikit_learn_calls_so() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    data = task()
    labels = [row["label"] for row in data.train]
    expected = compute_class_weight("balanced", classes=np.array(data.labels), y=labels)
    assert list(class_weights(data, "balanced").values()) == pytest.approx(list(expected))
    assert class_weights(data, {"bad": 4}) == {"bad": 4.0, "fine": 1.0, "good": 1.0}


def test_balanced_counts_rows_by_their_weights_and_sets_by_presence(tmp_path: Path) -> None:
    weighted, repeated = weighted_and_repeated(task())
    assert class_weights(weighted, "balanced") == pytest.approx(class_weights(repeated, "balanced"))
    sets = load_task(write_numbers(tmp_path, "multi_label"))
    with_a = sum("a" in row["labels"] for row in sets.train)
    assert class_weights(sets, "balanced")["a"] == pytest.approx((len(sets.train) - with_a) / with_a)


def test_class_weights_move_the_decision_towards_the_rare_class() -> None:
    rows = [row for row in task(rows=200).train if row["label"] == "good"][:6]
    rows += [row for row in task(rows=200).train if row["label"] == "bad"][:60]
    rare = dataclasses.replace(task(), train=rows, dev=rows, test=rows, labels=("bad", "good"))
    shares = []
    for weights in (None, {"good": 30.0}):
        asked = plan("head", rare, settings=QUICK, class_weights=weights, steps=1)
        on = backbone()
        (trained,) = fit_plans(on, [asked])
        assert trained.test is not None
        shares.append(trained.test.values.count("good"))
    assert shares[0] < shares[1]


def test_a_column_of_weights_is_taken_when_it_is_named(tmp_path: Path) -> None:
    rows = [{**row, "weight": i % 3, "trust": 0.5} for i, row in enumerate(reviews())]
    file = write(tmp_path, "rows", rows, ".csv")
    assert "weight" not in load_task(file).train[0]
    assert {row["weight"] for row in load_task(file, columns={"weight": "weight"}).train} == {0.0, 1.0, 2.0}
    assert load_task(file, columns={"weight": "trust"}).train[0]["weight"] == 0.5
    assert load_task(file, columns={"weight": "trust"}).kind == "classification"


@pytest.mark.parametrize(
    ("weight", "said"),
    [("-1", "weight is '-1' .*expected 0 or more"), ("much", "expected 0 or more"), ("", "has no weight"),
     ("0", "every weight is 0")],
)  # fmt: skip
def test_what_is_no_weight_is_refused(weight: str, said: str, tmp_path: Path) -> None:
    file = write(tmp_path, "rows", [{**row, "w": weight} for row in reviews()], ".csv")
    with pytest.raises(TaskError, match=said):
        load_task(file, columns={"weight": "w"})


def test_what_are_no_class_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="unknown label 'god'; nearest: good"):
        class_weights(task(), {"god": 2.0})
    with pytest.raises(UserError, match="'good' has -1"):
        Settings(class_weights={"good": -1})
    with pytest.raises(UnknownName, match="unknown class_weights 'balance'; nearest: balanced"):
        Settings(class_weights="balance")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="multiple_choice task and has no labels"):
        class_weights(task("multiple_choice"), "balanced")
