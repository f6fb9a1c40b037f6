"""The loop: one training or many, in one pass over one backbone.

Every job draws its logical batches by itself; the engine packs those of a step into physical batches, runs the backbone
once for each, and hands every job its own loss, clip, schedule and optimiser step. So what a job learns does not depend
on who else is in the batch.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from deltatune.backbone.load import Backbone
from deltatune.delta.adapted import Adapted
from deltatune.delta.call import Call, Draw, Segment
from deltatune.delta.plan import packs
from deltatune.errors import SiteError
from deltatune.heads.base import Batch, collate
from deltatune.training.evaluate import evaluate
from deltatune.training.job import Job, Point, batch_of, prompt_tokens

ROWS = "rows"  # what the jobs have in common that cannot do without padding
DECODED = "decoded"  # those whose heads read a decoder's hidden states
Listener = Callable[[Sequence[Job], str], None]


class Engine:
    """A working backbone with the deltas of all jobs attached."""

    def __init__(self, jobs: Sequence[Job], backbone: Backbone) -> None:
        self.jobs, self.backbone = list(jobs), backbone
        for job in jobs:
            if any(site.name == "lm_head" for site in job.delta.sites.values()):
                raise SiteError(
                    "a delta at lm_head cannot be fitted: the head reads hidden states; leave that site out"
                )
        backbone.module.eval()
        # The fingerprint is the original's; the working copy may be in another dtype, which is no news to anyone.
        self.adapted = Adapted(backbone, [job.delta for job in jobs], verify=False)
        self.adapted.bank.train()
        self.packs = self.adapted.packs
        # Seconds spent in steps, and in looks at dev of one job each.
        self.stepping, self.looking, self.looks = 0.0, 0.0, 0
        self._set_rank()

    def _set_rank(self) -> None:
        """Order the jobs so that those whose layers run as one batch stand together."""
        kinds: dict[tuple[object, ...], int] = {}
        rank: dict[str, tuple[int, int]] = {}
        for number, job in enumerate(self.jobs):
            kind = (_separate(job), *(layer.kind() for _, layer in job.delta.at_sites()))
            rank[job.name] = (kinds.setdefault(kind, len(kinds)), number)
        self.rank = rank

    def close(self) -> None:
        """Take the deltas off the working backbone."""
        self.adapted.remove()

    def step(self, jobs: Sequence[Job]) -> None:
        """Do one optimiser step of each job."""
        batches = {job.name: batch_of(job, self.backbone) for job in jobs}
        for group in self._pack(jobs, batches):
            started = time.perf_counter()
            self._backward(group, [batches[job.name] for job in group])
            for job in group:
                self._update(job)
            spent = time.perf_counter() - started
            self.stepping += spent
            sizes = [batches[job.name].size for job in group]
            for job, size in zip(group, sizes, strict=True):
                job.tokens += size
                job.seconds += spent * size / sum(sizes)

    def groups(self, jobs: Sequence[Job]) -> list[list[Job]]:
        """Return the physical batches that the next step of these jobs runs in."""
        return self._pack(jobs, {job.name: batch_of(job, self.backbone) for job in jobs})

    def _pack(self, jobs: Sequence[Job], batches: dict[str, Batch]) -> list[list[Job]]:
        """Group jobs into physical batches of at most so many tokens: like with like, weight layers alone.

        Where padding is left out, jobs stand by kind and their own tokens count; elsewhere those of like length stand
        together, since each row is padded to the longest of its batch.
        """
        groups: list[list[Job]] = []
        size = rows = prompt = 0
        most = self.backbone.positions or math.inf

        def place(job: Job) -> tuple[object, ...]:
            apart = _separate(job)
            length = 0 if self._packed(apart) else batches[job.name].length
            return apart, length, self.rank[job.name]

        for job in sorted(jobs, key=place):
            batch, apart = batches[job.name], _separate(job)
            added = max(prompt, prompt_tokens(job.plan.spec))
            rows += len(batch.sequences)
            # Of all so far this batch is the longest, or its own tokens count.
            size = size + batch.tokens if self._packed(apart) else rows * batch.length
            if (
                not groups
                or _separate(groups[-1][0]) != apart
                or size > job.plan.settings.tokens
                or batch.length + added > most
            ):
                groups.append([])
                rows, added = len(batch.sequences), prompt_tokens(job.plan.spec)
                size = batch.tokens if self._packed(apart) else rows * batch.length
            groups[-1].append(job)
            prompt = added
        return [sorted(group, key=lambda job: self.rank[job.name]) for group in groups]

    def _packed(self, apart: str) -> bool:
        return self.packs and apart not in (ROWS, DECODED)

    def _backward(self, jobs: Sequence[Job], batches: Sequence[Batch]) -> None:
        total: Tensor | None = None
        for job, loss in zip(jobs, self.losses(jobs, batches), strict=True):
            value = float(loss.detach())
            if not math.isfinite(value):
                job.state = "nan"
                continue
            job.losses.append(value)
            total = loss if total is None else total + loss
        if total is not None and total.requires_grad:
            total.backward()

    def losses(self, jobs: Sequence[Job], batches: Sequence[Batch]) -> list[Tensor]:
        """Return the loss of each job on its own batch, from one run of the backbone."""
        self.refer(jobs, batches)
        call = self.call(jobs, batches)
        parts = self._hidden(batches, call)
        with self.adapted.weights_of(call):
            return [
                job.head.loss(part, batch, self.backbone) for job, batch, part in zip(jobs, batches, parts, strict=True)
            ]

    def refer(self, jobs: Sequence[Job], batches: Sequence[Batch]) -> None:
        """Give batches what their heads compare with, from the backbone alone where a text is new."""
        self.jobs[0].references.give(self.adapted, [job.head for job in jobs], batches)

    def _hidden(self, batches: Sequence[Batch], call: Call) -> list[Tensor]:
        """Run batches as one, and return the hidden states of each [texts, tokens, width]."""
        length = max(batch.length for batch in batches)
        together = collate([e for batch in batches for e in batch.examples], self.backbone, length)
        if "decoder_input_ids" in together.inputs:
            hidden = self.adapted.decode(together.inputs, call=call)
        else:
            hidden = self.adapted.encode(together.inputs, call=call)
        parts = hidden.split([len(batch.sequences) for batch in batches])
        # At the batch's own padded length, as when it is alone.
        return [part[:, : batch.positions] for part, batch in zip(parts, batches, strict=True)]

    def call(self, jobs: Sequence[Job], batches: Sequence[Batch]) -> Call:
        """Make the call of a physical batch, with the keys of each job's dropout."""
        segments = tuple(
            Segment(job.name if len(job.delta.layers) else None, len(batch.sequences))
            for job, batch in zip(jobs, batches, strict=True)
        )
        draws = tuple(Draw(job.plan.seed, job.step, batch.length) for job, batch in zip(jobs, batches, strict=True))
        return self.adapted.routed(segments, draws=draws)

    def _update(self, job: Job) -> None:
        if job.state == "nan":
            job.optimiser.zero_grad()
            return
        job.state = "running"
        norm = nn.utils.clip_grad_norm_([p for p in job.parameters() if p.grad is not None], job.plan.settings.clip)
        if not math.isfinite(float(norm)):
            job.state = "nan"
        else:
            job.set_rate()
            job.optimiser.step()
            job.step += 1
        job.optimiser.zero_grad()

    def evaluate(self, jobs: Sequence[Job]) -> None:
        """Score jobs on dev, keep the best tensors, and log a point of each curve."""
        live = [job for job in jobs if job.state != "nan"]
        started = time.perf_counter()
        scores = evaluate(self.adapted, live, "dev")
        spent = (time.perf_counter() - started) / max(1, len(live))
        self.looking, self.looks = self.looking + spent * len(live), self.looks + len(live)
        for job, score in zip(live, scores, strict=True):
            losses = job.losses or [math.nan]
            lr = job.optimiser.param_groups[0]["lr"]
            job.curve.append(Point(job.step, sum(losses) / len(losses), score, lr))
            job.losses = []
            job.seconds += spent
            job.record_best(score)


