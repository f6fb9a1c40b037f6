"""The bottleneck adapter beside a sub-layer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deltatune.backbone.sites import Site
from deltatune.delta.activation import ACTIVATIONS, Activation
from deltatune.delta.layer import Layer, Params, constant, normal
from deltatune.delta.method import Family, Method


class ParallelAdapter(Method):
    """Put a small bottleneck network beside a sub-layer: it reads what the sub-layer reads.

    h <- h + s U act(D x + b) + c, with x the input of the sub-layer, D [m, d] and U [d, m], act=relu unless said.
    Parameters: 2 d m + d + m a site. At inference it costs two thin products a site and cannot be merged. Start: D
    normal, U zero (the identity). Source: He et al. 2022, Towards a Unified View of Parameter-Efficient Transfer
    Learning, arXiv:2110.04366 (the scaled parallel adapter; s = 4 there).
    """

    family: ClassVar[Family] = "addition"
    paper: ClassVar[str] = "arXiv:2110.04366"
    rate: ClassVar[float] = 1e-3

    m: int = Field(default=24, ge=1)
    scale: float = Field(default=4.0, gt=0)
    act: Activation = "relu"
    at: str = "ffn"

    @classmethod
    def name(cls) -> str:
        return "parallel_adapter"

    def layer(self, site: Site, generator: torch.Generator) -> ParallelAdapterLayer:
        return ParallelAdapterLayer(site, self.m, self.scale, self.act, generator)


class ParallelAdapterLayer(Layer):
    """s U act(D x + b) + c, added to h."""

    proportional: ClassVar[tuple[str, ...]] = ("up", "up_bias")
    additive: ClassVar[bool] = True

    def __init__(self, site: Site, m: int, scale: float, act: Activation, generator: torch.Generator) -> None:
        super().__init__()
        self.scale, self.act = scale, act
        self.down = normal((m, site.d_in), site.d_in**-0.5, generator)
        self.down_bias = constant((m,), 0.0)
        self.up = constant((site.d_out, m), 0.0)
        self.up_bias = constant((site.d_out,), 0.0)

    def static(self) -> tuple[Any, ...]:
        return (self.scale, self.act)

    def forward(self, p: Params, x: Tensor | None, h: Tensor) -> Tensor:
        assert x is not None
        inner = ACTIVATIONS[self.act](torch.baddbmm(p.down_bias, x, p.down.mT))
        return torch.baddbmm(h + p.up_bias, inner, p.up.mT, alpha=self.scale)
