"""(IA)³: trained scales on keys, values and the inside of the feed-forward."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Selection, Site
from deltatune.delta.layer import Layer, Params, Port, constant
from deltatune.delta.method import Family, Method


class IA3(Method):
    """Scale keys, values and the inner activations of the feed-forward element by element.

    K <- l_k * K, V <- l_v * V, and W_down gets l_ff * x for its input x. Parameters: d_k + d_v + d_ff a block. At
    inference it can be merged and then costs nothing. Start: ones (the identity). Source: Liu et al. 2022, Few-Shot
    Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, arXiv:2205.05638.
    """

    family: ClassVar[Family] = "addition"
    paper: ClassVar[str] = "arXiv:2205.05638"
    rate: ClassVar[float] = 3e-2

    at: str = "attn.{k,v} ffn.down"

    def sites(self, backbone: Backbone) -> Selection:
        return backbone.anatomy.select(self.at, self.blocks)

    def layer(self, site: Site, generator: torch.Generator) -> Layer:
        return ScaleInput(site.d_in) if site.name == "ffn.down" else ScaleOutput(site.d_out)


class ScaleOutput(Layer):
    """l * h at the exit of a linear."""

    reads_input: ClassVar[bool] = False
    mergeable: ClassVar[bool] = True
    linear: ClassVar[Literal["linear", "bilinear", "no"]] = "linear"
    proportional: ClassVar[tuple[str, ...]] = ("scale",)
    neutral: ClassVar[float] = 1.0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = constant((width,), 1.0)

    def forward(self, p: Params, x: Tensor | None, h: Tensor) -> Tensor:
        return h * p.scale

    def merged(self, p: Params, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = p.scale[0, 0]
        return weight * scale.reshape(-1, *[1] * (weight.ndim - 1)), None if bias is None else bias * scale


class ScaleInput(ScaleOutput):
    """l * x at the entry of a linear."""

    port: ClassVar[Port] = "input"

    def merged(self, p: Params, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * p.scale[0], bias
