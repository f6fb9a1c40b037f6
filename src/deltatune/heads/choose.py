"""Which head a task gets."""

from __future__ import annotations

from deltatune.backbone.load import Backbone
from deltatune.data.task import Kind, Task
from deltatune.errors import TaskError
from deltatune.heads.base import TaskHead
from deltatune.heads.chat import Chat
from deltatune.heads.choice import MultipleChoice
from deltatune.heads.classification import MultiLabel, SequenceClassification
from deltatune.heads.embedding import Embedding
from deltatune.heads.images import ImageClassification
from deltatune.heads.language import Generation, Verbalized
from deltatune.heads.preference import Preference
from deltatune.heads.regression import Regression
from deltatune.heads.sequence import SequenceToSequence
from deltatune.heads.span import ExtractiveSpan
from deltatune.heads.tokens import TokenClassification

OWN: tuple[type[TaskHead], ...] = (
    Generation, TokenClassification, MultiLabel, Regression, MultipleChoice, ExtractiveSpan, Embedding, Preference,
    Chat, ImageClassification,
)  # fmt: skip


def head_for(task: Task, backbone: Backbone, seed: int) -> TaskHead:
    """Make the head of a task: verbalised where it brings a template or words, and the backbone can write them."""
    if backbone.kind == "plain":
        raise TaskError(
            f"{backbone.name} has no stack of transformer blocks for a head to stand on; adapt it and train it in a "
            f"loop of your own: dt.adapt(network, LoRA(at='module:*'))"
        )
    own: dict[Kind, type[TaskHead]] = {kind: head for head in OWN for kind in head.kinds}
    read = "images" if task.kind == "image_classification" else "text"
    if backbone.reads != read:
        raise TaskError(f"task {task.name} has {read}, {backbone.name} reads {backbone.reads}; take another backbone")
    if task.kind == "generation" and backbone.kind == "encoder-decoder":
        return SequenceToSequence.make(task, backbone, seed)
    if task.kind in own:
        return own[task.kind].make(task, backbone, seed)
    if backbone.kind == "decoder" and (task.template or task.verbalizer):
        return Verbalized.make(task, backbone, seed)
    return SequenceClassification.make(task, backbone, seed)
