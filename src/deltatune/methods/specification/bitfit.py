"""BitFit: train the biases alone."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Selection, Site
from deltatune.delta.layer import Layer, Params, constant
from deltatune.delta.method import Family, Method, existing


class BitFit(Method):
    """Change every bias of the network.

    b <- b + d, with d [d_out] at each linear and norm that has a bias; where the backbone has none (Llama, T5), each
    linear gets one. Parameters: the number of biases. At inference it can be merged and then costs nothing. Start: zero
    (the identity). Source: Ben Zaken et al. 2022, BitFit, arXiv:2106.10199.
    """

    family: ClassVar[Family] = "specification"
    paper: ClassVar[str] = "arXiv:2106.10199"
    rate: ClassVar[float] = 1e-2

    at: str = "attn.{q,k,v,o} cross.{q,k,v,o} ffn.{up,gate,down} norm.{embed,attn,cross,ffn,final}"

    def sites(self, backbone: Backbone) -> Selection:
        selected = backbone.anatomy.select(existing(self.at, backbone), self.blocks)
        with_bias = [site for site in selected if site.bias]
        linears = [site for site in selected if not site.name.startswith("norm")]
        return Selection(with_bias or linears or selected)

    def layer(self, site: Site, generator: torch.Generator) -> BiasLayer:
        return BiasLayer(site.d_out)


class BiasLayer(Layer):
    """h + d."""

    reads_input: ClassVar[bool] = False
    mergeable: ClassVar[bool] = True
    linear: ClassVar[Literal["linear", "bilinear", "no"]] = "linear"
    proportional: ClassVar[tuple[str, ...]] = ("bias",)
    additive: ClassVar[bool] = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = constant((width,), 0.0)

    def forward(self, p: Params, x: Tensor | None, h: Tensor) -> Tensor:
        return h + p.bias

    def merged(self, p: Params, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, p.bias[0, 0] if bias is None else bias + p.bias[0, 0]
