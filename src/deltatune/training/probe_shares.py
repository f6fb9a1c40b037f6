"""The start of heads that share out one softmax over the items of a row: choices, or the tokens of a text.

Source: conditional logit, McFadden 1974, Conditional Logit Analysis of Qualitative Choice Behavior.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.heads.base import Example
from deltatune.heads.choice import MultipleChoice
from deltatune.heads.span import ExtractiveSpan, Window
from deltatune.training.states import MOST, STRENGTHS, Probe, states


@dataclass(frozen=True)
class Shares:
    """Items `x` [items, width] of rows: `row` [items], `right` [items, outputs], `weights` [rows]."""

    x: Tensor
    row: Tensor
    right: Tensor
    weights: Tensor

    def loss(self, weight: Tensor) -> Tensor:
        """Sum over rows, by their weights, of -log of the share of the right items; mean over outputs."""
        scores = self.x @ weight.T
        shares = self._log_sum(scores.masked_fill(~self.right, float("-inf"))) - self._log_sum(scores)
        return -(self.weights[:, None] * shares).sum() / weight.shape[0]

    def _log_sum(self, scores: Tensor) -> Tensor:
        """Log of the sum of exponentials [rows, outputs] of each row's items."""
        index = self.row[:, None].expand_as(scores)
        size = (len(self.weights), scores.shape[1])
        most = scores.new_full(size, float("-inf")).scatter_reduce(0, index, scores.detach(), "amax")
        total = scores.new_zeros(size).scatter_add(0, index, (scores - most[self.row]).exp())
        return total.log() + most


def probe_shares(
    head: MultipleChoice | ExtractiveSpan, train: Sequence[Example], dev: Sequence[Example], backbone: Backbone
) -> Probe | None:
    """Return the tensors of a head fitted to frozen features, least in loss on dev; None if no row teaches anything."""
    seen, seen_dev = shares_of(head, train, backbone), shares_of(head, dev, backbone)
    if seen is None or seen_dev is None:
        return None
    weights = seen.weights[seen.row][:, None]
    middle = (weights * seen.x).mean() / weights.mean()
    spread = ((weights * (seen.x - middle).square()).mean() / weights.mean()).sqrt().clamp(min=1e-6)
    weight = torch.zeros_like(head.linear.weight, dtype=torch.float32, device="cpu")
    best: tuple[float, Tensor] | None = None
    for strength in STRENGTHS:
        weight = _fitted(seen, weight, strength, float(spread))
        loss = float(seen_dev.loss(weight))
        if best is None or loss < best[0]:
            best = (loss, weight)
    assert best is not None
    return {"linear.weight": best[1]}


def _fitted(seen: Shares, start: Tensor, strength: float, spread: float) -> Tensor:
    weight = (start * spread).requires_grad_()
    optimiser = torch.optim.LBFGS([weight], max_iter=60, tolerance_grad=1e-4, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimiser.zero_grad()
        loss = (strength * seen.loss(weight / spread) + weight.square().sum() / 2) / (strength * seen.weights.sum())
        loss.backward()
        return float(loss.detach())

    optimiser.step(closure)
    return (weight / spread).detach()


def shares_of(head: MultipleChoice | ExtractiveSpan, examples: Sequence[Example], backbone: Backbone) -> Shares | None:
    """Return what a head's linear sees on the bare backbone, of as many rows as fit; None if nothing can be learnt."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    taken, kept = 0, list[Example]()
    for example in examples:
        taken += example.tokens if isinstance(head, ExtractiveSpan) else len(example.sequences)
        if kept and taken > MOST * (4 if isinstance(head, ExtractiveSpan) else 1):
            break
        kept.append(example)
    for numbers, batch, hidden in states(kept, backbone):
        at = 0
        for i in numbers:
            own = slice(at, at + len(kept[i].sequences))
            at = own.stop
            found[i] = (
                _items(head, kept[i], hidden, own)
                if isinstance(head, ExtractiveSpan)
                else _choices(head.pool(hidden, batch)[own].cpu(), kept[i])
            )
    # Rows that weigh nothing, or whose answer is nowhere, teach nothing.
    rows = [i for i in sorted(found) if kept[i].weight > 0 and bool(found[i][1].any(dim=0).all())]
    if not rows:
        return None
    return Shares(
        torch.cat([found[i][0] for i in rows]),
        torch.cat([torch.full((len(found[i][0]),), n) for n, i in enumerate(rows)]),
        torch.cat([found[i][1] for i in rows]),
        torch.tensor([kept[i].weight for i in rows]),
    )


def _choices(pooled: Tensor, example: Example) -> tuple[Tensor, Tensor]:
    return pooled, (torch.arange(len(pooled)) == example.target)[:, None]


def _items(head: ExtractiveSpan, example: Example, hidden: Tensor, own: slice) -> tuple[Tensor, Tensor]:
    vectors, right = [], []
    for window, of_window in zip(example.sequences, hidden[own], strict=True):
        assert isinstance(window, Window)
        vectors.append(of_window[window.inside].float().cpu())
        right += [[at in window.target[0], at in window.target[1]] for at in window.inside]
    return torch.cat(vectors), torch.tensor(right, dtype=torch.bool).reshape(-1, 2)
