"""What a norm makes of its weight: some multiply by it, some by 1 + weight."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.backbone.blocks import is_norm

FAR = 1e3  # so far from zero that no norm's epsilon counts


def has_gain(module: nn.Module) -> bool:
    """Say whether a norm has a weight to multiply by; OLMo's have none."""
    return is_norm(module) and isinstance(getattr(module, "weight", None), Tensor)


def offset_of(norm: Any) -> float:
    """Return what a module adds to its weight before it multiplies by it: 1 in Gemma's norms, 0 elsewhere.

    It is found out by the behaviour of the norm, with or without a mean taken off: names and values do not say it.
    """
    if not has_gain(norm):
        return 0.0
    draw = torch.Generator().manual_seed(0)
    x = FAR * torch.randn(1, len(norm.weight), generator=draw, dtype=torch.float64)
    with torch.no_grad():
        found = norm(x.to(norm.weight)).to(x)
    weight, bias = norm.weight.detach().to(x), getattr(norm, "bias", None)
    found = found if bias is None else found - bias.detach().to(x)

    def apart(option: tuple[float, float]) -> float:
        offset, centred = option
        y = x - centred * x.mean()
        return float((y / y.square().mean().sqrt() * (weight + offset) - found).norm())

    return min(product((0.0, 1.0), (0.0, 1.0)), key=apart)[0]
