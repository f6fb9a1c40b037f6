"""The bottleneck adapter after each sub-layer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deltatune.backbone.sites import Site
from deltatune.delta.activation import ACTIVATIONS, Activation
from deltatune.delta.layer import Layer, Params, constant, normal
from deltatune.delta.method import Family, Method


class Adapter(Method):
    """Put a small bottleneck network after each sub-layer, before its residual.

    h <- h + U act(D h + b) + c, with D [m, d] and U [d, m], act=gelu unless said. Parameters: 2 d m + d + m a site. At
    inference it costs two thin products a site and cannot be merged. Start: D normal, U zero (the identity). Source:
    Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP, arXiv:1902.00751; there U starts near zero.
    """

    family: ClassVar[Family] = "addition"
    paper: ClassVar[str] = "arXiv:1902.00751"
    rate: ClassVar[float] = 3e-3

    m: int = Field(default=24, ge=1)
    act: Activation = "gelu"
    at: str = "attn ffn"

    def layer(self, site: Site, generator: torch.Generator) -> AdapterLayer:
        return AdapterLayer(site, self.m, self.act, generator)


class AdapterLayer(Layer):
    """U act(D h + b) + c, added to h."""

    reads_input: ClassVar[bool] = False
    proportional: ClassVar[tuple[str, ...]] = ("up", "up_bias")

    def __init__(self, site: Site, m: int, act: Activation, generator: torch.Generator) -> None:
        super().__init__()
        self.act = act
        self.down = normal((m, site.d_out), site.d_out**-0.5, generator)
        self.down_bias = constant((m,), 0.0)
        self.up = constant((site.d_out, m), 0.0)
        self.up_bias = constant((site.d_out,), 0.0)

    def static(self) -> tuple[Any, ...]:
        return (self.act,)

    def forward(self, p: Params, x: Tensor | None, h: Tensor) -> Tensor:
        inner = ACTIVATIONS[self.act](torch.baddbmm(p.down_bias, h, p.down.mT))
        return torch.baddbmm(h + p.up_bias, inner, p.up.mT)
