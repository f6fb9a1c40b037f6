"""The start of a head: logistic regression on the frozen features, so that no delta is trained against a random head.

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
from deltatune.heads.classification import SequenceClassification
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

    if not isinstance(head, SequenceClassification | TokenClassification):
        return None
    x, y = features(head, train, backbone)
    x_dev, y_dev = features(head, dev, backbone)
    if len(set(y.tolist())) < 2:
        return None
    centre, spread = x.mean(dim=0), x.std().clamp(min=1e-6)
    scaled, scaled_dev = ((part - centre) / spread for part in (x, x_dev))
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
    head: SequenceClassification | TokenClassification, examples: Sequence[Example], backbone: Backbone
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
            if isinstance(head, SequenceClassification):
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
    seen = y >= 0
    return x[seen][:MOST], y[seen][:MOST]