def _separate(job: Job) -> str:
    """Jobs with the same answer may share a physical batch: those that change weights share none."""
    ports = {layer.port for _, layer in job.delta.at_sites()}
    if "weight" in ports:
        return job.delta.name
    if job.head.decodes:
        return DECODED
    if not ports:
        return "frozen"
    return "" if packs(job.delta, training=True) else ROWS


def train(
    engine: Engine,
    until: Callable[[Job], int] | None = None,
    *,
    listener: Listener | None = None,
    checkpoint: Callable[[], None] | None = None,
    deadline: float | None = None,
) -> None:
    """Train all active jobs to their last step, or to `until(job)`, or to the deadline (time.monotonic seconds).

    Jobs are evaluated at equal distances, the last time at their end. `listener(jobs, event)` hears of every step and
    evaluation; `checkpoint()` is called after each evaluation.
    """

    def goal(job: Job) -> int:
        return min(job.steps, until(job)) if until else job.steps

    while True:
        jobs = [job for job in engine.jobs if job.active and job.step < goal(job)]
        if not jobs or (deadline is not None and time.monotonic() >= deadline):
            return
        engine.step(jobs)
        due = [job for job in jobs if job.state != "nan" and evaluates(job, goal(job))]
        if due:
            engine.evaluate(due)
        for job in jobs:
            if job.state == "running" and job.step >= job.steps:
                job.state = "done"
        if listener:
            listener(engine.jobs, "evaluated" if due else "step")
        if due and checkpoint:
            checkpoint()


def evaluates(job: Job, goal: int) -> bool:
    """Say whether the job has just reached one of its evaluations."""
    every = -(-job.steps // job.plan.settings.evaluations)
    return job.step in (goal, job.steps) or job.step % every == 0


def working_copy(origin: Backbone, dtype: torch.dtype) -> Backbone:
    """Return the backbone that computes: the original itself, or a copy in another dtype."""
    if origin.dtype == dtype:
        return origin
    return Backbone(copy.deepcopy(origin.module).to(dtype), origin.processor, origin.name)
