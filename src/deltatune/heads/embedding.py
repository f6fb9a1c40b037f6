"""Embeddings: texts that mean the same lie close together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.backbone.load import Backbone
from deltatune.data.metrics import RANKED
from deltatune.data.task import Kind, Row, Task
from deltatune.heads.base import Batch, Example, TaskHead, tokenise
from deltatune.heads.pooled import mean_of

FIELDS = ("positive", "negative")
CHUNK = 1024  # anchors ranked at a time


class Embedding(TaskHead):
    """vector [texts, width] = mean of the tokens over its norm; cross-entropy of each anchor over the batch's texts.

    An anchor's own positive has to be nearer than the positives and negatives of all rows of its logical batch: the
    logits are `scale` times the cosines. No parameters. Source: Henderson et al. 2017, Efficient Natural Language
    Response Suggestion for Smart Reply, arXiv:1705.00652 (multiple negatives ranking).
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("embedding",)

    def __init__(self, scale: float = 20.0) -> None:
        super().__init__()
        self.scale = scale

    @property
    def arguments(self) -> dict[str, Any]:
        return {"scale": self.scale}

    @classmethod
    def make(cls, task: Task, backbone: Backbone, seed: int) -> Embedding:
        return cls()

    def encode(self, rows: Sequence[Row], backbone: Backbone, limit: int) -> list[Example]:
        texts = [[row["anchor"], *(row[field] for field in FIELDS if field in row)] for row in rows]
        made = iter(tokenise(backbone, [text for row in texts for text in row], limit=limit))
        examples = []
        for row in texts:
            anchor, *others = (next(made) for _ in row)
            examples.append(dataclasses.replace(anchor, more=tuple(others)))
        return examples

    def scores(self, hidden: Tensor, batch: Batch, backbone: Backbone) -> Tensor:
        return nn.functional.normalize(mean_of(hidden, batch.inputs["attention_mask"][: len(hidden)]), dim=1)

    def loss(self, hidden: Tensor, batch: Batch, backbone: Backbone) -> Tensor:
        vectors = self.scores(hidden, batch, backbone)
        places: list[list[int]] = [[], [], []]  # anchors, positives, negatives
        row = 0
        for example in batch.examples:
            for place in places[: len(example.sequences)]:
                place.append(row)
                row += 1
        anchors, *candidates = (vectors[place] for place in places)
        own = torch.arange(len(anchors), device=hidden.device)
        return nn.functional.cross_entropy(self.scale * anchors @ torch.cat(candidates).T, own)

    def decode(self, scores: Tensor, batch: Batch) -> tuple[list[Any], list[float]]:
        parts = scores.split([len(example.sequences) for example in batch.examples])
        return [part.cpu() for part in parts], [1.0] * len(parts)

    def conclude(self, values: list[Any], rows: Sequence[Row]) -> list[Any]:
        """Return the positives of the split that are nearest to each row's anchor, of rows without one its vector."""
        if not all("positive" in row for row in rows):
            return [value[0].tolist() for value in values]
        pool = {row["positive"]: value[1] for row, value in zip(rows, values, strict=True)}
        texts, vectors = list(pool), torch.stack(list(pool.values()))
        anchors = torch.stack([value[0] for value in values])
        ranked: list[Any] = []
        for part in anchors.split(CHUNK):
            order = (part @ vectors.T).sort(dim=1, descending=True, stable=True).indices[:, :RANKED]
            ranked += [[texts[i] for i in row] for row in order.tolist()]
        return ranked
