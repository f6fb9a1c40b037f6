"""A job: the training of one delta with one head on one task from one seed, and all of its state."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.data.task import Task
from deltatune.delta.attach import check_fits
from deltatune.delta.delta import Delta, generator
from deltatune.delta.method import Spec, members
from deltatune.heads.base import Batch, Example, TaskHead, collate
from deltatune.heads.choose import head_for
from deltatune.heads.labelled import Labelled
from deltatune.training.groups import optimizer_groups
from deltatune.training.probe import probe
from deltatune.training.references import References
from deltatune.training.settings import Settings, rate
from deltatune.training.states import Probe
from deltatune.training.weights import class_weights

State = Literal["waiting", "running", "done", "stopped", "nan"]


@dataclass(frozen=True)
class Plan:
    """What is to be trained: a spec on a task from a seed. `label` is what people call the spec.

    With `start`, a delta of the same spec, training goes on from its tensors.
    """

    spec: Spec
    task: Task
    seed: int
    settings: Settings
    label: str = ""
    start: Delta | None = None

    @property
    def name(self) -> str:
        """A name that no other plan of the same fit has."""
        return f"{self.task.name}/{self.label or self.spec}/{self.seed}/{self.lr:g}"

    @property
    def lr(self) -> float:
        """Learning rate of the delta."""
        return self.settings.lr if self.settings.lr is not None else self.spec.lr


@dataclass
class Point:
    """One logged step: the mean loss since the last one, the dev score if it was evaluated, the learning rate."""

    step: int
    loss: float
    dev: float | None
    lr: float


@dataclass
class Job:
    """State of one training. `best` holds the tensors that scored best on dev; `references` are the whole fit's."""

    plan: Plan
    delta: Delta
    head: TaskHead
    train: list[Example]
    optimiser: torch.optim.Optimizer
    steps: int
    step: int = 0
    state: State = "waiting"
    curve: list[Point] = field(default_factory=list)
    best_dev: float | None = None
    best_step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0
    worse: int = 0
    losses: list[float] = field(default_factory=list)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    references: References = field(default_factory=References)

    @property
    def name(self) -> str:
        """The plan's name, which is the delta's too."""
        return self.plan.name

    @property
    def active(self) -> bool:
        """Whether there are steps left to do."""
        return self.state in ("waiting", "running") and self.step < self.steps

    def parameters(self) -> list[torch.nn.Parameter]:
        """The delta's and the head's parameters."""
        return [*self.delta.layers.parameters(), *self.head.parameters()]

    def logical_batch(self, step: int) -> list[Example]:
        """Return the examples of a step: a function of (task, seed, step) alone.

        An endless stream of epochs, each its own shuffle, cut into equal batches.
        """
        size, rows = self.plan.settings.batch, len(self.train)
        chosen: list[Example] = []
        for position in range(step * size, (step + 1) * size):
            epoch, at = divmod(position, rows)
            chosen.append(self.train[shuffled(self.plan.task.fingerprint, self.plan.seed, epoch, rows)[at]])
        return chosen

    def set_rate(self) -> None:
        """Set the optimiser's rates for the coming step."""
        factor = rate(self.step, self.steps, self.plan.settings.warmup)
        for group in self.optimiser.param_groups:
            group["lr"] = group["base_lr"] * factor

    def record_best(self, dev: float) -> None:
        """Keep the tensors if this dev score is the best so far; stop when patience has run out."""
        if math.isfinite(dev) and (self.best_dev is None or dev > self.best_dev):
            self.best_dev, self.best_step, self.worse = dev, self.step, 0
            self.best = {name: value.detach().clone() for name, value in self.delta.state_dict().items()}
            return
        self.worse += 1
        patience = self.plan.settings.patience
        if patience is not None and self.worse >= patience:
            self.state = "stopped"

    def restore_best(self) -> None:
        """Put the best tensors back."""
        if self.best:
            with torch.no_grad():
                self.delta.load_state_dict(self.best)


_shuffles: dict[tuple[str, int, int, int], list[int]] = {}


def shuffled(fingerprint: str, seed: int, epoch: int, rows: int) -> list[int]:
    """Return the order of an epoch."""
    key = (fingerprint, seed, epoch, rows)
    if key not in _shuffles:
        if len(_shuffles) > 256:
            _shuffles.clear()
        _shuffles[key] = torch.randperm(rows, generator=generator(seed, "order", fingerprint, epoch)).tolist()
    return _shuffles[key]


