"""Parameter groups: every delta at its own rate, its head at its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from deltatune.delta.adapted import Adapted
from deltatune.delta.delta import Delta

HEAD_LR = 2e-3


def optimizer_groups(
    adapted: Adapted | Delta, *, lr: float | None = None, head_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return parameter groups for any torch optimiser: one for each delta's layers, one for its head.

    Each group is {"params", "lr", "weight_decay", "name"}. A delta's rate is its method's measured default, or `lr`; a
    head's is `head_lr`, without weight decay. A delta that is a head alone trains at its own rate.

        torch.optim.AdamW(dt.optimizer_groups(adapted))
    """
    deltas = [adapted.bank[name] for name in adapted.bank.names] if isinstance(adapted, Adapted) else [adapted]
    groups: list[dict[str, Any]] = []
    for delta in deltas:
        own = delta.spec.lr if lr is None else lr
        for_head = own if not len(delta.layers) else HEAD_LR if head_lr is None else head_lr
        heads = delta.head.parameters() if isinstance(delta.head, nn.Module) else ()
        parts = (
            (delta.name, delta.layers.parameters(), own, weight_decay),
            (f"{delta.name} head", heads, for_head, 0.0),
        )
        for name, parameters, rate, decay in parts:
            found = list(parameters)
            if found:
                groups.append({"params": found, "lr": rate, "weight_decay": decay, "name": name})
    return groups
