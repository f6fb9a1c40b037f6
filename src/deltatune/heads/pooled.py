"""Heads on one vector a row: pool, then one linear. What they have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.data.task import PAIRS, Row, Task
from deltatune.heads.base import Batch, Example, TaskHead, linear, tokenise

Pooling = Literal["mean", "first", "last"]


class Pooled(TaskHead):
    """scores [rows, outputs] = W pool(hidden) + b.

    Pooling: the mean over tokens for encoders, the last token for decoders. Parameters: (width + 1) outputs.
    """

    def __init__(
        self,
        width: int,
        outputs: int,
        pooling: Pooling,
        pair: bool,
        seed: torch.Generator | None = None,
        *,
        bias: bool = True,
        blocks: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.width, self.pooling, self.pair = width, pooling, pair
        self.linear = linear(width, outputs, seed, bias=bias, blocks=blocks)

    @staticmethod
    def shape(task: Task, backbone: Backbone) -> dict[str, Any]:
        """Return width, pooling and pair, as the constructors take them."""
        pooling: Pooling = "last" if backbone.kind == "decoder" else "mean"
        return {"width": backbone.width, "pooling": pooling, "pair": task.kind in PAIRS}

    def target(self, row: Row) -> Any:
        """Return what the head learns from a row; what it learns nothing from where the row has no answer."""
        raise NotImplementedError

    def encode(self, rows: Sequence[Row], backbone: Backbone, limit: int) -> list[Example]:
        texts = [[row["text"] for row in rows], *([[row["text_b"] for row in rows]] if self.pair else [])]
        examples = tokenise(backbone, *texts, limit=limit)
        return [
            dataclasses.replace(e, target=self.target(row), weight=row.get("weight", 1.0))
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
        return mean_of(hidden, mask)

    def scores(self, hidden: Tensor, batch: Batch, backbone: Backbone) -> Tensor:
        pooled: Tensor = self.linear(self.pool(hidden, batch).to(self.linear.weight.dtype))
        return pooled


def mean_of(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over a row's own tokens [rows, width], in float32, of hidden states [rows, tokens, width]."""
    weights = mask[:, :, None].to(hidden)
    return ((hidden * weights).sum(dim=1).float() / weights.sum(dim=1).float()).float()
