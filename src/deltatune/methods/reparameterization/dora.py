"""DoRA: a low-rank change of a weight's directions, and a trained length of each of its rows."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Site
from deltatune.backbone.weights import linear_at, read_linear
from deltatune.delta.layer import Layer, Needs, Params, constant, own_params, uniform
from deltatune.delta.method import Family, Method


class DoRA(Method):
    """Turn the rows of a linear's weight by a product of two thin matrices, and train their lengths apart.

    y = s * (W x + (alpha / r) B A x) + bias with s = m / |W + (alpha / r) B A|, the length of each row; A [r, d_in],
    B [d_out, r], m [d_out]. The length gets no gradient (section 4.3). It is made of W A^T, not of a dense W + B A: a
    delta costs in each forward what r + 1 more positions would, and all deltas of a bank read one W. Parameters:
    r (d_in + d_out) + d_out a site. At inference it can be merged and then costs nothing. Start: A Kaiming-uniform,
    B zero, m = |W| (the identity). It stands at linears alone and reads their weights (a quantised one is dequantised
    for it). Where other deltas act before it, s scales what they added, too:
    h <- h + (s - 1) (h - bias) + s (alpha / r) B A x, with W and bias the backbone's own. Dropout is on the x of B A x
    alone. Source: Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv:2402.09353.
    """

    family: ClassVar[Family] = "reparameterization"
    paper: ClassVar[str] = "arXiv:2402.09353"
    rate: ClassVar[float] = 3e-3

    r: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    at: str = "attn.{q,v}"

    def layer(self, site: Site, generator: torch.Generator) -> DoRALayer:
        return DoRALayer(site, self.r, self.alpha / self.r, self.dropout, generator)

    def initialise(self, layer: Layer, site: Site, backbone: Backbone, generator: torch.Generator) -> None:
        assert isinstance(layer, DoRALayer)
        weight, _ = read_linear(linear_at(backbone.module, site), site)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        layer.m.data = layer.lengths(own_params(layer, dtype, weight.device), weight.to(dtype))[0, 0]


class DoRALayer(Layer):
    """(s - 1) (h - bias) + s B A x, scaled, beside a linear."""

    needs: ClassVar[Needs] = "weight-read"
    mergeable: ClassVar[bool] = True

    def __init__(self, site: Site, r: int, scale: float, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.A = uniform((r, site.d_in), 1 / math.sqrt(site.d_in), generator)
        self.B = constant((site.d_out, r), 0.0)
        self.m = constant((site.d_out,), 1.0)  # of the weight, once it is known

    def static(self) -> tuple[Any, ...]:
        return (self.scale,)

    def lengths(self, p: Params, weight: Tensor) -> Tensor:
        """Return the lengths of the rows of W + scale B A, [deltas, 1, d_out], without a gradient."""
        with torch.no_grad():
            across = (torch.nn.functional.linear(p.A, weight).mT * p.B).sum(-1)  # of W and B A, row by row
            own = ((p.B @ (p.A @ p.A.mT)) * p.B).sum(-1)
            square = torch.linalg.vector_norm(weight, dim=1).square() + 2 * self.scale * across + self.scale**2 * own
            return square.clamp_min(0).sqrt()[:, None]

    def read(self, p: Params, weight: Tensor, bias: Tensor | None) -> Params:
        lengths = self.lengths(p, weight)
        there = lengths > 0
        # A row of zeros has no direction: it stays one, whatever its length should be.
        s = torch.where(there, p.m / lengths.where(there, 1), 1)
        offset = weight.new_zeros(len(weight)) if bias is None else bias
        return Params({"A": p.A, "B": self.scale * s.mT * p.B, "gain": s - 1, "bias": offset[None, None]})

    def forward(self, p: Params, x: Tensor | None, h: Tensor) -> Tensor:
        assert x is not None
        return torch.baddbmm(torch.addcmul(h, p.gain, h - p.bias), x @ p.A.mT, p.B.mT)

    def merged(self, p: Params, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gain = p.gain[0, 0]
        moved = None if bias is None else bias + gain * (bias - p.bias[0, 0])
        return weight + gain[:, None] * weight + (p.B @ p.A)[0], moved
