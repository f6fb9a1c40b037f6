"""Multiple choice: one score for each choice, and the best is taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.backbone.load import Backbone
from deltatune.data.task import Kind, Row, Task
from deltatune.delta.delta import generator
from deltatune.heads.base import Batch, Example, cross_entropy, row_weights, tokenise
from deltatune.heads.pooled import Pooled, Pooling


class MultipleChoice(Pooled):
    """scores [sequences] = w pool(hidden), one sequence (text, choice) for each choice; cross-entropy over a row's.

    A context stands behind the text, where it is cut first. There is no bias, which a softmax would not feel.
    Parameters: width.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("multiple_choice",)

    def __init__(self, width: int, pooling: Pooling, seed: torch.Generator | None = None) -> None:
        super().__init__(width, 1, pooling, True, seed, bias=False)

    @property
    def arguments(self) -> dict[str, Any]:
        return {"width": self.width, "pooling": self.pooling}

    @classmethod
    def make(cls, task: Task, backbone: Backbone, seed: int) -> MultipleChoice:
        shape = cls.shape(task, backbone)
        return cls(shape["width"], shape["pooling"], generator(seed, "head", cls.__name__))

    def encode(self, rows: Sequence[Row], backbone: Backbone, limit: int) -> list[Example]:
        texts = [f"{row['text']}\n{row['context']}" if "context" in row else row["text"] for row in rows]
        firsts = [text for text, row in zip(texts, rows, strict=True) for _ in row["choices"]]
        sequences = tokenise(backbone, firsts, [choice for row in rows for choice in row["choices"]], limit=limit)
        examples, at = [], 0
        for row in rows:
            first, *rest = sequences[at : at + len(row["choices"])]
            at += len(row["choices"])
            target, weight = row.get("label", -100), row.get("weight", 1.0)
            examples.append(dataclasses.replace(first, target=target, more=tuple(rest), weight=weight))
        return examples

    def scores(self, hidden: Tensor, batch: Batch, backbone: Backbone) -> Tensor:
        return super().scores(hidden, batch, backbone)[:, 0]

    def loss(self, hidden: Tensor, batch: Batch, backbone: Backbone) -> Tensor:
        scores = _by_row(self.scores(hidden, batch, backbone), batch)
        target = torch.tensor([e.target for e in batch.examples], device=hidden.device)
        return cross_entropy(scores, target, row_weights(batch, scores))

    def decode(self, scores: Tensor, batch: Batch) -> tuple[list[Any], list[float]]:
        best = _by_row(scores, batch).softmax(dim=-1).max(dim=-1)
        return best.indices.tolist(), best.values.tolist()


def _by_row(scores: Tensor, batch: Batch) -> Tensor:
    """Scores [rows, most choices] of scores [sequences]; a choice that a row lacks has none of the probability."""
    parts = scores.split([len(e.sequences) for e in batch.examples])
    return nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=float("-inf"))
