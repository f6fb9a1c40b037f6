"""Preferences: the delta off is the reference, in training and in prediction."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from tests.fit.running import alone, run
from tests.fit.tiny import QUICK, backbone, furthest, plan, task
from tests.heads.paired import rows_of, write

from deltatune.compose.expression import parse
from deltatune.data.load import load_task
from deltatune.data.metrics import majority, score
from deltatune.delta.adapted import Adapted
from deltatune.delta.delta import Delta
from deltatune.errors import TaskError
from deltatune.heads.base import collate
from deltatune.heads.choose import head_for
from deltatune.heads.preference import Preference
from deltatune.studies.verbs import run_plans
from deltatune.training.evaluate import predict
from deltatune.training.job import Plan


def log_probability(module: torch.nn.Module, ids: list[int], answer: int) -> float:
    """Log-probability of the last `answer` tokens, by the model's own logits."""
    with torch.no_grad():
        logits = module(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
    return sum(float(logits[at - 1, ids[at]]) for at in range(len(ids) - answer, len(ids)))


def test_the_margin_is_the_closed_form(tmp_path: Path) -> None:
    on, rows = backbone("llama"), rows_of("preference", 5)
    made = load_task(write(tmp_path, "preference"))
    head = head_for(made, on, 0)
    assert isinstance(head, Preference) and head.arguments == {"template": "{prompt}", "beta": 0.1}
    delta = Delta.build(parse("adapter | bitfit"), on, name="d")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in delta.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=draw))
    with Adapted(on, [delta]) as adapted:
        found = predict(adapted, delta, head, rows, 64).values
        for row, margin in zip(rows, found, strict=True):
            gain = {}
            for name in ("chosen", "rejected"):
                ids = on.processor(f"{row['prompt']} {row[name]} [SEP]")["input_ids"]
                size = len(row[name].split()) + 1
                with adapted.using("d"):
                    gain[name] = log_probability(adapted, ids, size)
                with adapted.using(None):
                    gain[name] -= log_probability(adapted, ids, size)
            assert margin == pytest.approx(0.1 * (gain["chosen"] - gain["rejected"]), abs=1e-5)
            assert abs(margin) > 1e-4
        # A delta that is off prefers nothing: that is a half, and not nothing.
        bare = predict(adapted, None, head, rows, 64).values
    assert bare == [0.0] * 5 and score("preference_accuracy", bare, ["chosen"] * 5) == 0.5
    assert score("preference_accuracy", [0.2, -0.1, 0.0, 3.0], ["chosen"] * 4) == pytest.approx(2.5 / 4)
    batch = collate(head.encode(rows, on, 64), on)
    hidden = on.trunk(**batch.inputs).last_hidden_state
    batch.reference = hidden
    assert float(head.loss(hidden, batch, on)) == pytest.approx(math.log(2))


def test_it_learns_what_is_preferred(tmp_path: Path) -> None:
    made = load_task(write(tmp_path, "preference"))
    on = backbone("llama")
    settings = dataclasses.replace(QUICK, steps=60, lr=1e-2, batch=8)
    runs = run_plans(on, [Plan(parse("lora"), made, 0, settings, "lora")], out=tmp_path / "out")
    curve = runs.trained[0].curve
    assert curve[0].loss < math.log(2) + 0.01 and curve[-1].loss < 0.6
    result = runs.results[0]
    assert [row["delta"] for row in result["summary"]] == ["lora"]
    assert {e["gold"] for e in result["examples"]} == {"chosen"} and majority(made) == 0.0
    assert result["baselines"][0]["metrics"]["test"] == {"preference_accuracy": 0.5}
    again = Delta.load(str(tmp_path / "out"), on)
    assert isinstance(again.head, Preference) and not list(again.head.parameters())


def test_together_is_alone_beside_other_kinds(tmp_path: Path) -> None:
    pairs = load_task(write(tmp_path, "preference"))
    some = [plan("lora(dropout=0.2)", pairs), plan("prefix(n=2)", pairs, 1), plan("adapter", task("generation"))]
    together, _ = run(some, steps=12, family="llama")
    for one in some:
        lonely = alone(one, steps=12, family="llama")
        assert len(set(lonely.losses)) > 8
        assert together[one.name].losses == pytest.approx(lonely.losses, rel=0, abs=1e-6)
        assert furthest(together[one.name].tensors, lonely.tensors) <= 1e-6


def test_long_answers_are_cut_and_a_cut_one_has_no_end() -> None:
    on = backbone("llama")
    head = Preference("{prompt}")
    row = {"prompt": "w1 " * 30, "chosen": "w2 " * 30, "rejected": "w3"}
    (example,) = head.encode([row], on, 20)
    words = [on.processor.convert_ids_to_tokens(list(text.ids)) for text in example.sequences]
    assert words == [["w1"] * 10 + ["w2"] * 10, ["w1"] * 10 + ["w3", "[SEP]"]]
    assert [sum(t != -100 for t in text.target) for text in example.sequences] == [10, 2]


def test_an_encoder_has_no_preferences(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="a preference task needs a language model such as smollm2; tiny-bert writes"):
        head_for(load_task(write(tmp_path, "preference")), backbone(), 0)
