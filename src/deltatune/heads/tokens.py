"""Token classification: one linear on the first sub-word of each word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.data.task import Kind, Row, Task
from deltatune.delta.delta import generator
from deltatune.heads.base import Batch, Example, cross_entropy, linear, processor_of, row_weights
from deltatune.heads.labelled import Labelled


class TokenClassification(Labelled):
    """scores [rows, tokens, tags] = W hidden + b; cross-entropy on the first sub-word of each word.

    A word beyond the length limit is predicted as "O" (or the first tag). Parameters: (width + 1) tags.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("token_classification",)

    def __init__(
        self, width: int, labels: Sequence[str], seed: torch.Generator | None = None, blocks: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.width = width
        self.linear = linear(width, len(labels), seed, blocks=blocks)
        self.name(labels)

    @property
    def arguments(self) -> dict[str, Any]:
        return {"width": self.width, **self.named}

    @classmethod
    def make(cls, task: Task, backbone: Backbone, seed: int) -> TokenClassification:
        return cls(backbone.width, task.labels, generator(seed, "head", cls.__name__))

    def encode(self, rows: Sequence[Row], backbone: Backbone, limit: int) -> list[Example]:
        processor = processor_of(backbone)
        made = processor(
            [list(row["tokens"]) for row in rows], is_split_into_words=True, truncation=True, max_length=limit
        )
        examples = []
        for i, row in enumerate(rows):
            starts: dict[int, int] = {}
            for position, word in enumerate(made.word_ids(i)):
                if word is not None:
                    starts.setdefault(word, position)
            target = [-100] * len(made["input_ids"][i])
            tags = row.get("tags")
            if tags is not None:
                for word, position in starts.items():
                    target[position] = self.numbers.get(tags[word], -100)
            types = made.get("token_type_ids")
            words = tuple(starts.get(word, -1) for word in range(len(row["tokens"])))
            ids, kinds = tuple(made["input_ids"][i]), tuple(types[i]) if types is not None else None
            examples.append(Example(ids, kinds, target, words, weight=row.get("weight", 1.0)))
        return examples

    def scores(self, hidden: Tensor, batch: Batch, backbone: Backbone) -> Tensor:
        tags: Tensor = self.linear(hidden.to(self.linear.weight.dtype))
        return tags

    def loss(self, hidden: Tensor, batch: Batch, backbone: Backbone) -> Tensor:
        where = [(row, at) for row, e in enumerate(batch.examples) for at, t in enumerate(e.target) if t != -100]
        if not where:
            return hidden.sum() * 0.0
        rows, columns = (torch.tensor(index, device=hidden.device) for index in zip(*where, strict=True))
        target = torch.tensor([batch.examples[row].target[at] for row, at in where], device=hidden.device)
        chosen = self.linear(hidden[rows, columns].to(self.linear.weight.dtype))
        return cross_entropy(chosen, target, row_weights(batch, chosen)[rows], self.class_weights)

    def decode(self, scores: Tensor, batch: Batch) -> tuple[list[Any], list[float]]:
        best = scores.softmax(dim=-1).max(dim=-1)
        names, sure = best.indices.tolist(), best.values.tolist()
        outside = "O" if "O" in self.labels else self.labels[0]
        predictions, confidence = [], []
        for row, example in enumerate(batch.examples):
            predictions.append([self.labels[names[row][at]] if at >= 0 else outside for at in example.words])
            seen = [sure[row][at] for at in example.words if at >= 0]
            confidence.append(sum(seen) / len(seen) if seen else 0.0)
        return predictions, confidence
