"""Full tuning in a fit equals a plain torch loop over the backbone's own weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.fit.tiny import QUICK, backbone, furthest, jobs_of, plan, task

from deltatune.delta.adapted import Adapted
from deltatune.heads.base import collate
from deltatune.training.engine import Engine
from deltatune.training.settings import rate

STEPS = 20


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_it_equals_a_plain_loop_in_float64(family):
    settings = dataclasses.replace(QUICK, steps=STEPS, precision="auto", lr=1e-3, head_lr=2e-3)
    # A prefix and another full tuning beside it: each delta of weights runs by itself.
    plans = [
        plan("full", task(), 0, settings),
        plan("prefix(n=2)", task(), 0, settings),
        plan("full", task(), 1, settings),
    ]
    on = backbone(family, torch.float64)
    untouched = {name: value.clone() for name, value in on.module.state_dict().items()}
    jobs = jobs_of(plans, on)
    engine = Engine(jobs, on)
    for _ in range(STEPS):
        engine.step(jobs)
    engine.close()
    for name, value in on.module.state_dict().items():
        assert torch.equal(value, untouched[name])

    plain = backbone(family, torch.float64)
    (other,) = jobs_of(plans[:1], plain)
    weights = list(plain.trunk.parameters())
    optimiser = torch.optim.AdamW(
        [{"params": weights, "rate": 1e-3}, {"params": list(other.head.parameters()), "rate": 2e-3}], weight_decay=0.0
    )
    for step in range(STEPS):
        batch = collate(other.logical_batch(step), plain)
        loss = other.head.loss(plain.trunk(**batch.inputs).last_hidden_state, batch, plain)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*weights, *other.head.parameters()], 1.0)
        for group in optimiser.param_groups:
            group["lr"] = group["rate"] * rate(step, STEPS, 0.06)
        optimiser.step()

    with torch.no_grad():
        adapted = Adapted(on, [jobs[0].delta], verify=False)
        batch = collate(other.train[:8], on)
        tuned = adapted.encode(dict(batch.inputs), deltas=jobs[0].name)
        expected = plain.trunk(**batch.inputs).last_hidden_state
        bare = on.trunk(**batch.inputs).last_hidden_state
        tuned, expected, bare = (t[batch.inputs["attention_mask"].bool()] for t in (tuned, expected, bare))
    assert float((tuned - expected).abs().max()) < 1e-9 < 1e-3 < float((bare - expected).abs().max())
    assert furthest(jobs[0].head.state_dict(), other.head.state_dict()) < 1e-9
