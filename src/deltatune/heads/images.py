"""Classification of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.data.task import Kind, Row, Task
from deltatune.heads.base import Batch, Example
from deltatune.heads.classification import SequenceClassification
from deltatune.heads.pixels import positions


class ImageClassification(SequenceClassification):
    """scores [rows, labels] = W pool(hidden) + b; cross-entropy.

    Pooling: the token for the whole image where the backbone has one, else the mean over positions. Parameters:
    (width + 1) labels.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("image_classification",)

    @staticmethod
    def shape(task: Task, backbone: Backbone) -> dict[str, Any]:
        pooling = "first" if backbone.class_token else "mean"
        return {"width": backbone.width, "pooling": pooling, "pair": False}

    def encode(self, rows: Sequence[Row], backbone: Backbone, limit: int) -> list[Example]:
        patches = positions(rows[0]["image"], backbone) if rows else 0
        return [
            Example((), None, self.target(row), weight=row.get("weight", 1.0), image=row["image"], patches=patches)
            for row in rows
        ]

    def pool(self, hidden: Tensor, batch: Batch) -> Tensor:
        return (hidden[:, 0] if self.pooling == "first" else hidden.mean(dim=1)).float()
