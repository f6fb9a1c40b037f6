"""Prompt tuning: trained tokens in the input."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Selection, Site, expand_names
from deltatune.backbone.weights import read_weight
from deltatune.delta.layer import DeepTokenLayer, Layer, Params, TokenLayer, constant
from deltatune.delta.method import Family, Method
from deltatune.errors import SiteError

DEEP = 1e-2  # the measured default rate of prompts before every block


class Prompt(Method):
    """Put n trained vectors among the input's embeddings, and with at="embed block" fresh ones before every block.

    E(x) <- [P; E(x)], with P [n, d]; BERT-likes get P after their first token. Before a block the n positions are given
    vectors of the block's own, and what they had become is dropped. Parameters: n d, at "embed block" that for each
    block (of an encoder-decoder's encoder). At inference every row is n tokens longer; it cannot be merged. Start:
    embeddings of tokens drawn from the vocabulary, among an image's patches and before blocks uniform; not the
    identity. At the input alone it needs many steps and a high rate, and is weak on small models. Sources: Lester et
    al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv:2104.08691; among patches and before
    blocks: Jia et al. 2022, Visual Prompt Tuning, arXiv:2203.12119, its shallow and its deep form.
    """

    family: ClassVar[Family] = "addition"
    paper: ClassVar[str] = "arXiv:2104.08691"
    rate: ClassVar[float] = 1e-3

    n: int = Field(default=20, ge=1)
    at: str = "embed"

    @property
    def lr(self) -> float:
        return DEEP if "block" in expand_names(self.at) else self.rate

    def sites(self, backbone: Backbone) -> Selection:
        found = backbone.anatomy.select(self.at, self.blocks)
        names = {site.name for site in found}
        if "embed" not in names or names - {"embed", "block"}:
            raise SiteError(f"a prompt stands at 'embed' or at 'embed block'; got at={self.at!r}")
        stacks = {site.stack for site in found if site.name == "embed"}
        # The first block's input is the embeddings.
        return Selection(s for s in found if s.name == "embed" or (s.stack in stacks and s.block))

    def layer(self, site: Site, generator: torch.Generator) -> PromptLayer:
        return (PromptLayer if site.name == "embed" else DeepPromptLayer)(site, self.n)

    def initialise(self, layer: Layer, site: Site, backbone: Backbone, generator: torch.Generator) -> None:
        prompt = layer.get_parameter("prompt")
        if backbone.takes_embeddings and site.name == "embed":
            table = read_weight(backbone.embeddings, "weight")
            rows = torch.randint(len(table), (self.n,), generator=generator)
            with torch.no_grad():
                prompt.copy_(table[rows.to(table.device)])
            return
        read = site.d_in  # numbers of which a position is made
        if not backbone.takes_embeddings:
            embed = backbone.module.get_submodule(backbone.anatomy.select("embed")[0].exit)
            read = next(m for m in embed.modules() if isinstance(m, torch.nn.Conv2d)).weight[0].numel()
        bound = (6 / (read + site.d_out)) ** 0.5
        with torch.no_grad():
            prompt.uniform_(-bound, bound, generator=generator)


class PromptLayer(TokenLayer):
    """n tokens."""

    def __init__(self, site: Site, n: int) -> None:
        super().__init__()
        self.prompt = constant((n, site.d_out), 0.0)

    def tokens(self, p: Params) -> Tensor:
        return p.prompt


class DeepPromptLayer(PromptLayer, DeepTokenLayer):
    """n tokens for one block."""