@dataclass
class Prepared:
    """What jobs on the same rows share: encoded training rows, starts of heads, values of texts, each made once."""

    encoded: dict[tuple[str, str, int], list[Example]] = field(default_factory=dict)
    starts: dict[tuple[str, str, int], Probe | None] = field(default_factory=dict)
    references: References = field(default_factory=References)


def make_jobs(
    plans: Sequence[Plan], backbone: Backbone, origin: Backbone, prepared: Prepared | None = None
) -> list[Job]:
    """Make the jobs of some plans: fresh deltas and heads, encoded training rows, optimisers.

    `backbone` is the working copy that computes, `origin` the one whose fingerprint the deltas carry. `prepared` keeps
    what later jobs on the same rows need again.
    """
    made = Prepared() if prepared is None else prepared
    jobs: list[Job] = []
    for plan in plans:
        delta = Delta.build(plan.spec, origin, seed=plan.seed, name=plan.name)
        head = delta.head = head_for(plan.task, origin, plan.seed)
        known = plan.start is not None and go_on(delta, plan.start, plan.task, origin)
        if known and isinstance(delta.head, TaskHead):
            head = delta.head
        if plan.settings.class_weights is not None:
            weights = class_weights(plan.task, plan.settings.class_weights)
            head.class_weights = tuple(weights[label] for label in head.labels)
        limit = min(plan.settings.max_length, room(plan.spec, backbone))
        key = (plan.task.fingerprint, repr((head.arguments, head.class_weights)), limit)
        if key not in made.encoded:
            made.encoded[key] = head.encode(plan.task.train, backbone, limit)
        rows = made.encoded[key]
        if plan.settings.probe and not known:
            if key not in made.starts:
                made.starts[key] = probe(head, rows, head.encode(plan.task.dev, backbone, limit), backbone)
            start = made.starts[key]
            if start is not None:
                head.load_state_dict(start)
        delta.to(backbone.device)
        # What has no parameters (a language model that answers by itself) is looked at once.
        steps = plan.settings.total_steps(len(rows)) if list(delta.parameters()) else 1
        jobs.append(Job(plan, delta, head, rows, optimiser(plan, delta), steps, references=made.references))
    return jobs


def go_on(delta: Delta, start: Delta, task: Task, backbone: Backbone) -> bool:
    """Copy a trained delta's tensors, and its head if that answers the same question; say whether it does.

    Labels that a head does not know are added to it. BackboneMismatch if it was trained on another backbone.
    """
    check_fits(start, backbone)
    delta.layers.load_state_dict(start.layers.state_dict())
    fresh, head = delta.head, start.head
    if isinstance(head, Labelled) and type(head) is type(fresh) and {*head.labels} <= {*task.labels}:
        delta.head = copy.deepcopy(head).with_labels(task.labels)
        return True
    if isinstance(head, TaskHead) and isinstance(fresh, TaskHead) and type(head) is type(fresh):
        same = head.arguments == fresh.arguments
        if same:
            fresh.load_state_dict(head.state_dict())
        return same
    return False


def room(spec: Spec, backbone: Backbone) -> int:
    """Tokens that fit the backbone beside the spec's own."""
    return backbone.length_limit - prompt_tokens(spec)


def prompt_tokens(spec: Spec) -> int:
    """Tokens that a spec puts into the input."""
    return sum(getattr(method, "n", 0) for method in members(spec) if method.at == "embed")


def optimiser(plan: Plan, delta: Delta) -> torch.optim.Optimizer:
    """AdamW with a group for the delta and one for the head, which keeps its own rate whatever the delta's is."""
    made = optimizer_groups(delta, lr=plan.lr, head_lr=plan.settings.head_lr, weight_decay=plan.settings.weight_decay)
    groups = [{**group, "base_lr": group["lr"]} for group in made]
    if not groups:  # torch refuses an optimiser of nothing
        groups = [{"params": [torch.nn.Parameter(torch.zeros(0))], "base_lr": plan.lr}]
    return torch.optim.AdamW(groups, lr=1.0, fused=True)


def batch_of(job: Job, backbone: Backbone) -> Batch:
    """Collate the job's next logical batch at its own padded length."""
    return collate(job.logical_batch(job.step), backbone)
