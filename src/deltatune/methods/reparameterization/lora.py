"""LoRA: a low-rank change of a linear's weight."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from deltatune.backbone.sites import Site
from deltatune.delta.grouped import Grouping
from deltatune.delta.layer import ExpertLayer, Layer, Params, constant, normal, uniform
from deltatune.delta.method import Family, Method


class LoRA(Method):
    """Add a product of two thin matrices to a linear.

    y = W x + (alpha / r) B A x, with A [r, d_in] and B [d_out, r]. Parameters: r (d_in + d_out) a site. At inference it
    can be merged and then costs nothing. Start: A Kaiming-uniform, B zero (the identity). At `embed` x is one-hot: A
    [r, tokens] starts at zero, B normal, and no dropout acts. Inside a mixture of experts all experts share one A and
    B; with `per_expert` each has its own. It cannot change a norm or an activation. Source: Hu et al. 2021, LoRA:
    Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.
    """

    family: ClassVar[Family] = "reparameterization"
    paper: ClassVar[str] = "arXiv:2106.09685"
    rate: ClassVar[float] = 3e-3

    r: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    per_expert: bool = False
    at: str = "attn.{q,v}"

    def layer(self, site: Site, generator: torch.Generator) -> Layer:
        if site.experts and self.per_expert:
            return LoRAExpertLayer(site, self.r, self.alpha / self.r, self.dropout, generator)
        if site.words:
            return LoRATableLayer(site, self.r, self.alpha / self.r, generator)
        return LoRALayer(site, self.r, self.alpha / self.r, self.dropout, generator)


class LoRALayer(Layer):
    """B A x, scaled, beside a linear; `each` is a leading axis of A and B."""

    mergeable: ClassVar[bool] = True
    linear: ClassVar[Literal["linear", "bilinear", "no"]] = "bilinear"
    proportional: ClassVar[tuple[str, ...]] = ("B",)
    additive: ClassVar[bool] = True

    def __init__(
        self,
        site: Site,
        r: int,
        scale: float,
        dropout: float,
        generator: torch.Generator,
        each: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.A = uniform((*each, r, site.d_in), 1 / math.sqrt(site.d_in), generator)
        self.B = constant((*each, site.d_out, r), 0.0)

    def static(self) -> tuple[Any, ...]:
        return (self.scale,)

    def forward(self, p: Params, x: Tensor | None, h: Tensor) -> Tensor:
        assert x is not None
        return torch.baddbmm(h, x @ p.A.mT, p.B.mT, alpha=self.scale)

    def merged(self, p: Params, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scale * (p.B @ p.A)[0], bias


class LoRATableLayer(LoRALayer):
    """B times the columns of A that belong to the tokens, scaled, beside a table of embeddings."""

    reads_ids: ClassVar[bool] = True

    def __init__(self, site: Site, r: int, scale: float, generator: torch.Generator) -> None:
        super().__init__(site, r, scale, 0.0, generator)
        self.times = site.scale
        self.A = constant((r, site.words), 0.0)
        self.B = normal((site.d_out, r), 1.0, generator)

    def static(self) -> tuple[Any, ...]:
        return (self.scale, self.times)

    def forward(self, p: Params, x: Tensor | None, h: Tensor) -> Tensor:
        assert x is not None
        rows = p.A.mT.take_along_dim(x, dim=1)
        return torch.baddbmm(h, rows, p.B.mT, alpha=self.scale * self.times)


class LoRAExpertLayer(ExpertLayer, LoRALayer):
    """B A x of each pair's expert, scaled, inside a mixture: A [experts, r, d_in], B [experts, d_out, r]."""

    def __init__(self, site: Site, r: int, scale: float, dropout: float, generator: torch.Generator) -> None:
        super().__init__(site, r, scale, dropout, generator, each=(site.experts,))

    def pairs(self, p: Params, x: Tensor | None, h: Tensor, expert: Tensor) -> Tensor:
        assert x is not None
        deltas, experts = p.A.shape[:2]
        group = expert + experts * torch.arange(deltas, device=expert.device)[:, None]
        own = Grouping(group.flatten(), deltas * experts)
        inner = own.product(x.flatten(0, 1), p.A.flatten(0, 1))
        return h + self.scale * own.product(inner, p.B.flatten(0, 1)).view_as(h)
