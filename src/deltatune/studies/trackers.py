"""Experiment trackers: every training is a run of its own in TensorBoard, MLflow or Weights & Biases.

Where runs go each tracker decides in its own way: TENSORBOARD_LOGGING_DIR (`runs/`), MLFLOW_TRACKING_URI and
MLFLOW_EXPERIMENT_NAME, WANDB_PROJECT, WANDB_DIR and WANDB_MODE (offline where no key is known).
"""

from __future__ import annotations

import importlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol, get_args

from deltatune.errors import UnknownName, UserError
from deltatune.training.engine import Listener
from deltatune.training.job import Job

Tracker = Literal["tensorboard", "mlflow", "wandb"]
PROJECT = "deltatune"


class Run(Protocol):
    """A run of a tracker."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log values of a step."""

    def finish(self, finished: bool) -> None:
        """End the run; not `finished` is one that diverged or was broken off."""


@contextmanager
def tracking(tracker: Tracker | None, listener: Listener | None = None) -> Iterator[Listener | None]:
    """Yield a listener for the engine that logs every training, and tells `listener`; without a tracker, `listener`.

    A run has its plan as parameters; it logs loss, dev score and rate at each evaluation. UnknownName for a tracker
    that is none, UserError if its package is not installed.
    """
    if tracker is None:
        yield listener
        return
    if tracker not in get_args(Tracker):
        raise UnknownName("tracker", tracker, get_args(Tracker))
    tracks = _Tracks(_MAKERS[tracker](), listener)
    try:
        yield tracks.hear
    except BaseException:
        tracks.close(broken_off=True)
        raise
    tracks.close()


class _Tracks:
    def __init__(self, make: Callable[[str, Mapping[str, Any]], Run], listener: Listener | None) -> None:
        self.make, self.listener = make, listener
        self.runs: dict[str, tuple[Run, Job]] = {}
        self.logged: dict[str, int] = {}

    def hear(self, jobs: Sequence[Job], event: str) -> None:
        for job in jobs:
            if job.name not in self.runs:
                self.runs[job.name] = self.make(job.name, _parameters(job)), job
            run = self.runs[job.name][0]
            self.runs[job.name] = run, job  # a search makes a job anew when it goes on
            for point in job.curve[self.logged.get(job.name, 0) :]:
                values = {"loss": point.loss, f"dev/{job.plan.task.metric}": point.dev, "lr": point.lr}
                run.log({k: v for k, v in values.items() if v is not None and math.isfinite(v)}, point.step)
            self.logged[job.name] = len(job.curve)
        if self.listener is not None:
            self.listener(jobs, event)

    def close(self, *, broken_off: bool = False) -> None:
        for run, job in self.runs.values():
            # A candidate that a search gave up has not failed.
            run.finish(not broken_off and job.state != "nan")


def _parameters(job: Job) -> dict[str, Any]:
    plan = job.plan
    settings = {**plan.settings.record(), "lr": plan.lr, "steps": job.steps}
    return {
        "task": plan.task.name,
        "delta": str(plan.spec),
        "seed": plan.seed,
        "trainable": job.delta.trainable(),
    } | settings


def _needed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name.partition('.')[0]} is not installed: pip install 'deltatune[track]'") from error


def _tensorboard() -> Callable[[str, Mapping[str, Any]], Run]:
    _needed("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    class InTensorBoard:
        def __init__(self, name: str, parameters: Mapping[str, Any]) -> None:
            folder = os.environ.get("TENSORBOARD_LOGGING_DIR", "runs")
            self.writer = SummaryWriter(os.path.join(folder, re.sub(r"[^\w.=-]+", "-", name)))
            table = "\n".join(f"| {key} | {value} |" for key, value in parameters.items())
            self.writer.add_text("plan", f"| | |\n|---|---|\n{table}")

        def log(self, values: Mapping[str, float], step: int) -> None:
            for key, value in values.items():
                self.writer.add_scalar(key, value, step)

        def finish(self, finished: bool) -> None:
            self.writer.close()

    return InTensorBoard


def _mlflow() -> Callable[[str, Mapping[str, Any]], Run]:
    client = _needed("mlflow").MlflowClient()
    # Not mlflow.start_run: it has one run at a time.
    title = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    known = client.get_experiment_by_name(title)
    experiment = client.create_experiment(title) if known is None else known.experiment_id

    class InMLflow:
        def __init__(self, name: str, parameters: Mapping[str, Any]) -> None:
            self.id = client.create_run(experiment, run_name=name).info.run_id
            for key, value in parameters.items():
                client.log_param(self.id, key, value)

        def log(self, values: Mapping[str, float], step: int) -> None:
            for key, value in values.items():
                client.log_metric(self.id, key, value, step=step)

        def finish(self, finished: bool) -> None:
            client.set_terminated(self.id, "FINISHED" if finished else "FAILED")

    return InMLflow


def _wandb() -> Callable[[str, Mapping[str, Any]], Run]:
    wandb = _needed("wandb")
    mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")

    class InWandb:
        def __init__(self, name: str, parameters: Mapping[str, Any]) -> None:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT), name=name, config=dict(parameters), mode=mode,
                reinit="create_new",
            )  # fmt: skip

        def log(self, values: Mapping[str, float], step: int) -> None:
            self.run.log(dict(values), step=step)

        def finish(self, finished: bool) -> None:
            self.run.finish(exit_code=0 if finished else 1)

    return InWandb


_MAKERS = {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb}
