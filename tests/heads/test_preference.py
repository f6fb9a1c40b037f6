"""Preferences: the delta off is the reference, in training and in prediction."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fit.running import alone, run
from tests.fit.tiny import QUICK, backbone, furthest, jobs_of, plan, same_bits, task, tensors
from tests.heads.paired import rows_of, write

from deltatune.compose.expression import parse
from deltatune.data.load import load_task
from deltatune.data.metrics import majority, score
from deltatune.delta.adapted import Adapted
from deltatune.delta.delta import Delta
from deltatune.errors import TaskError
from deltatune.heads.base import collate
from deltatune.heads.choose import head_for
from deltatune.heads.language import log_probabilities
from deltatune.heads.preference import ANSWERS, Preference
from deltatune.studies.verbs import run_plans
from deltatune.training import checkpoint
from deltatune.training.engine import Engine
from deltatune.training.evaluate import predict
from deltatune.training.job import Job, Plan, batch_of
from deltatune.training.references import References


def log_probability(module: torch.nn.Module, ids: list[int], answer: int) -> float:
    """Log-probability of the last `answer` tokens, by the model's own logits."""
    with torch.no_grad():
        logits = module(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
    return sum(float(logits[at - 1, ids[at]]) for at in range(len(ids) - answer, len(ids)))


@pytest.mark.parametrize("spec", ["adapter | bitfit", "full"])
def test_the_margin_is_the_closed_form(spec: str, tmp_path: Path) -> None:
    on, rows = backbone("llama"), rows_of("preference", 5)
    on.module.lm_head.weight = on.module.model.embed_tokens.weight  # tied: what changes the one changes the other
    made = load_task(write(tmp_path, "preference"))
    head = head_for(made, on, 0)
    assert isinstance(head, Preference) and head.arguments == {"template": "{prompt}", "beta": 0.1}
    delta = Delta.build(parse(spec), on, name="d")
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
    batch.reference = head.compared(hidden, batch, on)
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


@contextmanager
def bare_texts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the texts that run without a delta, call by call."""
    counted: list[int] = []
    encode = Adapted.encode

    def counting(self: Adapted, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
        counted.append(sum(one.rows for one in options["call"].segments if one.delta is None))
        return encode(self, inputs, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Adapted, "encode", counting)
        yield counted


def test_the_reference_is_read_once_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = load_task(write(tmp_path, "preference"))
    settings = dataclasses.replace(QUICK, steps=3 * len(made.train) // 4, batch=4)
    plans = [Plan(parse(name), made, 0, settings, name) for name in ("lora", "adapter", "prefix(n=2)")]

    def losses() -> list[float]:
        trained = run_plans(backbone("llama"), plans).trained
        return [point.loss for one in trained for point in one.curve]

    with bare_texts(monkeypatch) as counted:
        found = losses()
    texts = {
        (row["prompt"], row[name]) for rows in (made.train, made.dev, made.test) for row in rows for name in ANSWERS
    }
    assert len(texts) == 2 * 60 == sum(counted)
    give = References.give

    def forgetting(self: References, *what: Any) -> None:
        self.known.clear()
        give(self, *what)

    monkeypatch.setattr(References, "give", forgetting)
    with bare_texts(monkeypatch) as counted:
        assert found == pytest.approx(losses(), rel=0, abs=1e-6)
    assert sum(counted) > 2 * len(texts)


def test_the_reference_is_kept_over_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on, some = backbone("llama"), [plan("lora", load_task(write(tmp_path, "preference")), batch=8, steps=12)]
    (whole,), (stopped,), (resumed,) = (jobs_of(some, on) for _ in range(3))

    def step(job: Job, times: int) -> None:
        engine = Engine([job], on)
        for _ in range(times):
            engine.step([job])
        engine.close()

    step(whole, 12)
    step(stopped, 6)
    checkpoint.write(tmp_path / "state", [stopped], "this")
    checkpoint.read(tmp_path / "state", [resumed], "this")
    assert resumed.references.known == stopped.references.known and len(stopped.references.known) == 2 * len(
        resumed.train
    )
    with bare_texts(monkeypatch) as counted:
        step(resumed, 6)
    assert not any(counted) and resumed.losses == whole.losses
    assert same_bits(tensors(resumed), tensors(whole))


def test_the_reference_of_a_delta_that_goes_on_is_the_backbone(tmp_path: Path) -> None:
    made, on = load_task(write(tmp_path, "preference")), backbone("llama")
    settings = dataclasses.replace(QUICK, steps=40, lr=1e-2, batch=8)
    first = run_plans(on, [Plan(parse("lora"), made, 0, settings, "lora")]).trained[0].delta
    (job,) = jobs_of([dataclasses.replace(plan("lora", made, batch=8), start=first)], on)
    engine = Engine([job], on)
    batch = batch_of(job, on)
    (loss,) = engine.losses([job], [batch])
    engine.close()
    with torch.no_grad():
        hidden = on.trunk(**batch.inputs).last_hidden_state
    wanted = log_probabilities(hidden, batch.sequences, on)
    assert torch.allclose(batch.reference, wanted, rtol=0, atol=1e-5)
    assert float(loss.detach()) < math.log(2) - 0.01  # against itself it would be log 2


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
