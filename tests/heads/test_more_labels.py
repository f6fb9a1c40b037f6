"""Labels that come later: the head grows, and what it said of its own labels stays the same bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.fit.tiny import QUICK, backbone, plan, task
from tests.heads.test_numbers_and_sets import write

from deltatune.data.load import load_task
from deltatune.data.task import Kind, Task
from deltatune.delta.adapted import Adapted
from deltatune.delta.delta import Delta
from deltatune.errors import UserError
from deltatune.heads.base import TaskHead, collate
from deltatune.training.evaluate import predict
from deltatune.training.fit import fit_plans

KINDS: tuple[Kind, ...] = ("classification", "pair_classification", "token_classification", "multi_label")


def trained(kind: Kind, folder: Path) -> tuple[Task, Delta]:
    data = load_task(write(folder, kind)) if kind == "multi_label" else task(kind)
    (made,) = fit_plans(backbone(), [plan("lora", data, settings=QUICK)])
    return data, made.delta


def scores(delta: Delta, data: Task, number: int) -> torch.Tensor:
    on, head = backbone(), delta.head
    assert isinstance(head, TaskHead)
    delta.name = "here"
    batch = collate(head.encode(data.test[:number], on, 64), on)
    with torch.no_grad(), Adapted(on, [delta], verify=False) as adapted:
        adapted.eval()
        return head.scores(adapted.encode(dict(batch.inputs), deltas="here"), batch, on)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [1, 7])
def test_the_scores_of_its_own_labels_stay_the_same_bit_for_bit(kind: Kind, number: int, tmp_path: Path) -> None:
    data, delta = trained(kind, tmp_path)
    delta.save(str(tmp_path / "saved"))
    before = scores(delta, data, number)
    for more in (["refund", "late"], ["lost"]):
        grown = Delta.load(str(tmp_path / "saved"), backbone())
        grown.add_labels(more)
        after = scores(grown, data, number)
        assert after.shape[-1] == before.shape[-1] + len(more)
        assert torch.equal(after[..., : before.shape[-1]], before)
        lowest = float(delta.head.linear.bias.detach().min())  # type: ignore[union-attr, operator]
        assert float(after[..., before.shape[-1] :].max()) == pytest.approx(lowest - 2)


def test_it_is_saved_with_what_was_added_and_learns_it(tmp_path: Path) -> None:
    data, delta = trained("classification", tmp_path)
    delta.add_labels(["refund", "bad"])
    delta.add_labels(["late"])
    delta.save(str(tmp_path / "grown"))
    on = backbone()
    again = Delta.load(str(tmp_path / "grown"), on)
    assert again.head.labels == ("bad", "fine", "good", "refund", "late")  # type: ignore[union-attr]
    assert again.record["task"]["labels"] == ["bad", "fine", "good", "refund", "late"]
    assert torch.equal(scores(again, data, 5), scores(delta, data, 5))
    rows = [{**row, "label": "refund"} for row in data.train[:4]]
    head = again.head
    assert isinstance(head, TaskHead)
    batch = collate(head.encode(rows, on, 64), on)
    assert {e.target for e in batch.examples} == {3}
    with Adapted(on, [again]) as adapted:
        assert "refund" not in predict(adapted, again, head, rows, 64).values
        optimiser = torch.optim.Adam(again.parameters(), lr=0.03)
        for _ in range(30):
            optimiser.zero_grad()
            head.loss(adapted.encode(dict(batch.inputs), deltas=again.name), batch, on).backward()
            optimiser.step()
        assert predict(adapted, again, head, rows, 64).values == ["refund"] * 4


def test_a_head_without_labels_of_its_own_says_so(tmp_path: Path) -> None:
    (made,) = fit_plans(
        backbone(), [plan("lora", task("multiple_choice"), settings=dataclasses.replace(QUICK, steps=1))]
    )
    with pytest.raises(UserError, match="a MultipleChoice head has no labels to add new to"):
        made.delta.add_labels(["new"])
    made.delta.head = None
    with pytest.raises(UserError, match="has no head to add labels to"):
        made.delta.add_labels(["new"])
