"""Classification of a text or of a pair of texts: one label, or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.backbone.load import Backbone
from deltatune.data.task import Kind, Row, Task
from deltatune.delta.delta import generator
from deltatune.heads.base import Batch, cross_entropy, row_weights, weighted_mean
from deltatune.heads.labelled import Labelled
from deltatune.heads.pooled import Pooled, Pooling


class SequenceClassification(Pooled, Labelled):
    """scores [rows, labels] = W pool(hidden) + b; cross-entropy.

    Pooling: the mean over tokens for encoders, the last token for decoders. Parameters: (width + 1) labels.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("classification", "pair_classification")

    def __init__(
        self,
        width: int,
        labels: Sequence[str],
        pooling: Pooling,
        pair: bool,
        seed: torch.Generator | None = None,
        blocks: Sequence[int] = (),
    ) -> None:
        super().__init__(width, len(labels), pooling, pair, seed, blocks=blocks)
        self.name(labels)

    @property
    def arguments(self) -> dict[str, Any]:
        return {"width": self.width, **self.named, "pooling": self.pooling, "pair": self.pair}

    @classmethod
    def make(cls, task: Task, backbone: Backbone, seed: int) -> SequenceClassification:
        return cls(labels=task.labels, seed=generator(seed, "head", cls.__name__), **cls.shape(task, backbone))

    def target(self, row: Row) -> Any:
        return self.numbers.get(row.get("label", ""), -100)

    def loss(self, hidden: Tensor, batch: Batch, backbone: Backbone) -> Tensor:
        target = torch.tensor([e.target for e in batch.examples], device=hidden.device)
        scores = self.scores(hidden, batch, backbone)
        return cross_entropy(scores, target, row_weights(batch, scores), self.class_weights)

    def decode(self, scores: Tensor, batch: Batch) -> tuple[list[Any], list[float]]:
        best = scores.softmax(dim=-1).max(dim=-1)
        return [self.labels[i] for i in best.indices.tolist()], best.values.tolist()


class MultiLabel(SequenceClassification):
    """scores [rows, labels] = W pool(hidden) + b; binary cross-entropy, summed over labels.

    A label is predicted where its probability is above a half; the confidence in a row is the mean over labels of the
    probability of what was said of each. A class weight is that of a label where it is present.
    Parameters: (width + 1) labels.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("multi_label",)

    def target(self, row: Row) -> Any:
        present = row.get("labels", ())
        return tuple(float(label in present) for label in self.labels)

    def loss(self, hidden: Tensor, batch: Batch, backbone: Backbone) -> Tensor:
        scores = self.scores(hidden, batch, backbone)
        target = torch.tensor([e.target for e in batch.examples], device=hidden.device).to(scores)
        present = None if self.class_weights is None else torch.tensor(self.class_weights).to(scores)
        each = nn.functional.binary_cross_entropy_with_logits(scores, target, reduction="none", pos_weight=present)
        return weighted_mean(each.sum(dim=1), row_weights(batch, scores))

    def decode(self, scores: Tensor, batch: Batch) -> tuple[list[Any], list[float]]:
        chance = scores.sigmoid()
        sure = torch.maximum(chance, 1 - chance).mean(dim=1).tolist()
        return [
            [label for label, one in zip(self.labels, row, strict=True) if one > 0.5] for row in chance.tolist()
        ], sure
