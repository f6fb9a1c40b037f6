"""Fit deltas to tasks: the whole of it, from plans to trained deltas."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltatune import __version__
from deltatune.backbone.load import Backbone
from deltatune.data.metrics import constant, majority, references, score
from deltatune.data.task import Task
from deltatune.delta.delta import Delta
from deltatune.delta.head import Head
from deltatune.errors import UserError
from deltatune.training import checkpoint
from deltatune.training.engine import Engine, Listener, train, working_copy
from deltatune.training.estimate import Estimate, estimate
from deltatune.training.evaluate import Predictions, in_groups, predict_many, task_rows
from deltatune.training.job import Job, Plan, Point, make_jobs
from deltatune.training.settings import resolve_precision


@dataclass
class Trained:
    """One finished training: the delta with its best tensors and its head, its scores, and what it cost."""

    plan: Plan
    delta: Delta
    metrics: dict[str, dict[str, float]]
    curve: list[Point]
    state: str
    steps: int
    seconds: float
    tokens: int
    best_step: int
    test: Predictions | None = None
    dev: Predictions | None = None

    @property
    def dev_score(self) -> float:
        """Score on dev under the task's metric; NaN if the training diverged."""
        return self.metrics.get("dev", {}).get(self.plan.task.metric, math.nan)


def fit_plans(
    backbone: Backbone,
    plans: Sequence[Plan],
    *,
    folder: Path | None = None,
    open_test: bool = True,
    listener: Listener | None = None,
    announce: Callable[[Estimate], None] | None = None,
    dry_run: bool = False,
) -> list[Trained]:
    """Train all plans together on one backbone and return them in the same order.

    With a folder the state is kept in `folder/.checkpoint`, and a fit that was stopped goes on from there. The test
    split is opened once, at the end, if `open_test`. `announce` hears the estimate before the first step; `dry_run`
    ends there.
    """
    if not plans:
        raise UserError("nothing to fit: no delta and no task was given")
    names = [plan.name for plan in plans]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated:
        raise UserError(f"{repeated!r} is asked for twice; leave one out")
    check_splits((plan.task for plan in plans), open_test=open_test)
    dtypes = {resolve_precision(plan.settings.precision, backbone) for plan in plans}
    if len(dtypes) > 1:
        raise UserError("all trainings of one fit run on one backbone: give them the same precision")
    working = working_copy(backbone, dtypes.pop())
    jobs = make_jobs(plans, working, backbone)
    engine = Engine(jobs, working)
    try:
        place = folder / ".checkpoint" if folder else None
        identity = checkpoint.identity(plans, backbone) if place else ""
        if place:
            checkpoint.read(place, jobs, identity)
        if announce:
            announce(estimate(engine))
        if dry_run:
            return []
        train(engine, listener=listener, checkpoint=checkpoint.keeper(place, jobs, identity))
        if place:
            checkpoint.write(place, jobs, identity)
        return finish(engine, jobs, open_test=open_test)
    finally:
        engine.close()


def finish(engine: Engine, jobs: Sequence[Job], *, open_test: bool) -> list[Trained]:
    """Put the best tensors back, score dev whole and, if asked, test once, and record where each delta came from."""
    for job in jobs:
        job.restore_best()
    done = {job.name: job for job in jobs}
    found: dict[str, Trained] = {}
    for limit, group in in_groups(jobs, engine.backbone):
        task = group[0].plan.task
        live = [job for job in group if job.state != "nan" or job.best]
        made = {split: _predicted(engine, live, split, limit) for split in _splits(open_test)}
        for job in group:
            metrics = {split: scored(task, split, p[job.name].values) for split, p in made.items() if job.name in p}
            found[job.name] = Trained(
                job.plan,
                job.delta,
                metrics,
                job.curve,
                job.state,
                job.step,
                job.seconds,
                job.tokens,
                job.best_step,
                made.get("test", {}).get(job.name),
                made["dev"].get(job.name),
            )
            _record(done[job.name], found[job.name], engine.backbone)
    return [found[job.name] for job in jobs]


def _splits(open_test: bool) -> tuple[str, ...]:
    return ("dev", "test") if open_test else ("dev",)


def check_splits(tasks: Iterable[Task], *, open_test: bool = True) -> None:
    """TaskError for a task without rows in a split that a fit will need, before any work is done."""
    for task in tasks:
        for split in ("train", *_splits(open_test)):
            task_rows(task, split)


def _predicted(engine: Engine, jobs: Sequence[Job], split: str, limit: int) -> dict[str, Predictions]:
    if not jobs:
        return {}
    rows = task_rows(jobs[0].plan.task, split)
    made = predict_many(engine.adapted, [(job.delta, job.head) for job in jobs], rows, limit, jobs[0].references)
    return dict(zip([job.name for job in jobs], made, strict=True))


def _record(job: Job, trained: Trained, backbone: Backbone) -> None:
    task = job.plan.task
    job.delta.record = {
        "task": {
            "name": task.name,
            "kind": task.kind,
            "metric": task.metric,
            "labels": list(task.labels),
            "fingerprint": task.fingerprint,
        },
        "metrics": trained.metrics,
        "settings": {**job.plan.settings.record(), "lr": job.plan.lr, "seed": job.plan.seed},
        "steps": job.step,
        "best_step": job.best_step,
        "precision": str(backbone.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what decides the result."""
    import transformers

    return {
        "deltatune": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def majority_scores(task: Task, *, open_test: bool = True) -> dict[str, dict[str, float]]:
    """Scores of the best constant prediction."""
    guess = majority(task)
    return {split: scored(task, split, constant(guess, task, task_rows(task, split))) for split in _splits(open_test)}


def scored(task: Task, split: str, predictions: Sequence[Any]) -> dict[str, float]:
    """Score predictions of a whole split: {metric: value}."""
    gold = references(task.kind, task_rows(task, split))
    return {task.metric: score(task.metric, predictions, gold, task.labels)}


def settings_of(delta: Delta) -> dict[str, Any]:
    """The settings that a saved delta was fitted with. UserError if it was not fitted by `fit`."""
    settings = delta.record.get("settings")
    if not isinstance(settings, dict) or not isinstance(delta.head, Head):
        raise UserError(f"delta {delta.name!r} has no head: it was not made by `deltatune fit`, so it predicts nothing")
    return settings
