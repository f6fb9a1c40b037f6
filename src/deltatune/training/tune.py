"""Tune: which delta should I take? Candidates in one bank, successive halving on dev, finalists over several seeds.

Source of the halving: Jamieson and Talwalkar 2016, Non-stochastic Best Arm Identification, arXiv:1502.07943. Candidates
are not restarted: the survivors of a rung go on from where they stand.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from deltatune.backbone.load import Backbone
from deltatune.compose.expression import parse
from deltatune.data.task import Task
from deltatune.delta.delta import Delta
from deltatune.delta.method import Spec
from deltatune.errors import SiteError, UserError
from deltatune.training import checkpoint
from deltatune.training.budget import ENOUGH, FEWEST, LADDER, RUNGS, SURE, Budget, Effort, Means, Shape, goal, settled
from deltatune.training.engine import Engine, Listener, train, working_copy
from deltatune.training.estimate import Estimate, estimate
from deltatune.training.fit import Trained, check_splits, finish
from deltatune.training.job import Job, Plan, Prepared, make_jobs
from deltatune.training.settings import Settings, resolve_precision

# Methods × sites, each at some multiples of its own default rate; those that did best at equal cost come first
# (docs/learning_rates.tsv), for a budget that cannot try them all.
SPACE = (
    "adapter",
    'lora(r=8, at="attn.{q,k,v,o} ffn.{up,down}")',
    "parallel_adapter",
    "lora",
    "ia3",
    "bitfit",
    "prefix",
)
BASELINE = "head"
EPOCHS = 6.0  # the longest training that is worth its time on a small task; the budget may shorten it
SURER = 0.95  # as SURE, when much has been measured
MEASURED = 2  # steps of the first candidates by which the cost of one is found

State = Literal["chosen", "finished", "stopped", "failed"]


@dataclass
class Candidate:
    """One candidate and how far it came."""

    label: str
    spec: Spec
    lr: float
    trainable: int
    rung: int = 0
    steps: int = 0
    dev: float | None = None
    state: State = "stopped"


@dataclass
class Tuned:
    """The outcome: all candidates, the finalists and the head-only baseline over their seeds, and which was chosen."""

    candidates: list[Candidate]
    trained: list[Trained]
    chosen: str
    second: str | None
    seconds: float = 0.0
    estimate: Estimate | None = None
    left_out: list[str] = field(default_factory=list)


def candidates(
    backbone: Backbone, max_params: int | None = None, effort: Effort = LADDER[0]
) -> tuple[list[Candidate], list[str]]:
    """Return the candidates that fit the backbone and the limit, and what was left out with the reason."""
    found: list[Candidate] = []
    out: list[str] = []
    fitting = 0
    for text in SPACE:
        spec = parse(text)
        try:
            size = Delta.build(spec, backbone).trainable()
        except SiteError as error:
            out.append(f"{text}: {error}")
            continue
        if max_params is not None and size > max_params:
            out.append(f"{text}: {size:,} parameters, more than {max_params:,}")
            continue
        fitting += 1
        if fitting > effort.specs:
            out.append(f"{text}: the budget does not pay for it")
            continue
        rates = [spec.lr * factor for factor in effort.rates]
        found += [Candidate(f"{text} lr={rate:.2g}", spec, rate, size) for rate in rates]
    if not found:
        limit = "" if max_params is None else f" within --max-params {max_params:,}"
        raise UserError(f"no candidate fits {backbone.name}{limit}: {'; '.join(out)}")
    return found, out


def tune(
    backbone: Backbone,
    task: Task,
    budget: Budget,
    *,
    settings: Settings | None = None,
    max_params: int | None = None,
    seeds: int = 3,
    seed: int = 0,
    folder: Path | None = None,
    listener: Listener | None = None,
    announce: Callable[[Estimate], None] | None = None,
) -> Tuned:
    """Find the delta to take for a task.

    All candidates train together from one seed; after each rung the best third on dev goes on. The best two and the
    head-only baseline are then trained from the other seeds (of `seeds`, as many as the budget pays for), the choice is
    made on the mean dev score, and the test split is opened once. With a folder a stopped run is resumed.
    """
    started = time.monotonic()
    check_splits([task])
    settings = settings or Settings()
    working = working_copy(backbone, resolve_precision(settings.precision, backbone))
    whole = settings.steps or max(FEWEST, min(round(EPOCHS * len(task.train) / settings.batch), 800))
    place = folder / ".checkpoint" if folder else None
    prepared, rows = Prepared(), min(len(task.dev), settings.dev_rows)
    first, _ = candidates(backbone, max_params, LADDER[-1])
    means = settled(place, budget, partial(_means, first, task, settings, budget, started, backbone, working, prepared))
    for effort in LADDER:
        found, left_out = candidates(backbone, max_params, effort)
        shape = Shape(len(found), max(1, round(seeds * effort.seeds)), effort.finalists, means.baseline)
        steps = min(whole, means.horizon(shape, rows))
        if steps >= max(FEWEST, ENOUGH * whole):
            break
    horizon = max(FEWEST, int(steps))
    end = None if budget.seconds is None else started + budget.seconds - means.last(shape)
    settings = dataclasses.replace(settings, steps=horizon, evaluations=RUNGS, dev_rows=means.rows(shape, rows))
    plans = [Plan(c.spec, task, seed, dataclasses.replace(settings, lr=c.lr), c.label) for c in found]
    plans.append(Plan(parse(BASELINE), task, seed, settings, BASELINE))
    jobs = make_jobs(plans, working, backbone, prepared)
    engine = Engine(jobs, working)
    identity = checkpoint.identity(plans, backbone) if place else ""
    guess: Estimate | None = None
    try:
        done = checkpoint.read(place / "rungs", jobs, identity) if place else None
        guess = _scaled(estimate(engine), shape.trainings / len(jobs), budget)
        if announce:
            announce(guess)
        keep = checkpoint.keeper(place / "rungs" if place else None, jobs, identity)
        if done is None or not done.get("finished"):
            _halve(jobs, engine, horizon, whole, shape, listener, keep, end)
            if place:
                checkpoint.write(place / "rungs", jobs, identity, {"finished": True})
    finally:
        engine.close()
    finalists = _judge(found, jobs, shape.finalists)
    best = [jobs[found.index(c)] for c in finalists]
    more = [
        Plan(j.plan.spec, task, s, j.plan.settings, j.plan.label)
        for j in [*best, jobs[-1]]
        for s in _others(seed, shape.seeds)
    ]
    fresh = make_jobs(more, working, backbone, prepared)
    for job in fresh:
        job.steps = best[0].steps if job.steps == horizon else job.steps
    trained = _finals(best, jobs[-1], fresh, working, backbone, place, listener, end)
    return _choose(found, finalists, trained, left_out, guess, time.monotonic() - started)


def _scaled(whole: Estimate, share: float, budget: Budget) -> Estimate:
    """Return the estimate of a search, which stops most candidates early, from that of training all to the end."""
    seconds = min(whole.seconds * share, budget.seconds or math.inf)
    return dataclasses.replace(whole, seconds=seconds, tokens=round(whole.tokens * share))


def _others(seed: int, seeds: int) -> range:
    return range(seed + 1, seed + seeds)


def _means(
    found: Sequence[Candidate],
    task: Task,
    settings: Settings,
    budget: Budget,
    started: float,
    backbone: Backbone,
    working: Backbone,
    prepared: Prepared,
) -> Means:
    """Measure what a step costs in a bank of the first candidates, and what is left of the budget then."""
    if budget.seconds is None:
        return Means(float(budget.steps or 0), float(budget.steps or 0))
    short = dataclasses.replace(settings, steps=1 + MEASURED, evaluations=1, dev_rows=1)
    plans = [Plan(c.spec, task, 0, dataclasses.replace(short, lr=c.lr), c.label) for c in found]
    engine = Engine(make_jobs(plans, working, backbone, prepared), working)
    try:
        engine.step(engine.jobs)
        began = time.perf_counter()
        for _ in range(MEASURED):
            engine.step(engine.jobs)
        step = (time.perf_counter() - began) / len(plans) / MEASURED
    finally:
        engine.close()
    row = step / settings.batch / 3  # a row forward costs a third of a row trained
    left = SURE * (budget.seconds - (time.monotonic() - started))
    look = row * min(len(task.dev), settings.dev_rows)
    # The baseline's step has no backward pass through the backbone.
    return Means(budget.seconds, left, step, look, row * (len(task.dev) + len(task.test)), 1 / 3)


def _halve(
    jobs: Sequence[Job],
    engine: Engine,
    horizon: int,
    whole: int,
    shape: Shape,
    listener: Listener | None,
    keep: Callable[[], None],
    end: float | None,
) -> None:
    """Run the rungs: all candidates to a ninth of the horizon, the best third to a third, the best ninth to its end.

    With an `end` (time.monotonic seconds) the last rung is as long as there is time for, up to `whole` steps.
    """
    rivals, baseline = list(jobs[:-1]), jobs[-1]
    before, deadline = _work(jobs, shape), None
    for rung in range(RUNGS):
        if end is not None:
            now = time.monotonic()
            # What the search may run over by is the finalists' own.
            deadline = now + min(1.0, shape.search / shape.trainings / SURE) * (end - now)
            done = _work(jobs, shape) - before
            if rung == RUNGS - 1 and done and engine.looks:
                looks = 2 * sum(job.active for job in jobs) + (shape.finalists + 1) * (shape.seeds - 1) * RUNGS
                left = SURER * (end - now) - looks * engine.looking / engine.looks
                longer = _stretched(jobs, shape, left / engine.stepping * done, whole)
                for job in jobs:
                    job.steps = longer if job.steps == horizon else job.steps
        last = rung == RUNGS - 1
        until = None if last else partial(_up_to, max(1, math.ceil(goal(horizon, rung))))
        train(engine, until, listener=listener, checkpoint=keep, deadline=deadline)
        if last:
            break
        going = [job for job in rivals if job.state in ("running", "waiting")]
        going.sort(key=lambda job: (-(job.curve[-1].dev or 0.0) if job.curve else 0.0, jobs.index(job)))
        for job in going[shape.kept(rung + 1) :]:
            job.state = "stopped"
    for job in (*rivals, baseline):
        if job.state == "running":
            job.state = "done"


def _up_to(step: int, job: Job) -> int:
    return step


def _work(jobs: Sequence[Job], shape: Shape) -> float:
    """Return what has been done so far, in steps of a candidate."""
    return sum(job.step for job in jobs[:-1]) + shape.baseline * jobs[-1].step


def _stretched(jobs: Sequence[Job], shape: Shape, left: float, whole: int) -> int:
    """Return the steps of a whole training for which so much work is left, in steps of a candidate."""
    rivals, baseline = [job for job in jobs[:-1] if job.active], jobs[-1]
    share = shape.baseline * baseline.active
    trainings = len(rivals) + share + shape.others
    done = sum(job.step for job in rivals) + share * baseline.step
    if not trainings:
        return jobs[0].steps
    return max(min(whole, int((left + done) / trainings)), *(job.step + 1 for job in jobs))


def _judge(found: Sequence[Candidate], jobs: Sequence[Job], number: int) -> list[Candidate]:
    """Write down how far each candidate came and return so many finalists, best first."""
    for candidate, job in zip(found, jobs, strict=False):
        candidate.steps, candidate.dev = job.step, job.best_dev
        horizon = job.plan.settings.steps or job.steps
        candidate.rung = sum(job.step >= math.ceil(goal(horizon, r)) for r in range(RUNGS - 1)) + (
            job.step >= job.steps
        )
        candidate.state = {"nan": "failed", "done": "finished"}.get(job.state, "stopped")  # type: ignore[assignment]
    able = [c for c in found if c.state != "failed" and c.dev is not None]
    if not able:
        raise UserError("every candidate diverged; try a lower rate with --lr, or --precision float32")
    able.sort(key=lambda c: (-c.rung, -(c.dev or 0.0), c.trainable))
    finalists = able[:1]
    # The second is of another spec where there is one: two rates of one method answer no question.
    for candidate in able[1:]:
        if len(finalists) < number and candidate.spec != finalists[0].spec:
            finalists.append(candidate)
    return finalists


def _finals(
    best: Sequence[Job],
    baseline: Job,
    fresh: Sequence[Job],
    working: Backbone,
    backbone: Backbone,
    place: Path | None,
    listener: Listener | None,
    end: float | None,
) -> list[Trained]:
    """Train the finalists and the baseline from the other seeds, then score all of them, test once."""
    # A finalist that the halving stopped short is finished together with the others.
    for job in (*best, baseline):
        if job.state in ("done", "stopped") and job.step < job.steps:
            job.state = "running"
    jobs = [*best, baseline, *fresh]
    engine = Engine(jobs, working)
    identity = checkpoint.identity([job.plan for job in jobs], backbone) if place else ""
    try:
        if place:
            checkpoint.read(place / "finals", jobs, identity)
        keep = checkpoint.keeper(place / "finals" if place else None, jobs, identity)
        train(engine, listener=listener, checkpoint=keep, deadline=end)
        unseen = [job for job in jobs if job.state in ("running", "waiting") and job.step]
        if unseen:
            engine.evaluate(unseen)
        for job in unseen:
            job.state = "done"
        if place:
            checkpoint.write(place / "finals", jobs, identity)
        return finish(engine, [job for job in jobs if job.step], open_test=True)
    finally:
        engine.close()


def _choose(
    found: list[Candidate],
    finalists: Sequence[Candidate],
    trained: list[Trained],
    left_out: list[str],
    guess: Estimate | None,
    seconds: float,
) -> Tuned:
    def mean_dev(label: str) -> float:
        scores = [t.dev_score for t in trained if t.plan.label == label and math.isfinite(t.dev_score)]
        return sum(scores) / len(scores) if scores else -math.inf

    order = sorted(finalists, key=lambda c: (-mean_dev(c.label), c.trainable))
    order[0].state = "chosen"
    for candidate in order[1:]:
        candidate.state = "finished"
    second = order[1].label if len(order) > 1 else None
    return Tuned(found, trained, order[0].label, second, seconds, guess, left_out)
