"""Step jobs by hand and write down what they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tests.fit.tiny import backbone, jobs_of, tensors

from deltatune.training.engine import Engine
from deltatune.training.job import Plan


@dataclass
class Ran:
    """One job after some steps: the loss of each, its tensors, how it ended; and in how many groups all ran."""

    losses: list[float]
    tensors: dict[str, torch.Tensor]
    state: str
    steps: int


def run(
    plans: Sequence[Plan], dtype: torch.dtype = torch.float64, *, family: str = "bert", steps: int = 50
) -> tuple[dict[str, Ran], list[int]]:
    """Train plans together for at most `steps` steps; return each by name, and the groups that every step ran in."""
    on = backbone(family, dtype)
    jobs = jobs_of(plans, on)
    losses: dict[str, list[float]] = {job.name: [] for job in jobs}
    groups: list[int] = []
    engine = Engine(jobs, on)
    try:
        for _ in range(steps):
            active = [job for job in jobs if job.active]
            if not active:
                break
            groups.append(len(engine.groups(active)))
            engine.step(active)
            for job in active:
                losses[job.name] += job.losses
                job.losses = []
    finally:
        engine.close()
    return {job.name: Ran(losses[job.name], tensors(job), job.state, job.step) for job in jobs}, groups


def alone(plan: Plan, dtype: torch.dtype = torch.float64, *, family: str = "bert", steps: int = 50) -> Ran:
    """Train one plan by itself."""
    return run([plan], dtype, family=family, steps=steps)[0][plan.name]
