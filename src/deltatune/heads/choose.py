"""Which head a task gets."""

from __future__ import annotations

from deltatune.backbone.load import Backbone
from deltatune.data.task import Task
from deltatune.heads.base import TaskHead
from deltatune.heads.classification import SequenceClassification
from deltatune.heads.language import Generation, Verbalized
from deltatune.heads.tokens import TokenClassification


def head_for(task: Task, backbone: Backbone, seed: int) -> TaskHead:
    """Make the head of a task: verbalised where it brings a template or words, and the backbone can write them."""
    if task.kind == "generation":
        return Generation.make(task, backbone, seed)
    if task.kind == "token_classification":
        return TokenClassification.make(task, backbone, seed)
    if backbone.kind == "decoder" and (task.template or task.verbalizer):
        return Verbalized.make(task, backbone, seed)
    return SequenceClassification.make(task, backbone, seed)
