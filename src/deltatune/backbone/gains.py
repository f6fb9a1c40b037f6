"""What a module makes of its weight: some norms multiply by 1 + weight, some tables by a number of their own."""

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


def scale_and_offset(module: nn.Module) -> tuple[float, float]:
    """Return (a, b) such that a module computes with a * weight + b: (1, 1) for Gemma's norms, (1, 0) for a linear.

    What a norm does is found out by its behaviour: the weight's values do not say it, and names differ.
    """
    if isinstance(module, nn.Embedding):
        return float(getattr(module, "embed_scale", 1.0)), 0.0
    return 1.0, _offset(module) if has_gain(module) else 0.0


def _offset(norm: Any) -> float:
    """What a norm, with or without a mean taken off, adds to its weight: 0 or 1, whichever comes closer."""
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
