"""Two computations written out in plain products, to compare both sides with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltatune.laws.families import inputs

Prefix = Sequence[tuple[Tensor, Tensor]]


@torch.no_grad()
def t5_encoder(model: Any, prefix: Prefix | None) -> Tensor:
    """T5's encoder on the family's batch, with `prefix` (keys and values [n, width] of each block) before its own.

    A prefix has no position, so its bias is zero (Li and Liang 2021, arXiv:2101.00190, where there are none).
    """
    batch = inputs("t5")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    rows, length = ids.shape
    heads = model.config.num_heads
    hidden = model.shared(ids)
    bias = model.encoder.block[0].layer[0].SelfAttention.compute_bias(length, length, device=ids.device)
    bias = bias.masked_fill(mask[:, None, None, :] == 0, torch.finfo(hidden.dtype).min)
    for number, block in enumerate(model.encoder.block):
        attention, feed_forward = block.layer
        own = attention.SelfAttention
        x = attention.layer_norm(hidden)
        query, key, value = own.q(x), own.k(x), own.v(x)
        before = 0
        if prefix is not None:
            key, value = (
                torch.cat([part.expand(rows, *part.shape), theirs], dim=1)
                for part, theirs in zip(prefix[number], (key, value), strict=True)
            )
            before = len(prefix[number][0])
        query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
        scores = query @ key.mT + torch.nn.functional.pad(bias, (before, 0))
        hidden = hidden + own.o((scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))
        hidden = hidden + feed_forward.DenseReluDense(feed_forward.layer_norm(hidden))
    made: Tensor = model.encoder.final_layer_norm(hidden)
    return made
