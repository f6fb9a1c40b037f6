"""Regression: a number for a text or a pair of texts."""

from __future__ import annotations

import statistics
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.data.task import Kind, Row, Task
from deltatune.delta.delta import generator
from deltatune.heads.base import Batch, row_weights, weighted_mean
from deltatune.heads.pooled import Pooled, Pooling


class Regression(Pooled):
    """value [rows] = spread (w pool(hidden) + b) + centre; mean squared error of the standardised values.

    Centre and spread are the mean and the standard deviation of the training values and travel with the head. A number
    comes without a probability, so its confidence is 1. Parameters: width + 1.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("regression", "pair_regression")

    def __init__(
        self,
        width: int,
        centre: float,
        spread: float,
        pooling: Pooling,
        pair: bool,
        seed: torch.Generator | None = None,
    ) -> None:
        super().__init__(width, 1, pooling, pair, seed)
        self.centre, self.spread = centre, spread

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "width": self.width, "centre": self.centre, "spread": self.spread, "pooling": self.pooling,
            "pair": self.pair,
        }  # fmt: skip

    @classmethod
    def make(cls, task: Task, backbone: Backbone, seed: int) -> Regression:
        values, weights = [row["value"] for row in task.train], [row.get("weight", 1.0) for row in task.train]
        centre = statistics.fmean(values, weights)
        spread = statistics.fmean([(value - centre) ** 2 for value in values], weights) ** 0.5 or 1.0
        made = generator(seed, "head", cls.__name__)
        return cls(centre=centre, spread=spread, seed=made, **cls.shape(task, backbone))

    def target(self, row: Row) -> Any:
        return (row["value"] - self.centre) / self.spread if "value" in row else 0.0

    def loss(self, hidden: Tensor, batch: Batch, backbone: Backbone) -> Tensor:
        scores = self.scores(hidden, batch, backbone)[:, 0]
        target = torch.tensor([e.target for e in batch.examples]).to(scores)
        return weighted_mean((scores - target).square(), row_weights(batch, scores))

    def decode(self, scores: Tensor, batch: Batch) -> tuple[list[Any], list[float]]:
        values = (scores[:, 0].cpu().double() * self.spread + self.centre).tolist()
        return values, [1.0] * len(values)
