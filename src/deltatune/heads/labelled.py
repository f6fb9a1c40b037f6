"""Heads with one output for each label: labels may be added to a trained one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch

from deltatune.heads.base import Blocks, TaskHead

BELOW = 2.0  # a label that nothing was learnt of starts so far below the lowest bias


class Labelled(TaskHead):
    """Base of the heads whose `linear` has a row for each of `labels`."""

    linear: Blocks

    def name(self, labels: Sequence[str]) -> None:
        """Set the labels, in the order of the rows of `linear`."""
        self.labels = tuple(labels)
        self.numbers = {label: i for i, label in enumerate(labels)}

    @property
    def named(self) -> dict[str, Any]:
        """The labels, and the blocks in which they came, as plain data for `arguments`."""
        several = {"blocks": list(self.linear.blocks)} if len(self.linear.blocks) > 1 else {}
        return {"labels": list(self.labels), **several}

    def with_labels(self, labels: Sequence[str]) -> Self:
        """Return a head with further labels behind its own; the scores of its own stay the same bit for bit."""
        new = [label for label in dict.fromkeys(labels) if label not in self.labels]
        if not new:
            return self
        blocks = [*self.linear.blocks, len(new)]
        made = type(self)(**{**self.arguments, "labels": [*self.labels, *new], "blocks": blocks})
        made.to(self.linear.weight)
        with torch.no_grad():
            made.linear.weight.zero_()
            made.linear.bias.fill_(float(self.linear.bias.min()) - BELOW)
            made.linear.weight[: len(self.labels)] = self.linear.weight
            made.linear.bias[: len(self.labels)] = self.linear.bias
        return made
