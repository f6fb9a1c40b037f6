"""Saved deltas made ready: read from their folder, attached to their backbone, at the precision they were fitted in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltatune.errors import TaskError, nearest

if TYPE_CHECKING:
    from deltatune.backbone.load import Backbone
    from deltatune.data.task import Row, Task
    from deltatune.delta.adapted import Adapted
    from deltatune.delta.delta import Delta
    from deltatune.heads.base import TaskHead
    from deltatune.training.evaluate import Predictions


@dataclass
class Ready:
    """A saved delta with its head on its backbone."""

    delta: Delta
    head: TaskHead
    adapted: Adapted
    limit: int

    @property
    def task(self) -> dict[str, Any]:
        """What the delta says of its task: name, kind, metric, labels."""
        task: dict[str, Any] = self.delta.record["task"]
        return task

    def predict(self, rows: Sequence[Row]) -> Predictions:
        """Predict rows, of which only the inputs are read."""
        from deltatune.training.evaluate import predict

        return predict(self.adapted, self.delta, self.head, rows, self.limit)


def read(folder: Path) -> Delta:
    """Read a saved delta without a backbone. DeltaFileError if it is missing or damaged."""
    import deltatune.heads.choose  # noqa: F401  (makes the heads known by name)
    from deltatune.delta.files import load

    return load(folder)


def ready(folder: Path, backbone: str | None = None, known: dict[str, Backbone] | None = None) -> Ready:
    """Make a saved delta ready to predict on the backbone that it names, or on another one.

    `known` keeps backbones that were loaded before. UserError if the delta has no head, BackboneMismatch if the
    backbone is not the one that it was fitted on.
    """
    import torch

    from deltatune.backbone.load import load
    from deltatune.delta.adapted import Adapted
    from deltatune.delta.attach import check_fits
    from deltatune.training.engine import working_copy
    from deltatune.training.fit import settings_of
    from deltatune.training.job import room

    delta = read(folder)
    settings = settings_of(delta)
    known = {} if known is None else known
    name = backbone or delta.backbone_name
    if name not in known:
        known[name] = load(name)
    check_fits(delta, known[name])
    working = working_copy(known[name], getattr(torch, str(delta.record.get("precision", "float32"))))
    delta.name = str(folder)
    return Ready(
        delta,
        delta.head,  # type: ignore[arg-type]
        Adapted(working, [delta], verify=False),
        min(int(settings["max_length"]), room(delta.spec, working)),
    )


def task_for(one: Ready, source: str, columns: dict[str, str], metric: str | None, limit: int | None = None) -> Task:
    """Load a task on which a saved delta can be scored, by the metric that it was fitted for unless told otherwise.

    TaskError if the task is of another kind, or has a label that the delta's head does not know.
    """
    from deltatune.data.load import load_task
    from deltatune.data.metrics import check_metric

    task = load_task(source, columns=columns)
    kind, labels = one.task["kind"], one.task["labels"]
    if task.kind != kind:
        raise TaskError(
            f"{task.name} is a {task.kind} task; {one.delta.name} was fitted for {kind} ({one.task['name']})"
        )
    for label in task.labels:
        if label not in labels:
            raise TaskError(
                f"{task.name} has label {label!r}, which {one.delta.name} has never seen{nearest(label, labels)}; "
                f"score it on data with its own labels, or fit a delta to this task"
            )
    if metric is None and one.task["metric"] != task.metric:
        metric = check_metric(one.task["metric"], task.kind, labels)
    return load_task(task, metric=metric, limit=limit)
