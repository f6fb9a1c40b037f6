"""Products of vectors with the matrix of the group that each belongs to, as a mixture's tokens with their experts'."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class Grouping:
    """Which of `number` groups each vector belongs to."""

    def __init__(self, group: Tensor, number: int) -> None:
        self.order = torch.argsort(group, stable=True)
        self.back = torch.argsort(self.order)
        self.counts = torch.bincount(group, minlength=number).tolist()

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return weight[g] x + bias[g] for each vector of group g.

        x [vectors, d_in], weight [groups, d_out, d_in], bias [groups, d_out]; the result is [vectors, d_out].
        """
        biases = [None] * len(self.counts) if bias is None else bias.unbind(0)
        # Not cut out one by one: the backward of a slice fills a tensor as large as the whole.
        parts = zip(x[self.order].split(self.counts), weight.unbind(0), biases, strict=True)
        return torch.cat([F.linear(*part) for part in parts if len(part[0])])[self.back]
