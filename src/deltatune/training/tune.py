"""Tune: which delta should I take? Candidates in one bank, successive halving on dev, finalists over several seeds.

Source of the halving: Jamieson and Talwalkar 2016, Non-stochastic Best Arm Identification, arXiv:1502.07943. Candidates
are not restarted: the survivors of a rung go on from where they stand.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
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
from deltatune.errors import OutputError, SiteError, UserError
from deltatune.training import checkpoint
from deltatune.training.engine import Engine, Listener, train, working_copy
from deltatune.training.estimate import Estimate, estimate
from deltatune.training.fit import CHECKPOINT_EVERY, Trained, check_splits, finish
from deltatune.training.job import Job, Plan, Prepared, make_jobs
from deltatune.training.settings import Settings, resolve_precision

# Methods × sites, each at some multiples of its own default rate.
SPACE = (
    "lora",
    'lora(r=8, at="attn.{q,k,v,o} ffn.{up,down}")',
    "adapter",
    "parallel_adapter",
    "prefix",
    "bitfit",
    "ia3",
)
# Rates tried and seeds of the finalists, from plenty to little: the first that lets a finalist train for ENOUGH of the
# steps that are worth its time. A delta trained too briefly is worth less than an interval over seeds.
LADDER: tuple[tuple[tuple[float, ...], float], ...] = (
    ((0.3, 1.0, 3.0), 1.0),
    ((1.0, 3.0), 1.0),
    ((1.0,), 1.0),
    ((1.0,), 2 / 3),
    ((1.0,), 0.0),
)
ENOUGH = 0.5
BASELINE = "head"
ETA = 3  # a rung keeps one in ETA
RUNGS = 3
FINALISTS = 2
EPOCHS = 6.0  # the longest training that is worth its time on a small task; the budget may shorten it
MEASURED = 3  # steps of all candidates by which the cost of one is found
FEWEST = 30  # steps below which a choice on dev says nothing
SURE = 0.93  # share of the time that is left which training plans for: a machine is not always as fast as it was

State = Literal["chosen", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Budget:
    """Seconds of wall clock, or optimiser steps over all candidates (then the result is deterministic for a seed)."""

    seconds: float | None = None
    steps: int | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Parse `10m`, `90s`, `1h` or `2000steps`. UserError otherwise."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|min|h|steps?)\s*", text)
        if not match or float(match[1]) <= 0 or (match[2].startswith("step") and "." in match[1]):
            raise UserError(f"budget {text!r}: expected a time such as 10m, 90s or 1h, or steps such as 2000steps")
        number, unit = float(match[1]), match[2]
        if unit.startswith("step"):
            return cls(steps=int(number))
        return cls(seconds=number * {"s": 1, "m": 60, "min": 60, "h": 3600}[unit])


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
    backbone: Backbone, max_params: int | None = None, rates: Sequence[float] = LADDER[0][0]
) -> tuple[list[Candidate], list[str]]:
    """Return the candidates that fit the backbone and the limit, and what was left out with the reason."""
    found: list[Candidate] = []
    out: list[str] = []
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
        found += [Candidate(f"{text} lr={spec.lr * factor:.2g}", spec, spec.lr * factor, size) for factor in rates]
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
    found, left_out = candidates(backbone, max_params, LADDER[-1][0])
    working = working_copy(backbone, resolve_precision(settings.precision, backbone))
    whole = settings.steps or max(FEWEST, min(round(EPOCHS * len(task.train) / settings.batch), 800))
    place = folder / ".checkpoint" if folder else None
    prepared = Prepared()
    means = _settled(
        place, budget, partial(_means, found, task, settings, budget, started, backbone, working, prepared)
    )
    for rates, share in LADDER:
        found, _ = candidates(backbone, max_params, rates)
        paid = max(1, round(seeds * share))
        trainings = _trainings(len(found), paid)
        steps = min(whole, means.horizon(len(found), paid))
        if steps >= max(FEWEST, ENOUGH * whole):
            break
    horizon = max(FEWEST, int(steps))
    end = None if budget.seconds is None else started + budget.seconds - means.last(paid)
    settings = dataclasses.replace(settings, steps=horizon, evaluations=RUNGS)
    plans = [Plan(c.spec, task, seed, dataclasses.replace(settings, lr=c.lr), c.label) for c in found]
    plans.append(Plan(parse(BASELINE), task, seed, settings, BASELINE))
    jobs = make_jobs(plans, working, backbone, prepared)
    engine = Engine(jobs, working)
    identity = checkpoint.identity(plans, backbone) if place else ""
    guess: Estimate | None = None
    try:
        done = checkpoint.read(place / "rungs", jobs, identity) if place else None
        guess = _scaled(estimate(engine), trainings / len(jobs), budget)
        if announce:
            announce(guess)
        keep = _keeper(place / "rungs" if place else None, jobs, identity)
        if done is None or not done.get("finished"):
            now = time.monotonic()
            # What the search may run over by is the finalists' own.
            share = min(1.0, _search(len(found)) / trainings / SURE)
            _halve(jobs, engine, horizon, listener, keep, None if end is None else now + share * (end - now))
            if place:
                checkpoint.write(place / "rungs", jobs, identity, {"finished": True})
    finally:
        engine.close()
    finalists = _judge(found, jobs)
    best = [jobs[found.index(c)] for c in finalists]
    more = [
        Plan(j.plan.spec, task, s, j.plan.settings, j.plan.label)
        for j in [*best, jobs[-1]]
        for s in _others(seed, paid)
    ]
    fresh = make_jobs(more, working, backbone, prepared)
    trained = _finals(best, jobs[-1], fresh, working, backbone, place, listener, end)
    return _choose(found, finalists, trained, left_out, guess, time.monotonic() - started)


def _scaled(whole: Estimate, share: float, budget: Budget) -> Estimate:
    """Return the estimate of a search, which stops most candidates early, from that of training all to the end."""
    seconds = min(whole.seconds * share, budget.seconds or math.inf)
    return dataclasses.replace(whole, seconds=seconds, tokens=round(whole.tokens * share))


def _others(seed: int, seeds: int) -> range:
    return range(seed + 1, seed + seeds)


def _trainings(number: int, seeds: int) -> float:
    """Return what a search and the training of its finalists cost, in whole trainings."""
    # A finalist of another spec may have been stopped at the first rung; it is trained to the end.
    return _search(number) + (FINALISTS - 1) * (1 - _goal(1.0, 0)) + (FINALISTS + 1) * (seeds - 1)


def _looks(number: int, seeds: int) -> int:
    """Return how often dev is looked at during all trainings."""
    rungs = sum(_kept(number, r) + 1 for r in range(RUNGS))
    return rungs + (FINALISTS - 1) * (RUNGS - 1) + (FINALISTS + 1) * (seeds - 1) * RUNGS


def _search(number: int) -> float:
    """Return what the rungs of so many candidates and the baseline cost, in whole trainings."""
    return 1 + sum(_kept(number, r) * (_goal(1.0, r) - (_goal(1.0, r - 1) if r else 0.0)) for r in range(RUNGS))


def _kept(number: int, rung: int) -> int:
    """Return how many of `number` candidates train in a rung."""
    return min(number, max(FINALISTS, math.ceil(number / ETA**rung)))


@dataclass(frozen=True)
class Means:
    """What a search may spend: what is left of the budget, and what things cost, in seconds.

    `step`: an optimiser step of one training; `look`: dev rows looked at during a training; `score`: dev and test of
    one training at the end. For a budget of steps a step costs one, and looking nothing.
    """

    budget: float
    left: float
    step: float = 1.0
    look: float = 0.0
    score: float = 0.0

    def last(self, seeds: int) -> float:
        """Return what is kept for the end, when the finalists and the baseline are scored."""
        return (FINALISTS + 1) * seeds * self.score

    def horizon(self, number: int, seeds: int) -> float:
        """Return the steps of a whole training that there are means for, with so many candidates and seeds."""
        looks = _looks(number, seeds) * self.look
        return max(0.0, self.left - self.last(seeds) - looks) / self.step / _trainings(number, seeds)


def _settled(place: Path | None, budget: Budget, measure: Callable[[], Means]) -> Means:
    """Return the means of a budget, measured once: a search that is resumed goes on as it began.

    OutputError if it began with another budget.
    """
    if place is None or budget.seconds is None:
        return measure()
    file = place / "budget.json"
    if not file.is_file():
        means = measure()
        with checkpoint.whole_file(file) as work:
            work.write_text(json.dumps(dataclasses.asdict(means)))
        return means
    began = Means(**json.loads(file.read_text()))
    if began.budget != budget.seconds:
        raise OutputError(
            f"{place.parent} holds an unfinished search of {began.budget:g} s; finish that one with its own "
            f"--budget, or choose another --out"
        )
    return began


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
    """Measure what a step costs in a bank of all candidates, and what is left of the budget then."""
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
    return Means(budget.seconds, left, step, look, row * (len(task.dev) + len(task.test)))


def _goal(horizon: float, rung: int) -> float:
    return horizon * ETA ** (rung - RUNGS + 1)


def _halve(
    jobs: Sequence[Job],
    engine: Engine,
    horizon: int,
    listener: Listener | None,
    keep: Callable[[], None],
    deadline: float | None,
) -> None:
    """Run the rungs: all candidates to a ninth of the horizon, the best third to a third, the best ninth to its end."""
    rivals, baseline = list(jobs[:-1]), jobs[-1]
    for rung in range(RUNGS):
        goal = max(1, math.ceil(_goal(horizon, rung)))
        train(engine, lambda job, goal=goal: goal, listener=listener, checkpoint=keep, deadline=deadline)  # type: ignore[misc]
        if rung == RUNGS - 1:
            break
        going = [job for job in rivals if job.state in ("running", "waiting")]
        kept = _kept(len(rivals), rung + 1)
        going.sort(key=lambda job: (-(job.curve[-1].dev or 0.0) if job.curve else 0.0, jobs.index(job)))
        for job in going[kept:]:
            job.state = "stopped"
    for job in (*rivals, baseline):
        if job.state == "running":
            job.state = "done"


def _keeper(place: Path | None, jobs: Sequence[Job], identity: str) -> Callable[[], None]:
    last = time.monotonic()

    def keep() -> None:
        nonlocal last
        if place and time.monotonic() - last >= CHECKPOINT_EVERY:
            checkpoint.write(place, jobs, identity)
            last = time.monotonic()

    return keep


def _judge(found: Sequence[Candidate], jobs: Sequence[Job]) -> list[Candidate]:
    """Write down how far each candidate came and return the finalists, best first."""
    for candidate, job in zip(found, jobs, strict=False):
        candidate.steps, candidate.dev = job.step, job.best_dev
        candidate.rung = sum(job.step >= math.ceil(_goal(job.steps, r)) for r in range(RUNGS))
        candidate.state = {"nan": "failed", "done": "finished"}.get(job.state, "stopped")  # type: ignore[assignment]
    able = [c for c in found if c.state != "failed" and c.dev is not None]
    if not able:
        raise UserError("every candidate diverged; try a lower rate with --lr, or --precision float32")
    able.sort(key=lambda c: (-c.rung, -(c.dev or 0.0), c.trainable))
    finalists = able[:1]
    # The second is of another spec where there is one: two rates of one method answer no question.
    for candidate in able[1:]:
        if len(finalists) < FINALISTS and candidate.spec != finalists[0].spec:
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
        keep = _keeper(place / "finals" if place else None, jobs, identity)
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
