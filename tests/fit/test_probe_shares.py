"""The start of heads that share out a softmax over choices or tokens: a conditional logit on the frozen features."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tests.fit.tiny import backbone, task

from deltatune.data.task import Task
from deltatune.heads.base import TaskHead, collate
from deltatune.heads.choice import MultipleChoice
from deltatune.heads.choose import head_for
from deltatune.heads.span import ExtractiveSpan
from deltatune.training.probe import probe
from deltatune.training.probe_shares import shares_of
from deltatune.training.states import STRENGTHS


def pieces(data: Task) -> tuple[Any, TaskHead, list[Any], list[Any]]:
    on = backbone()
    head = head_for(data, on, 0)
    return on, head, *(head.encode(rows, on, 32) for rows in (data.train, data.dev))


def test_two_choices_are_a_logistic_regression_of_the_difference() -> None:
    whole = task("multiple_choice", rows=80)
    cut = [
        [{**row, "choices": row["choices"][:2], "label": min(row["label"], 1)} for row in rows]
        for rows in (whole.train, whole.dev)
    ]
    on, head, train, dev = pieces(dataclasses.replace(whole, train=cut[0], dev=cut[1]))
    assert isinstance(head, MultipleChoice)
    seen, seen_dev = shares_of(head, train, on), shares_of(head, dev, on)
    assert seen is not None and seen_dev is not None
    spread = seen.x.numpy().std()
    difference, difference_dev = ((part.x[1::2] - part.x[::2]).numpy() / spread for part in (seen, seen_dev))
    labels, labels_dev = ([row["label"] for row in rows] for rows in cut)
    losses = []
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, fit_intercept=False, tol=1e-6, max_iter=1000).fit(difference, labels)
        chances = model.predict_proba(difference_dev)[range(len(labels_dev)), labels_dev]
        losses.append((-np.log(chances).mean(), model.coef_ / spread))
    assert max(losses)[0] - min(losses)[0] > 0.005
    found = probe(head, train, dev, on)
    assert found is not None
    weight = min(losses, key=lambda one: one[0])[1]
    assert found["linear.weight"].numpy() == pytest.approx(weight, abs=float(0.02 * abs(weight).max()))


@pytest.mark.parametrize("kind", ["multiple_choice", "extractive_span"])
def test_a_head_that_starts_so_has_less_loss_than_a_random_or_an_empty_one(kind: Any) -> None:
    on, head, train, dev = pieces(task(kind, rows=60))
    batch = collate(train, on)
    hidden = on.trunk(**batch.inputs).last_hidden_state
    losses = [float(head.loss(hidden, batch, on).detach())]
    found = probe(head, train, dev, on)
    assert found is not None and found.keys() == dict(head.named_parameters()).keys()
    for tensors in ({"linear.weight": torch.zeros_like(found["linear.weight"])}, found):
        head.load_state_dict(tensors)
        losses.append(float(head.loss(hidden, batch, on).detach()))
    random, empty, fitted = losses
    assert fitted < min(random, empty) - 0.02


@pytest.mark.parametrize("kind", ["multiple_choice", "extractive_span"])
def test_its_loss_is_the_heads_own(kind: Any) -> None:
    on, head, train, _ = pieces(task(kind))
    assert isinstance(head, MultipleChoice | ExtractiveSpan)
    train = [dataclasses.replace(e, weight=float(i % 3)) for i, e in enumerate(train)]
    seen = shares_of(head, train, on)
    assert seen is not None and len(seen.weights) == sum(e.weight > 0 for e in train)
    batch = collate(train, on)
    expected = float(head.loss(on.trunk(**batch.inputs).last_hidden_state, batch, on).detach())
    found = float(seen.loss(head.linear.weight.detach()) / seen.weights.sum())  # type: ignore[arg-type, union-attr]
    assert found == pytest.approx(expected, abs=1e-5)


def test_without_a_row_that_teaches_there_is_no_start() -> None:
    on, head, train, dev = pieces(task("multiple_choice"))
    assert probe(head, [dataclasses.replace(e, weight=0.0) for e in train], dev, on) is None
