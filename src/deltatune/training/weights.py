"""What each class weighs in the loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Literal

from deltatune.data.task import LABELLED, Row, Task
from deltatune.errors import UnknownName, UserError

ClassWeights = Literal["balanced"] | Mapping[str, float]


def class_weights(task: Task, asked: ClassWeights) -> dict[str, float]:
    """Return the weight of each label in the loss: as asked, 1 for a label that is not named, or balanced.

    Balanced: rows / (labels × rows of the label), as scikit-learn has it, so that every label counts the same in all;
    of sets of labels, rows without the label / rows with it. Rows count by their own weights, tags as tokens.
    UserError for a task without labels, UnknownName for a label that it has not.
    """
    if task.kind not in LABELLED:
        raise UserError(f"class_weights: {task.name} is a {task.kind} task and has no labels; use a column of weights")
    if asked != "balanced":
        for label in asked:
            if label not in task.labels:
                raise UnknownName("label", label, task.labels, "class_weights names labels of the task")
        return {label: float(asked.get(label, 1.0)) for label in task.labels}
    often: Counter[str] = Counter()
    for row in task.train:
        for label in _labels(row):
            often[label] += row.get("weight", 1.0)
    if task.kind == "multi_label":
        rows = sum(row.get("weight", 1.0) for row in task.train)
        return {label: (rows - often[label]) / often[label] if often[label] else 1.0 for label in task.labels}
    found = [label for label in task.labels if often[label]]
    total = sum(often.values())
    return {label: total / (len(found) * often[label]) if often[label] else 1.0 for label in task.labels}


def _labels(row: Row) -> list[str]:
    several: list[str] | None = row.get("tags", row.get("labels"))
    return [row["label"]] if several is None else several
