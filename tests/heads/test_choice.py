"""Multiple choice: one sequence a choice, a softmax over those of a row alone."""

from __future__ import annotations

import pytest
import torch
from tests.fit.running import alone, run
from tests.fit.tiny import QUICK, backbone, furthest, plan, task

from deltatune.data.task import Row
from deltatune.heads.base import collate
from deltatune.heads.choice import MultipleChoice
from deltatune.heads.choose import head_for

ROWS: list[Row] = [
    {"text": "w1 w2", "choices": ["w3", "w4 w5", "w6"], "label": 1},
    {"text": "w7", "choices": ["w8", "w9"], "label": 0, "context": "w10 w11"},
]


def made() -> MultipleChoice:
    head = head_for(task("multiple_choice"), backbone(), 0)
    assert isinstance(head, MultipleChoice)
    return head


def test_a_row_is_as_many_sequences_as_it_has_choices_and_a_context_stands_behind_the_text() -> None:
    on = backbone()
    examples = made().encode(ROWS, on, 64)
    words = [[" ".join(on.processor.convert_ids_to_tokens(one.ids)) for one in e.sequences] for e in examples]
    assert words == [
        ["[CLS] w1 w2 [SEP] w3 [SEP]", "[CLS] w1 w2 [SEP] w4 w5 [SEP]", "[CLS] w1 w2 [SEP] w6 [SEP]"],
        ["[CLS] w7 w10 w11 [SEP] w8 [SEP]", "[CLS] w7 w10 w11 [SEP] w9 [SEP]"],
    ]
    assert [e.target for e in examples] == [1, 0]
    assert [(e.tokens, e.longest) for e in examples] == [(19, 7), (14, 7)]
    (cut,) = made().encode([{**ROWS[1], "context": " ".join(["w12"] * 60)}], on, 12)
    assert on.processor.convert_ids_to_tokens(cut.ids)[1] == "w7" and cut.longest == 12


def test_scores_of_a_row_are_weighed_against_each_other_alone() -> None:
    on, head = backbone(), made()
    batch = collate(head.encode(ROWS, on, 64), on)
    scores = torch.tensor([1.0, 3.0, 2.0, 0.5, 0.1])
    values, sure = head.decode(scores, batch)
    assert values == [1, 0]
    first, second = torch.softmax(scores[:3], 0)[1], torch.softmax(scores[3:], 0)[0]
    assert sure == pytest.approx([float(first), float(second)])
    hidden = on.trunk(**batch.inputs).last_hidden_state
    found = head.scores(hidden, batch, on).detach()
    expected = -(found[:3].log_softmax(0)[1] + found[3:].log_softmax(0)[0]) / 2
    assert float(head.loss(hidden, batch, on).detach()) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("kind", ["multiple_choice", "extractive_span"])
def test_together_is_as_alone(kind: str) -> None:
    plans = [plan(delta, task(kind), settings=QUICK) for delta in ("lora", "adapter")]  # type: ignore[arg-type]
    plans.append(plan("lora", task("classification"), settings=QUICK))
    together, groups = run(plans, steps=12)
    assert min(groups) == 1
    for one in plans:
        assert furthest(together[one.name].tensors, alone(one, steps=12).tensors) < 1e-9
