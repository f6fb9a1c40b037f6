"""A method of a third party, in a file of its own: scale a sub-layer's output, a factor for each channel."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from deltatune.backbone.sites import Site
from deltatune.delta.layer import Layer, Params, constant
from deltatune.delta.method import Family, Method


class Gain(Method):
    """Scale what a sub-layer gives. h <- (1 + g) * h. Parameters: d a site."""

    family: ClassVar[Family] = "specification"
    paper: ClassVar[str] = "none"
    rate: ClassVar[float] = 1e-2

    at: str = "attn ffn"

    def layer(self, site: Site, generator: torch.Generator) -> Layer:
        return GainLayer(site.d_out)


class GainLayer(Layer):
    """(1 + g) * h."""

    reads_input: ClassVar[bool] = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = constant((width,), 0.0)

    def forward(self, p: Params, x: Tensor | None, h: Tensor) -> Tensor:
        return h + p.gain * h
