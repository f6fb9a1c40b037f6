"""Prefix tuning: trained keys and values before those of the text, in every block."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Selection, Site
from deltatune.delta.layer import KeyValueLayer, Params, normal
from deltatune.delta.method import Family, Method, existing
from deltatune.errors import SiteError


class Prefix(Method):
    """Let every query attend to n trained keys and values as well.

    K <- [P_k; K], V <- [P_v; V]. Parameters: 2 n d_kv a site (self-attention and, where there is one, cross-attention).
    At inference attention is n keys longer; it cannot be merged. Start: P normal; not the identity. The plain form
    without the re-parameterising network of Li and Liang 2021 (arXiv:2101.00190), as in P-tuning v2. Source: Liu et al.
    2022, P-Tuning v2, arXiv:2110.07602.
    """

    family: ClassVar[Family] = "addition"
    paper: ClassVar[str] = "arXiv:2101.00190"
    rate: ClassVar[float] = 1e-1

    n: int = Field(default=16, ge=1)
    std: float = Field(default=0.02, ge=0)
    shift: bool = False  # the text's positions begin after the prefix, as where a cache holds it (PEFT)
    at: str = "attn cross"

    def sites(self, backbone: Backbone) -> Selection:
        selected = backbone.anatomy.select(existing(self.at, backbone), self.blocks)
        lacking = [site.key for site in selected if site.heads is None]
        if self.shift and backbone.kind == "encoder-decoder":
            raise SiteError("shift=True needs positions that can be moved; an encoder-decoder has none to move")
        if lacking:
            raise SiteError(f"a prefix needs attention sites ('attn', 'cross'); it cannot stand at {lacking[0]}")
        return selected

    def layer(self, site: Site, generator: torch.Generator) -> PrefixLayer:
        return PrefixLayer(site, self.n, self.std, self.shift, generator)


class PrefixLayer(KeyValueLayer):
    """n keys and n values."""

    def __init__(self, site: Site, n: int, std: float, shift: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.shift = n if shift else 0
        assert site.heads is not None
        width = site.heads.number * site.heads.width
        self.keys = normal((n, width), std, generator)
        self.values = normal((n, width), std, generator)

    def keys_values(self, p: Params) -> tuple[Tensor, Tensor]:
        return p.keys, p.values
