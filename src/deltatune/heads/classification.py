"""Classification of a text or of a pair of texts: pool, then one linear."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from deltatune.backbone.load import Backbone
from deltatune.data.task import Kind, Row, Task
from deltatune.delta.delta import generator
from deltatune.heads.base import Batch, Example, TaskHead, linear, tokenise

Pooling = Literal["mean", "first", "last"]


class SequenceClassification(TaskHead):
    """scores [rows, labels] = W pool(hidden) + b; cross-entropy.

    Pooling: the mean over tokens for encoders, the last token for decoders. Parameters: (width + 1) labels.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("classification", "pair_classification")

    def __init__(
        self, width: int, labels: Sequence[str], pooling: Pooling, pair: bool, seed: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.width, self.labels, self.pooling, self.pair = width, tuple(labels), pooling, pair
        self.linear = linear(width, len(labels), seed)

    @property
    def arguments(self) -> dict[str, Any]:
        return {"width": self.width, "labels": list(self.labels), "pooling": self.pooling, "pair": self.pair}

    @classmethod
    def make(cls, task: Task, backbone: Backbone, seed: int) -> SequenceClassification:
        pooling: Pooling = "last" if backbone.kind == "decoder" else "mean"
        pair = task.kind == "pair_classification"
        return cls(backbone.width, task.labels, pooling, pair, generator(seed, "head", cls.__name__))

    def encode(self, rows: Sequence[Row], backbone: Backbone, limit: int) -> list[Example]:
        texts = [[row["text"] for row in rows], *([[row["text_b"] for row in rows]] if self.pair else [])]
        number = {label: i for i, label in enumerate(self.labels)}
        examples = tokenise(backbone, *texts, limit=limit)
        return [
            dataclasses.replace(e, target=number.get(row.get("label", ""), -100))
            for e, row in zip(examples, rows, strict=True)
        ]

    def pool(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return one vector a row [rows, width], in float32."""
        mask = batch.inputs["attention_mask"][: len(hidden)]
        if self.pooling == "first":
            return hidden[:, 0].float()
        if self.pooling == "last":
            last = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)
            return hidden[torch.arange(len(hidden), device=hidden.device), last].float()
        weights = mask[:, :, None].to(hidden)
        return ((hidden * weights).sum(dim=1).float() / weights.sum(dim=1).float()).float()

    def scores(self, hidden: Tensor, batch: Batch, backbone: Backbone) -> Tensor:
        pooled: Tensor = self.linear(self.pool(hidden, batch).to(self.linear.weight.dtype))
        return pooled

    def loss(self, hidden: Tensor, batch: Batch, backbone: Backbone) -> Tensor:
        target = torch.tensor([e.target for e in batch.examples], device=hidden.device)
        return nn.functional.cross_entropy(self.scores(hidden, batch, backbone), target)

    def decode(self, scores: Tensor, batch: Batch) -> tuple[list[Any], list[float]]:
        best = scores.softmax(dim=-1).max(dim=-1)
        return [self.labels[i] for i in best.indices.tolist()], best.values.tolist()
