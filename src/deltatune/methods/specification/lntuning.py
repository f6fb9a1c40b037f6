"""LN-tuning: train the gains and biases of the norms."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from deltatune.backbone.gains import has_gain
from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Selection, Site
from deltatune.delta.layer import Layer, Params, constant
from deltatune.delta.method import Family, Method, existing
from deltatune.errors import SiteError


class LNTuning(Method):
    """Change gain and bias of the blocks' norms.

    The gain g of a norm becomes g (1 + c) and its bias b becomes b (1 + c) + e, which is h + c * h + e for its output
    h. c and e are [d], e only where the norm has a bias (an RMSNorm has none). Parameters: d a norm without a bias, 2 d
    a norm with one. At inference it can be merged and then costs nothing. Start: zero (the identity). A gain of zero it
    cannot move, and a norm without a gain has nothing to train. `norm.{embed,final}` stand outside the blocks: name
    them in `at`. Source: Qi et al. 2022, Parameter-Efficient Tuning on Layer Normalization for Pre-trained Language
    Models, arXiv:2211.08682; there g and b are trained themselves.
    """

    family: ClassVar[Family] = "specification"
    paper: ClassVar[str] = "arXiv:2211.08682"
    rate: ClassVar[float] = 1e-2

    at: str = "norm.{attn,cross,ffn}"

    def sites(self, backbone: Backbone) -> Selection:
        selected = backbone.anatomy.select(existing(self.at, backbone), self.blocks)
        with_gain = [site for site in selected if has_gain(backbone.module.get_submodule(site.exit))]
        if not with_gain:
            raise SiteError(f"LN-tuning needs norms with a gain; {backbone.name} has none at {self.at!r}")
        return Selection(with_gain)

    def layer(self, site: Site, generator: torch.Generator) -> GainLayer:
        return AffineLayer(site.d_out) if site.bias else GainLayer(site.d_out)


class GainLayer(Layer):
    """h + c * h, after a norm without a bias."""

    reads_input: ClassVar[bool] = False
    mergeable: ClassVar[bool] = True
    linear: ClassVar[Literal["linear", "bilinear", "no"]] = "linear"
    proportional: ClassVar[tuple[str, ...]] = ("gain",)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = constant((width,), 0.0)

    def forward(self, p: Params, x: Tensor | None, h: Tensor) -> Tensor:
        return h + h * p.gain

    def merged(self, p: Params, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factor = 1 + p.gain[0, 0]
        return weight * factor, None if bias is None else bias * factor


class AffineLayer(GainLayer):
    """h + c * h + e, after a norm with a bias."""

    proportional: ClassVar[tuple[str, ...]] = ("gain", "bias")

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.bias = constant((width,), 0.0)

    def forward(self, p: Params, x: Tensor | None, h: Tensor) -> Tensor:
        return super().forward(p, x, h) + p.bias

    def merged(self, p: Params, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().merged(p, weight, bias)
        return weight, p.bias[0, 0] if bias is None else bias + p.bias[0, 0]
