"""Prompt tuning: trained tokens in the input."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Site
from deltatune.backbone.weights import read_weight
from deltatune.delta.layer import Layer, Params, TokenLayer, constant
from deltatune.delta.method import Family, Method


class Prompt(Method):
    """Put n trained vectors among the input's embeddings.

    E(x) <- [P; E(x)], with P [n, d]; BERT-likes get P after their first token. Parameters: n d. At inference every row
    is n tokens longer; it cannot be merged. Start: embeddings of tokens drawn from the vocabulary; not the identity. It
    needs many steps and a high rate, and is weak on small models. Among an image's patches it is the shallow form of
    Jia et al. 2022, Visual Prompt Tuning, arXiv:2203.12119, and starts uniform as there. Source: Lester et al. 2021,
    The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv:2104.08691.
    """

    family: ClassVar[Family] = "addition"
    paper: ClassVar[str] = "arXiv:2104.08691"
    lr: ClassVar[float] = 1e-3

    n: int = Field(default=20, ge=1)
    at: str = "embed"

    def layer(self, site: Site, generator: torch.Generator) -> PromptLayer:
        return PromptLayer(site, self.n)

    def initialise(self, layer: Layer, site: Site, backbone: Backbone, generator: torch.Generator) -> None:
        if not backbone.takes_embeddings:
            modules = backbone.module.get_submodule(site.exit).modules()
            patch = next(module for module in modules if isinstance(module, torch.nn.Conv2d))
            bound = (6 / (patch.weight[0].numel() + site.d_out)) ** 0.5
            with torch.no_grad():
                layer.get_parameter("prompt").uniform_(-bound, bound, generator=generator)
            return
        table = read_weight(backbone.embeddings, "weight")
        rows = torch.randint(len(table), (self.n,), generator=generator)
        with torch.no_grad():
            layer.get_parameter("prompt").copy_(table[rows.to(table.device)])


class PromptLayer(TokenLayer):
    """n tokens."""

    def __init__(self, site: Site, n: int) -> None:
        super().__init__()
        self.prompt = constant((n, site.d_out), 0.0)

    def tokens(self, p: Params) -> Tensor:
        return p.prompt
