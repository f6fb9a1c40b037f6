"""What a task is: three splits of canonical rows, the labels, how it is worded and how it is scored."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from deltatune.data.images import digest_of
from deltatune.errors import TaskError

Kind = Literal[
    "classification", "pair_classification", "token_classification", "generation", "multi_label", "regression",
    "pair_regression", "multiple_choice", "extractive_span", "embedding", "preference", "chat",
    "image_classification",
]  # fmt: skip
Row = dict[str, Any]
SPLITS = ("train", "dev", "test")

FIELDS: Mapping[Kind, tuple[str, ...]] = {
    "classification": ("text", "label"),
    "pair_classification": ("text", "text_b", "label"),
    "token_classification": ("tokens", "tags"),
    "generation": ("source", "target"),
    "multi_label": ("text", "labels"),
    "regression": ("text", "value"),
    "pair_regression": ("text", "text_b", "value"),
    "multiple_choice": ("text", "choices", "label"),
    "extractive_span": ("context", "question", "answers"),
    "embedding": ("anchor", "positive"),
    "preference": ("prompt", "chosen", "rejected"),
    "chat": ("messages",),
    "image_classification": ("image", "label"),
}
"""The canonical fields of a row by kind: a choice's `label` is its number, `answers` are [{"text", "start"}]."""

OPTIONAL: Mapping[Kind, tuple[str, ...]] = {
    **dict.fromkeys(FIELDS, ("weight",)),
    "generation": ("targets",),
    "multiple_choice": ("context", "weight"),
    "embedding": ("negative",),
    "preference": (),
    "chat": (),
}
"""Fields that a row may have besides.

Every accepted answer, the text that choices are about, a text that the anchor does not mean, a weight in the loss.
"""

LABELLED: tuple[Kind, ...] = (
    "classification", "pair_classification", "token_classification", "multi_label", "image_classification"
)  # fmt: skip
"""Kinds whose answers come from the task's labels."""

PAIRS: tuple[Kind, ...] = ("pair_classification", "pair_regression")
NUMBERS: tuple[Kind, ...] = ("regression", "pair_regression")

INPUTS: Mapping[Kind, tuple[str, ...]] = {
    "classification": ("text",),
    "pair_classification": ("text", "text_b"),
    "token_classification": ("tokens",),
    "generation": ("source",),
    "multi_label": ("text",),
    "regression": ("text",),
    "pair_regression": ("text", "text_b"),
    "multiple_choice": ("context", "text", "choices"),
    "extractive_span": ("context", "question"),
    "embedding": ("anchor",),
    "preference": ("prompt", "chosen", "rejected"),
    "chat": ("messages",),
    "image_classification": ("image",),
}
"""The fields of a row that a model may see; an optional one may be absent."""


@dataclass(frozen=True)
class Task:
    """A named problem with its data: splits of canonical rows, labels, template and metric.

    Rows are never changed after a task is made; `labels` is sorted, the tag names for token classification and `()`
    for a kind that is not in LABELLED. `template` ("Review: {text}\\nSentiment:") and `verbalizer` (label -> words;
    None: the labels' own) are for tasks that a language model answers in words.
    """

    name: str
    kind: Kind
    metric: str
    train: Sequence[Row]
    dev: Sequence[Row]
    test: Sequence[Row]
    labels: tuple[str, ...] = ()
    template: str | None = None
    verbalizer: Mapping[str, str] | None = None
    source: str = ""

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 (hex) over kind, labels and the rows of the three splits, whatever the file's format was."""
        digest = hashlib.sha256()
        splits = (_contents(rows) for rows in (self.train, self.dev, self.test))
        for part in ({"kind": self.kind, "labels": self.labels}, *splits):
            digest.update(json.dumps(part, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode())
            digest.update(b"\n")
        return digest.hexdigest()

    def limited(self, train: int | None = None, dev: int | None = None, test: int | None = None) -> Task:
        """Return the task with at most so many rows in each split; None keeps a split whole.

        A smaller split is the head of one shuffle with seed 0, so a smaller limit's rows begin a larger limit's.
        `labels` stays that of the whole task, even where a label has no row left. Raises TaskError for a limit below 1.
        """
        limits = {"train": train, "dev": dev, "test": test}
        for split, limit in limits.items():
            if limit is not None and limit < 1:
                raise TaskError(f"limit of {split} is {limit}; expected 1 or more, or None for all rows")
        if all(limit is None or limit >= len(getattr(self, split)) for split, limit in limits.items()):
            return self
        said = ", ".join(f"{split} {limit}" for split, limit in limits.items() if limit is not None)
        return dataclasses.replace(
            self,
            train=_head(self.train, train),
            dev=_head(self.dev, dev),
            test=_head(self.test, test),
            source=f"{self.source}; limited to {said}",
        )


def _contents(rows: Sequence[Row]) -> Sequence[Row]:
    """Rows with what their images hold in the place of where these lie."""
    return [{**row, "image": digest_of(row["image"])} if "image" in row else row for row in rows]


def _head(rows: Sequence[Row], limit: int | None) -> Sequence[Row]:
    if limit is None or limit >= len(rows):
        return rows
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    return [rows[i] for i in order[:limit]]
