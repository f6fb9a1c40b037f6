"""VeRA: two trained vectors around random matrices that all sites share and nothing trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from deltatune.backbone.sites import Site, View
from deltatune.delta.frozen import projections
from deltatune.delta.layer import Layer, Params, constant
from deltatune.delta.method import Family, Method
from deltatune.errors import SiteError


class VeRA(Method):
    """Train two vectors around a product of random matrices that all sites share.

    y = W x + b * B (d * (A x)), with trained d [r] and b [d_out], and frozen A [r, width] and B [rows, r], of which
    each site takes the first d_in columns and the first d_out rows (in a fused linear those of its own part). A and B
    are drawn from `key` and held by no delta: neither trained nor counted nor saved, and once in memory for all deltas
    of one key and shape. `width` is the largest d_in among the sites unless it is given. Parameters: r + d_out a site.
    At inference it can be merged and then costs nothing. Start: d = d_initial, b zero (the identity). It cannot change
    a norm or an activation. Source: Kopiczko et al. 2023, VeRA: Vector-based Random Matrix Adaptation,
    arXiv:2310.11454.
    """

    family: ClassVar[Family] = "reparameterization"
    paper: ClassVar[str] = "arXiv:2310.11454"
    rate: ClassVar[float] = 1e-1

    r: int = Field(default=256, ge=1)
    key: int = Field(default=0, ge=0)
    d_initial: float = 0.1
    width: int | None = Field(default=None, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    at: str = "attn.{q,v}"

    def layer(self, site: Site, generator: torch.Generator) -> VeRALayer:
        return VeRALayer(site, self.r, self.key, self.d_initial, self.dropout)

    def join(self, placed: Sequence[tuple[Site, Layer]]) -> None:
        largest = max((site.d_in for site, _ in placed), default=0)
        if self.width is not None and self.width < largest:
            raise SiteError(f"vera: width={self.width} is less than the {largest} inputs of a site; leave it out")
        for _, layer in placed:
            assert isinstance(layer, VeRALayer)
            layer.width = self.width or largest


class VeRALayer(Layer):
    """b * B (d * (A x)) beside a linear."""

    mergeable: ClassVar[bool] = True
    linear: ClassVar[Literal["linear", "bilinear", "no"]] = "bilinear"
    proportional: ClassVar[tuple[str, ...]] = ("b",)
    additive: ClassVar[bool] = True

    def __init__(self, site: Site, r: int, key: int, d_initial: float, dropout: float) -> None:
        super().__init__()
        self.key, self.r, self.width, self.dropout = key, r, site.d_in, dropout
        self.d_in, self.d_out, self.view = site.d_in, site.d_out, site.view
        self.d = constant((r,), d_initial)
        self.b = constant((site.d_out,), 0.0)

    def static(self) -> tuple[Any, ...]:
        return (self.key, self.width, self.view)

    def frozen(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return A [r, d_in] and B [d_out, r] in the dtype and on the device of a tensor."""
        A, B = projections(self.key, self.r, self.width, rows(self.d_out, self.view), like.dtype, like.device)
        return A[:, : self.d_in], B if self.view is None else self.view.take(B.mT).mT

    def forward(self, p: Params, x: Tensor | None, h: Tensor) -> Tensor:
        assert x is not None
        A, B = self.frozen(x)
        return h + torch.nn.functional.linear(torch.nn.functional.linear(x, A) * p.d, B) * p.b

    def merged(self, p: Params, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A, B = self.frozen(weight)
        return weight + p.b[0, 0][:, None] * ((B * p.d[0]) @ A), bias


def rows(d_out: int, view: View | None) -> int:
    """Return how many rows of B a site needs: all of its linear's up to the last of its own."""
    if view is None or not view.period:
        return d_out if view is None else view.stop
    return d_out // (view.stop - view.start) * view.period
