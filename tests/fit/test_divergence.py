"""A training that diverges ends alone: its neighbours end as if it had not been there."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from tests.fit.running import run
from tests.fit.tiny import QUICK, backbone, furthest, jobs_of, plan, task, tensors

from deltatune.studies.result import build_result
from deltatune.studies.table import summary_table
from deltatune.training.engine import Engine, train
from deltatune.training.fit import fit_plans

SETTINGS = dataclasses.replace(QUICK, steps=15, precision="auto")
GOOD = [
    plan("lora", task(), 1, SETTINGS),
    plan("adapter", task(), 2, SETTINGS),
    plan("prefix(n=2)", task(), 3, SETTINGS),
]


def spoil_weights(job):
    with torch.no_grad():
        next(job.delta.layers.parameters()).view(-1)[0] = math.nan


def spoil_head(job):
    with torch.no_grad():
        job.head.linear.weight[0, 0] = math.inf


def spoil_gradients(job):
    list(job.delta.layers.parameters())[-1].register_hook(lambda gradient: gradient * math.nan)


@pytest.mark.parametrize("spoil", [spoil_weights, spoil_head, spoil_gradients])
@pytest.mark.parametrize("method", ["lora", "prefix(n=2)", "prompt(n=2)", "full"])
def test_a_fault_in_one_leaves_the_others_as_they_are_without_it(method, spoil):
    # Two of one method stand in one batched product with the bad one, where a sum over deltas would spread the fault.
    bad = plan(method, task(), 9, SETTINGS, lr=1e-3)
    beside = [*GOOD, plan(method, task(), 10, SETTINGS, lr=1e-3)]
    on = backbone(dtype=torch.float64)
    jobs = jobs_of([beside[0], bad, *beside[1:]], on)
    spoil(jobs[1])
    before = tensors(jobs[1])
    engine = Engine(jobs, on)
    train(engine)
    engine.close()
    assert jobs[1].state == "nan" and jobs[1].step == 0
    after = tensors(jobs[1])
    assert all(torch.equal(before[name].nan_to_num(7), after[name].nan_to_num(7)) for name in before)  # no step
    without, _ = run(beside, steps=15)
    for job in (jobs[0], *jobs[2:]):
        assert job.state == "done"
        assert furthest(tensors(job), without[job.name].tensors) < 1e-9


def test_a_rate_far_too_high_ends_the_training_and_the_result_says_so():
    on, data = backbone(), task()
    settings = dataclasses.replace(QUICK, evaluations=6)
    wild = plan("lora", data, 0, settings, lr=1e30, head_lr=1e30, clip=1e30)
    trained = fit_plans(on, [wild, plan("adapter", data, 0, settings)])
    assert [t.state for t in trained] == ["nan", "done"] and trained[0].steps < trained[1].steps == 12
    assert trained[0].metrics == {} and math.isnan(trained[0].dev_score)
    result = build_result(on, data, trained, command="")
    json.dumps(result, allow_nan=False)
    assert result["chosen"] == "adapter" and [run["state"] for run in result["runs"]] == ["nan", "done"]
    rows = {row["delta"]: row for row in result["summary"]}
    assert rows["lora"]["dev"] == {"mean": None, "low": None, "high": None}
    assert "Diverged: lora (seed 0)" in str(summary_table(result).caption)


def test_nothing_is_chosen_where_all_diverge():
    on, data = backbone(), task()
    wild = plan("lora", data, 0, lr=1e30, head_lr=1e30, clip=1e30, evaluations=1)
    result = build_result(on, data, fit_plans(on, [wild]), command="")
    json.dumps(result, allow_nan=False)
    assert result["chosen"] is None and result["examples"] == []
    assert result["sentence"].startswith("No delta was fitted on classification: every training diverged")


def test_a_training_that_diverges_late_keeps_what_was_best_before():
    on, data = backbone(), task()
    late = plan("lora", data, 0, steps=12, evaluations=6)
    jobs = jobs_of([late, plan("adapter", data, 0)], on)
    engine = Engine(jobs, on)
    kept = {}

    def spoil(_, event):
        if event == "evaluated" and jobs[0].step == 6 and not kept:
            kept.update(tensors(jobs[0]) if jobs[0].best_step == 6 else jobs[0].best)
            spoil_weights(jobs[0])

    train(engine, listener=spoil)
    assert (jobs[0].state, jobs[0].step) == ("nan", 6)
    from deltatune.training.fit import finish

    trained = finish(engine, jobs, open_test=True)
    engine.close()
    assert furthest(trained[0].delta.state_dict(), kept) == 0
    assert trained[0].dev_score == max(point.dev for point in trained[0].curve)
    result = build_result(on, data, trained, command="")
    json.dumps(result, allow_nan=False)
    assert result["runs"][0]["state"] == "nan" and result["runs"][0]["metrics"]["test"] is not None
