"""The start of a head: a regression on the frozen features, so that no delta is trained against a random head.

Source: linear probing before fine-tuning, Kumar et al. 2022, Fine-Tuning can Distort Pretrained Features,
arXiv:2202.10054. The features of a task are read once, whoever asks for them.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.heads.base import Example, TaskHead
from deltatune.heads.choice import MultipleChoice
from deltatune.heads.classification import MultiLabel
from deltatune.heads.pooled import Pooled
from deltatune.heads.regression import Regression
from deltatune.heads.span import ExtractiveSpan
from deltatune.heads.tokens import TokenClassification
from deltatune.training.probe_shares import probe_shares
from deltatune.training.states import MOST, STRENGTHS, Probe, states


def probe(head: TaskHead, train: Sequence[Example], dev: Sequence[Example], backbone: Backbone) -> Probe | None:
    """Return the tensors of a head fitted to frozen features; None for a head that has no parameters.

    Deterministic: it depends on the rows and the backbone alone.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    if isinstance(head, MultipleChoice | ExtractiveSpan):
        return probe_shares(head, train, dev, backbone)
    if not isinstance(head, Pooled | TokenClassification):
        return None
    seen, seen_dev = features(head, train, backbone), features(head, dev, backbone)
    if len(seen.x) < 2:
        return None
    centre, spread = _scale(seen)
    seen, seen_dev = (dataclasses.replace(part, x=(part.x - centre) / spread) for part in (seen, seen_dev))
    if isinstance(head, Regression | MultiLabel):
        weight, bias = _ridge(seen, seen_dev) if isinstance(head, Regression) else _each_label(seen, seen_dev, head)
        weight = weight / spread.double()
        return {"linear.weight": weight.float(), "linear.bias": (bias - weight @ centre.double()).float()}
    x, y, w = seen.x.numpy(), seen.y.numpy(), seen.weights.numpy()
    if len({*y.tolist()}) < 2:
        return None
    best: tuple[float, Any] | None = None
    for strength in STRENGTHS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # stopped early is regularised, too
            model = LogisticRegression(C=strength, max_iter=60).fit(x, y, w)
        known = torch.isin(seen_dev.y, torch.tensor(model.classes_))
        if not known.any():
            return None
        chances = model.predict_proba(seen_dev.x[known].numpy())
        weights = seen_dev.weights[known].numpy()
        loss = float(log_loss(seen_dev.y[known], chances, sample_weight=weights, labels=model.classes_))
        if best is None or loss < best[0]:
            best = (loss, model)
    assert best is not None
    return _tensors(best[1], centre, spread, head.linear.out_features)


def _scale(seen: Features) -> tuple[Tensor, Tensor]:
    """Centre [width] and one spread of the vectors, by the weights of their items."""
    weights = seen.weights[:, None]
    centre, middle = (weights * seen.x).sum(dim=0) / weights.sum(), (weights * seen.x).mean() / weights.mean()
    square = (weights * (seen.x - middle).square()).sum() / (weights.sum() * seen.x.shape[1] - 1).clamp(min=1e-6)
    return centre, square.sqrt().clamp(min=1e-6)


def _ridge(train: Features, dev: Features) -> tuple[Tensor, Tensor]:
    """Weight [1, width] and bias [1] of the ridge regression with the least error on dev."""
    from sklearn.linear_model import Ridge

    x, y, w = train.x.double().numpy(), train.y.double().numpy(), train.weights.double().numpy()
    models = [Ridge(alpha=1 / strength).fit(x, y, w) for strength in STRENGTHS]
    x, y, w = dev.x.double().numpy(), dev.y.double().numpy(), dev.weights.double().numpy()
    best = min(models, key=lambda model: float((w * (model.predict(x) - y) ** 2).sum()))
    return torch.tensor(best.coef_)[None], torch.tensor([float(best.intercept_)])


def _each_label(train: Features, dev: Features, head: MultiLabel) -> tuple[Tensor, Tensor]:
    """Weights [labels, width] and biases [labels] of a logistic regression for each label, least in loss on dev."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    x, y, w = train.x.double(), train.y.double(), train.weights.double()
    x_dev, y_dev, w_dev = dev.x.double(), dev.y.double(), dev.weights.double()
    present = None if head.class_weights is None else torch.tensor(head.class_weights, dtype=torch.float64)
    share = (((w[:, None] * y).sum(dim=0) + 0.5) / (w.sum() + 1)).clamp(max=1 - 1e-6)
    found: list[tuple[float, Tensor, Tensor]] = []
    for strength in STRENGTHS:
        weight, bias = x.new_zeros(y.shape[1], x.shape[1]), torch.log(share / (1 - share))
        for label in range(y.shape[1]):
            if 0 < y[:, label].sum() < len(y):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)
                    own = w if present is None else w * (1 + (present[label] - 1) * y[:, label])
                    model = LogisticRegression(C=strength, max_iter=60).fit(x.numpy(), y[:, label].numpy(), own.numpy())
                weight[label], bias[label] = torch.tensor(model.coef_[0]), float(model.intercept_[0])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            x_dev @ weight.T + bias, y_dev, weight=w_dev[:, None], pos_weight=present
        )
        found.append((float(loss), weight, bias))
    return min(found, key=lambda one: one[0])[1:]


def _tensors(model: Any, centre: Tensor, spread: Tensor, labels: int) -> Probe:
    """Fold centre and spread into the weights; a label without a row in train gets a low bias."""
    weight, bias = torch.tensor(model.coef_).double(), torch.tensor(model.intercept_).double()
    if len(model.classes_) == 2 and len(weight) == 1:
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    weight = weight / spread.double()
    bias = bias - weight @ centre.double()
    whole, low = torch.zeros(labels, weight.shape[1]), torch.full((labels,), float(bias.min()) - 2.0)
    classes = torch.tensor(model.classes_, dtype=torch.long)
    whole[classes], low[classes] = weight.float(), bias.float()
    return {"linear.weight": whole, "linear.bias": low}


@dataclass(frozen=True)
class Features:
    """What a linear sees: vectors `x` [items, width] in float32, targets `y` [items], `weights` in the loss [items]."""

    x: Tensor
    y: Tensor
    weights: Tensor


def features(head: Pooled | TokenClassification, examples: Sequence[Example], backbone: Backbone) -> Features:
    """Return what a head's linear sees on the bare backbone, without items that weigh nothing."""
    found: list[tuple[int, Tensor, Tensor]] = []
    for numbers, batch, hidden in states(examples, backbone):
        if isinstance(head, Pooled):
            pooled = head.pool(hidden, batch).cpu()
            found += [(i, pooled[n : n + 1], torch.tensor([examples[i].target])) for n, i in enumerate(numbers)]
            continue
        for n, i in enumerate(numbers):
            at = torch.tensor([p for p, t in enumerate(examples[i].target) if t != -100], dtype=torch.long)
            target = torch.tensor([examples[i].target[p] for p in at.tolist()], dtype=torch.long)
            found.append((i, hidden[n, at.to(hidden.device)].float().cpu(), target))
    found.sort(key=lambda item: item[0])
    x, y = torch.cat([item[1] for item in found]), torch.cat([item[2] for item in found])
    weights = torch.cat([torch.full((len(item[1]),), examples[item[0]].weight) for item in found])
    seen = torch.ones(len(y), dtype=torch.bool) if y.is_floating_point() else y >= 0
    if head.class_weights is not None and not y.is_floating_point():
        weights = weights * torch.tensor(head.class_weights)[y.clamp(min=0)]
    seen &= weights > 0
    return Features(x[seen][:MOST], y[seen][:MOST], weights[seen][:MOST])
