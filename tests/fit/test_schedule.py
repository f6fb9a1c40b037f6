"""The rate, its schedule, the clip, patience, and which tensors are kept: each job's own."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from tests.fit.tiny import QUICK, backbone, furthest, jobs_of, plan, same_bits, task, tensors

from deltatune.errors import UserError
from deltatune.training import engine as engine_module
from deltatune.training.engine import Engine, evaluates, train
from deltatune.training.evaluate import predict
from deltatune.training.fit import fit_plans
from deltatune.training.settings import Settings, rate


def engine_of(plans, dtype=torch.float32):
    on = backbone(dtype=dtype)
    jobs = jobs_of(plans, on)
    return Engine(jobs, on), jobs


@pytest.mark.parametrize(("steps", "warmup"), [(100, 0.06), (100, 0.0), (7, 0.5), (1, 0.06), (3, 1.0)])
def test_the_rate_rises_linearly_to_one_and_falls_linearly_to_almost_zero(steps, warmup):
    rates = [rate(step, steps, warmup) for step in range(steps)]
    rise = max(1, round(warmup * steps))
    assert rates[:rise] == pytest.approx([(i + 1) / rise for i in range(rise)])
    assert max(rates) == 1.0 and min(rates) > 0
    fall = [a - b for a, b in zip(rates[rise:], rates[rise + 1 :], strict=False)]
    assert fall == pytest.approx([1 / max(1, steps - rise)] * len(fall))
    assert rate(steps, steps, warmup) == 0.0


def test_every_job_has_its_own_rate_for_its_delta_and_its_head():
    engine, jobs = engine_of([
        plan("lora", lr=1e-2, head_lr=5e-4, steps=20),
        plan("adapter", lr=None, steps=8, warmup=0.5),
        plan("head", lr=3e-3, head_lr=None, steps=20),
    ])  # fmt: skip
    for step in range(8):
        engine.step(jobs)
        lora, adapter, head = ([group["lr"] for group in job.optimiser.param_groups] for job in jobs)
        assert lora == pytest.approx([1e-2 * rate(step, 20, 0.06), 5e-4 * rate(step, 20, 0.06)])
        assert adapter[0] == pytest.approx(jobs[1].plan.spec.lr * rate(step, 8, 0.5))
        assert head == pytest.approx([3e-3 * rate(step, 20, 0.06)])  # without a delta the rate is the head's
    engine.close()


def test_steps_equal_plain_adamw_with_clip_and_schedule():
    """The loop itself, against a few lines of torch on a copy of the delta and the head."""
    settings = dataclasses.replace(
        QUICK, precision="auto", steps=10, lr=2e-2, clip=0.05, weight_decay=0.1, head_lr=1e-2
    )
    engine, (job,) = engine_of([plan("lora", task(), 0, settings)], torch.float64)
    on = backbone(dtype=torch.float64)
    (other,) = jobs_of([plan("lora", task(), 0, settings)], on)
    from deltatune.delta.adapted import Adapted
    from deltatune.heads.base import collate

    adapted = Adapted(on, [other.delta], verify=False)
    layers, head = list(other.delta.layers.parameters()), list(other.head.parameters())
    optimiser = torch.optim.AdamW([{"params": layers, "weight_decay": 0.1}, {"params": head, "weight_decay": 0.0}])
    clipped = 0
    for step in range(10):
        engine.step([job])
        batch = collate(other.logical_batch(step), on)
        hidden = adapted(**batch.inputs).last_hidden_state
        mean = (hidden * batch.inputs["attention_mask"][:, :, None]).sum(1) / batch.inputs["attention_mask"].sum(1)[
            :, None
        ]
        scores = other.head.linear(mean)
        loss = torch.nn.functional.cross_entropy(scores, torch.tensor([e.target for e in batch.examples]))
        optimiser.zero_grad()
        loss.backward()
        clipped += float(torch.nn.utils.clip_grad_norm_([*layers, *head], 0.05)) > 0.05
        optimiser.param_groups[0]["lr"] = 2e-2 * rate(step, 10, 0.06)
        optimiser.param_groups[1]["lr"] = 1e-2 * rate(step, 10, 0.06)
        optimiser.step()
        assert job.losses[-1] == pytest.approx(float(loss.detach()), abs=1e-6)
    assert clipped > 3
    # The head's features are rounded to float32 on the way.
    assert furthest(tensors(job), tensors(other)) < 1e-5
    engine.close()


def test_a_neighbours_gradient_is_not_in_the_norm_that_clips():
    quiet, loud = plan("lora", clip=0.5, steps=3), plan("adapter", clip=1e-3, steps=3, head_lr=1.0, lr=1.0)
    engine, (both, _) = engine_of([quiet, loud], torch.float64)
    lonely_engine, (lonely,) = engine_of([quiet], torch.float64)
    for _ in range(3):
        engine.step(engine.jobs)
        lonely_engine.step([lonely])
    assert furthest(tensors(both), tensors(lonely)) < 1e-12
    engine.close()
    lonely_engine.close()


class Told:
    """Dev scores as told, and the tensors at each evaluation."""

    def __init__(self, scores):
        self.scores, self.seen = {name: list(values) for name, values in scores.items()}, {}

    def __call__(self, adapted, jobs, split, **_):
        assert split == "dev"
        for job in jobs:
            self.seen.setdefault(job.name, []).append((job.step, tensors(job)))
        return [self.scores[job.name].pop(0) for job in jobs]


def told(monkeypatch, scores):
    made = Told(scores)
    monkeypatch.setattr(engine_module, "evaluate", made)
    return made


def test_the_tensors_that_were_best_on_dev_are_put_back(monkeypatch):
    plans = [plan("lora", steps=12, evaluations=4), plan("adapter", steps=12, evaluations=4)]
    engine, jobs = engine_of(plans)
    dev = told(monkeypatch, {plans[0].name: [0.2, 0.9, 0.9, 0.1], plans[1].name: [0.5, float("nan"), 0.4, 0.6]})
    train(engine)
    for job, best in zip(jobs, (1, 3), strict=True):
        steps = [step for step, _ in dev.seen[job.name]]
        assert steps == [3, 6, 9, 12]
        assert (job.best_step, job.best_dev) == (steps[best], (0.9, 0.6)[best // 2])
        job.restore_best()
        assert same_bits(tensors(job), dev.seen[job.name][best][1])
        assert not same_bits(tensors(job), dev.seen[job.name][0][1])
    engine.close()


def test_patience_ends_one_training_and_not_its_neighbour(monkeypatch):
    falls, goes = plan("lora", steps=12, evaluations=6, patience=2), plan("adapter", steps=12, evaluations=6)
    engine, (one, other) = engine_of([falls, goes])
    told(monkeypatch, {falls.name: [0.5, 0.6, 0.6, 0.2], goes.name: [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]})
    train(engine)
    assert (one.state, one.step, one.best_step) == ("stopped", 8, 4)  # equal is not better
    assert (other.state, other.step, other.best_step) == ("done", 12, 2)
    engine.close()


def test_what_is_returned_scores_as_it_says():
    on, data = backbone(), task(name="rows", rows=60)
    (trained,) = fit_plans(on, [plan("adapter", data, lr=3e-2, steps=40, evaluations=8)])
    dev = {point.step: point.dev for point in trained.curve}
    assert trained.metrics["dev"]["accuracy"] == max(dev.values()) == dev[trained.best_step]
    assert trained.best_step == min(step for step, score in dev.items() if score == max(dev.values()))
    from deltatune.delta.adapted import Adapted

    made = predict(Adapted(on, [trained.delta]), trained.delta, trained.delta.head, data.test, 64)
    right = [value == row["label"] for value, row in zip(made.values, data.test, strict=True)]
    assert sum(right) / len(right) == trained.metrics["test"]["accuracy"]
    assert made.values == trained.test.values


@pytest.mark.parametrize(("steps", "evaluations", "at"), [(12, 4, [3, 6, 9, 12]), (7, 3, [3, 6, 7]), (2, 6, [1, 2])])
def test_evaluations_stand_at_equal_distances_and_at_the_end(steps, evaluations, at):
    _, (job,) = engine_of([plan("lora", steps=steps, evaluations=evaluations)])
    found = []
    for step in range(1, steps + 1):
        job.step = step
        found += [step] * evaluates(job, steps)
    assert found == at


def test_the_curve_holds_the_mean_loss_since_the_last_point():
    engine, (job,) = engine_of([plan("lora", steps=6, evaluations=2)])
    losses = []
    train(engine, listener=lambda jobs, event: losses.append(copy.copy(jobs[0].losses)))
    assert [point.step for point in job.curve] == [3, 6]
    assert losses[1] and losses[2] == []
    assert len(losses[1]) == 2 and job.curve[0].loss != job.curve[1].loss
    assert job.curve[0].lr == pytest.approx(5e-3 * rate(2, 6, 0.06))
    engine.close()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"batch": 0}, "batch=0: expected 1 or more"),
        ({"tokens": -1}, "tokens=-1: expected 1 or more"),
        ({"steps": 0}, "steps=0: expected 1 or more"),
        ({"patience": 0}, "patience=0: expected 1 or more"),
        ({"lr": 0.0}, "lr=0.0: expected a number above 0"),
        ({"lr": float("nan")}, "lr=nan: expected a number above 0"),
        ({"clip": -1.0}, "clip=-1.0: expected a number above 0"),
        ({"epochs": 0}, "epochs=0: expected a number above 0"),
        ({"warmup": 1.5}, "warmup=1.5: expected a share"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: expected 0 or more"),
        ({"precision": "fp32"}, "unknown precision 'fp32'; nearest: float32"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        Settings(**wrong)


def test_steps_follow_from_epochs_unless_they_are_given():
    assert Settings(epochs=2.0, batch=8).total_steps(100) == 25
    assert Settings(epochs=0.01, batch=8).total_steps(100) == 1
    assert Settings(steps=7, epochs=2.0).total_steps(100) == 7
