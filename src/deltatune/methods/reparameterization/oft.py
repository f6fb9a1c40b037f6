"""OFT: orthogonal turns of a linear's input, block by block."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Selection, Site
from deltatune.backbone.weights import linear_at
from deltatune.delta.layer import Layer, Needs, Params, Port, constant
from deltatune.delta.method import Family, Method
from deltatune.errors import SiteError


class OFT(Method):
    """Turn the input of a linear by trained rotations of blocks of it.

    y = W (R x) + bias, with R made of d_in / b blocks [b, b] on its diagonal, each the Cayley transform
    (I + Q)^-1 (I - Q) of a skew-symmetric Q; b must divide d_in. R [blocks, b (b - 1) / 2] holds the upper triangles of
    the Qs. Parameters: d_in (b - 1) / 2 a site; b (b - 1) / 2 with `share`, one block for all. Angles between rows of W
    stay as they are. At inference it can be merged and then costs nothing. Start: Q = 0 (the identity). With `neumann`
    terms the inverse is a series, I + 2 Q + 2 Q^2 + ... + Q^(terms - 1), faster for large blocks and orthogonal for
    small Q only (its Q has the other sign, as in PEFT). It stands at linears alone, and changes no bias. A fused linear
    has one input for q, k and v: there W (R x - x) is added, which reads the weight and costs the product once more.
    Source: Qiu et al. 2023, Controlling Text-to-Image Diffusion by Orthogonal Finetuning, arXiv:2306.07280; the series:
    Qiu et al. 2025, arXiv:2506.19847.
    """

    family: ClassVar[Family] = "reparameterization"
    paper: ClassVar[str] = "arXiv:2306.07280"
    rate: ClassVar[float] = 3e-3

    b: int = Field(default=32, ge=2)
    share: bool = False
    neumann: int | None = Field(default=None, ge=4)
    at: str = "attn.{q,v}"

    def sites(self, backbone: Backbone) -> Selection:
        selected = super().sites(backbone)
        for site in selected:
            linear_at(backbone.module, site)
        return selected

    def layer(self, site: Site, generator: torch.Generator) -> Layer:
        if site.d_in % self.b:
            near = sorted((d for d in range(2, site.d_in + 1) if not site.d_in % d), key=lambda d: abs(d - self.b))
            said = " or ".join(map(str, near[:2])) or "no block at all"
            raise SiteError(
                f"oft: blocks of b={self.b} do not divide the {site.d_in} inputs of {site.key}; take {said}"
            )
        kind = TurnInput if site.view is None else TurnRows
        return kind(1 if self.share else site.d_in // self.b, self.b, self.neumann)


def turn(q: Tensor, terms: int | None) -> Tensor:
    """Return R - I of skew-symmetric matrices q [..., b, b]: exact, or by a series of that many terms."""
    if terms is None:
        return torch.linalg.solve(torch.eye(q.shape[-1], dtype=q.dtype, device=q.device) + q, -2 * q, left=False)
    power, total = q, 2 * q
    for _ in range(terms - 3):
        power = power @ q
        total = total + 2 * power
    return total + power @ q


def apply(x: Tensor, change: Tensor) -> Tensor:
    """Return x [..., positions, width] times blocks [..., blocks or 1, b, b], block by block."""
    parts = x.unflatten(-1, (-1, change.shape[-1])).transpose(-2, -3)
    return (parts @ change).transpose(-2, -3).flatten(-2)


class TurnInput(Layer):
    """R x at the entry of a linear, with x a row and R to its right."""

    port: ClassVar[Port] = "input"
    reads_input: ClassVar[bool] = False
    mergeable: ClassVar[bool] = True

    def __init__(self, blocks: int, b: int, neumann: int | None) -> None:
        super().__init__()
        self.b, self.neumann = b, neumann
        self.R = constant((blocks, b * (b - 1) // 2), 0.0)

    def static(self) -> tuple[Any, ...]:
        return (self.b, self.neumann)

    def change(self, p: Params) -> Tensor:
        """Return R - I, [deltas, blocks, b, b]."""
        upper = torch.triu_indices(self.b, self.b, 1, device=p.R.device)
        with torch.autocast(p.R.device.type, enabled=False):  # nothing solves in half precision
            q = p.R.new_zeros(*p.R.shape[:-1], self.b, self.b, dtype=torch.promote_types(p.R.dtype, torch.float32))
            q[..., upper[0], upper[1]] = p.R.to(q)
            return turn(q - q.mT, self.neumann).to(p.R)

    def forward(self, p: Params, x: Tensor | None, h: Tensor) -> Tensor:
        return h + apply(h, self.change(p))

    def merged(self, p: Params, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + apply(weight, self.change(p)[0].mT), bias


class TurnRows(TurnInput):
    """W (R x - x) beside the part of a fused linear whose rows are W."""

    port: ClassVar[Port] = "output"
    reads_input: ClassVar[bool] = True
    needs: ClassVar[Needs] = "weight-read"
    additive: ClassVar[bool] = True

    def read(self, p: Params, weight: Tensor, bias: Tensor | None) -> Params:
        return Params({"change": self.change(p), "weight": weight[None]})

    def forward(self, p: Params, x: Tensor | None, h: Tensor) -> Tensor:
        assert x is not None
        return h + torch.nn.functional.linear(apply(x, p.change), p.weight[0])

    def merged(self, p: Params, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + apply(p.weight[0], p.change[0].mT), bias
