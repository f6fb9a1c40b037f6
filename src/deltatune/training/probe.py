"""The start of a head: a regression on the frozen features, so that no delta is trained against a random head.

Source: linear probing before fine-tuning, Kumar et al. 2022, Fine-Tuning can Distort Pretrained Features,
arXiv:2202.10054. The features of a task are read once, whoever asks for them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.heads.base import Example, TaskHead, collate
from deltatune.heads.classification import MultiLabel
from deltatune.heads.pooled import Pooled
from deltatune.heads.regression import Regression
from deltatune.heads.tokens import TokenClassification

# Inverse regularisation. The dev loss chooses, not the dev score: a head that knows its training rows by heart leaves a
# delta nothing to learn from (docs/log.md, 2026-11-21).
STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
MOST = 8000  # vectors that a probe is fitted to
TOKENS = 2048

Probe = dict[str, Tensor]


def probe(head: TaskHead, train: Sequence[Example], dev: Sequence[Example], backbone: Backbone) -> Probe | None:
    """Return the tensors of a head fitted to frozen features; None for a head that has no parameters.

    Deterministic: it depends on the rows and the backbone alone.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    if not isinstance(head, Pooled | TokenClassification):
        return None
    x, y = features(head, train, backbone)
    x_dev, y_dev = features(head, dev, backbone)
    centre, spread = x.mean(dim=0), x.std().clamp(min=1e-6)
    scaled, scaled_dev = ((part - centre) / spread for part in (x, x_dev))
    if isinstance(head, Regression | MultiLabel):
        fitted = _ridge if isinstance(head, Regression) else _each_label
        weight, bias = fitted(scaled.double(), y.double(), scaled_dev.double(), y_dev.double())
        weight = weight / spread.double()
        return {"linear.weight": weight.float(), "linear.bias": (bias - weight @ centre.double()).float()}
    if len(set(y.tolist())) < 2:
        return None
    best: tuple[float, Any] | None = None
    for strength in STRENGTHS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # stopped early is regularised, too
            model = LogisticRegression(C=strength, max_iter=60).fit(scaled.numpy(), y.numpy())
        known = torch.isin(y_dev, torch.tensor(model.classes_))
        if not known.any():
            return None
        loss = float(log_loss(y_dev[known], model.predict_proba(scaled_dev[known].numpy()), labels=model.classes_))
        if best is None or loss < best[0]:
            best = (loss, model)
    assert best is not None
    return _tensors(best[1], centre, spread, len(head.labels))


def _ridge(x: Tensor, y: Tensor, x_dev: Tensor, y_dev: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [1, width] and bias [1] of the ridge regression with the least error on dev."""
    from sklearn.linear_model import Ridge

    models = [Ridge(alpha=1 / strength).fit(x.numpy(), y.numpy()) for strength in STRENGTHS]
    best = min(models, key=lambda model: float(((model.predict(x_dev.numpy()) - y_dev.numpy()) ** 2).mean()))
    return torch.tensor(best.coef_)[None], torch.tensor([float(best.intercept_)])


def _each_label(x: Tensor, y: Tensor, x_dev: Tensor, y_dev: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [labels, width] and biases [labels] of a logistic regression for each label, least in loss on dev."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    share = ((y.sum(dim=0) + 0.5) / (len(y) + 1)).clamp(max=1 - 1e-6)
    found: list[tuple[float, Tensor, Tensor]] = []
    for strength in STRENGTHS:
        weight, bias = x.new_zeros(y.shape[1], x.shape[1]), torch.log(share / (1 - share))
        for label in range(y.shape[1]):
            if 0 < y[:, label].sum() < len(y):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)
                    model = LogisticRegression(C=strength, max_iter=60).fit(x.numpy(), y[:, label].numpy())
                weight[label], bias[label] = torch.tensor(model.coef_[0]), float(model.intercept_[0])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(x_dev @ weight.T + bias, y_dev)
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


def features(
    head: Pooled | TokenClassification, examples: Sequence[Example], backbone: Backbone
) -> tuple[Tensor, Tensor]:
    """Return what a head's linear sees on the bare backbone: vectors [items, width] in float32, and targets [items]."""
    found: list[tuple[int, Tensor, Tensor]] = []
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    with torch.no_grad():
        start = 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and (stop + 1 - start) * len(examples[order[stop]].ids) <= TOKENS:
                stop += 1
            chunk = [examples[i] for i in order[start:stop]]
            batch = collate(chunk, backbone)
            hidden = backbone.trunk(**batch.inputs).last_hidden_state
            if isinstance(head, Pooled):
                pooled = head.pool(hidden, batch).cpu()
                found += [
                    (i, pooled[n : n + 1], torch.tensor([examples[i].target])) for n, i in enumerate(order[start:stop])
                ]
            else:
                for n, i in enumerate(order[start:stop]):
                    at = torch.tensor([p for p, t in enumerate(examples[i].target) if t != -100], dtype=torch.long)
                    target = torch.tensor([examples[i].target[p] for p in at.tolist()], dtype=torch.long)
                    found.append((i, hidden[n, at.to(hidden.device)].float().cpu(), target))
            start = stop
    found.sort(key=lambda item: item[0])
    x, y = torch.cat([item[1] for item in found]), torch.cat([item[2] for item in found])
    if y.is_floating_point():
        return x[:MOST], y[:MOST]
    seen = y >= 0
    return x[seen][:MOST], y[seen][:MOST]
