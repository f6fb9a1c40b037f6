"""What a fit will cost, before its first step: memory from sizes, time from one measured step."""

from __future__ import annotations

import time
from dataclasses import dataclass

from deltatune.training.engine import Engine
from deltatune.training.job import Job, batch_of


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds that a fit is expected to take; tokens of training; parameters trained."""

    memory: int
    seconds: float
    tokens: int
    parameters: int

    def __str__(self) -> str:
        minutes = f"{self.seconds / 60:.1f} min" if self.seconds >= 90 else f"{self.seconds:.0f} s"
        return (
            f"about {self.memory / 2**30:.1f} GiB and {minutes}: "
            f"{self.tokens / 1e6:.2f} M tokens, {self.parameters:,} parameters"
        )


def estimate(engine: Engine) -> Estimate:
    """Measure one step of all jobs without an update, and scale it to the whole fit."""
    jobs = [job for job in engine.jobs if job.active]
    spent, seen = 0.0, 0
    for group in engine.groups(jobs):
        batches = [batch_of(job, engine.backbone) for job in group]
        engine.refer(group, batches)  # once a text, and not at every step
        started = time.perf_counter()
        seen += sum(b.size for b in batches)
        losses = engine.losses(group, batches)
        if any(loss.requires_grad for loss in losses):
            sum(losses[1:], losses[0]).backward()
        for job in group:
            job.optimiser.zero_grad()
        spent += time.perf_counter() - started
    tokens = sum(_tokens(job) for job in jobs)
    checked = sum(
        job.plan.settings.evaluations * min(len(job.plan.task.dev), job.plan.settings.dev_rows)
        + len(job.plan.task.test)
        for job in jobs
    ) * (seen / max(1, sum(job.plan.settings.batch for job in jobs)))
    # A forward pass is about a third of a step.
    seconds = (tokens + checked / 3) * spent / max(1, seen)
    return Estimate(_memory(engine), seconds, tokens, sum(p.numel() for job in jobs for p in job.parameters()))


def _tokens(job: Job) -> int:
    """Tokens of all batches that are left, padding included, as the engine counts them."""
    batches = map(job.logical_batch, range(job.step, job.steps))
    return sum(sum(len(e.sequences) for e in batch) * max(e.longest for e in batch) for batch in batches)


def _memory(engine: Engine) -> int:
    """Weights; five copies of what is trained (value, gradient, two moments, best); one batch's activations."""
    backbone, jobs = engine.backbone, engine.jobs
    size = backbone.dtype.itemsize
    # Beside a copy of less precision stands the original.
    weights = backbone.parameters * (size if size >= 4 else size + 4)
    trained = sum(p.numel() for job in jobs for p in job.parameters())
    sites = backbone.anatomy.sites
    kept = sum(s.d_in + s.d_out for s in sites if s.name.startswith(("attn.", "cross.", "ffn.", "norm.")))
    heads = sum(s.heads.number for s in sites if s.heads)
    longest = max((e.longest for job in jobs for e in job.train), default=1)
    batches = [
        job.plan.settings.batch
        * sum(e.tokens if engine.packs else len(e.sequences) * longest for e in job.train) / len(job.train)
        for job in jobs
    ]  # fmt: skip
    tokens = max(*batches, min(sum(batches), max(job.plan.settings.tokens for job in jobs)))
    return int(weights + trained * 4 * 5 + tokens * (kept + 3 * heads * longest) * size)
