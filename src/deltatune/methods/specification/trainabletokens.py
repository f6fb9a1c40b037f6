"""Trainable tokens: train chosen rows of the table of embeddings."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Selection, Site, numbers
from deltatune.delta.layer import Layer, Params, constant
from deltatune.delta.method import Family, Method
from deltatune.errors import SiteError


class TrainableTokens(Method):
    """Change the embeddings of chosen tokens.

    E[t] <- E[t] + D[t] for the tokens t that `tokens` names by their numbers ("-4:" the last four, "7,3" these two), D
    [tokens, d]; all of them by default. Parameters: d a token. At inference it can be merged and then costs nothing.
    Start: zero (the identity). At `lm_head` it changes the scores of the tokens alike: a head that shares the table
    learns with it under at="embed lm_head", tie="change", and stays as it is under at="embed". It cannot change how
    tokens are put together. Source: Artetxe et al. 2020, On the Cross-lingual Transferability of Monolingual
    Representations, arXiv:1910.11856, where all rows are trained; in PEFT `trainable_token_indices`.
    """

    family: ClassVar[Family] = "specification"
    paper: ClassVar[str] = "arXiv:1910.11856"
    rate: ClassVar[float] = 1e-3

    tokens: str = ":"
    at: str = "embed"

    def sites(self, backbone: Backbone) -> Selection:
        selected = super().sites(backbone)
        # Beside a network of images the patches are an `embed`, too.
        words = [site for site in selected if site.words or site.name != "embed"]
        if not words:
            raise SiteError(f"trainable tokens are rows of a table of tokens; {backbone.name} has none at {self.at!r}")
        return Selection(words)

    def layer(self, site: Site, generator: torch.Generator) -> Layer:
        if site.words:
            return RowsLayer(self.tokens, site.words, site.d_out, site.scale)
        if site.name == "lm_head":
            return ScoresLayer(self.tokens, site.d_out, site.d_in, 1.0)
        raise SiteError(f"trainable tokens are rows of a table: expected at='embed' or 'lm_head', got {site.name!r}")


class _Rows(Layer):
    """D, for chosen rows of a table of `words` rows that multiplies them by `scale`."""

    mergeable: ClassVar[bool] = True
    linear: ClassVar[Literal["linear", "bilinear", "no"]] = "linear"
    proportional: ClassVar[tuple[str, ...]] = ("change",)
    additive: ClassVar[bool] = True

    chosen: Tensor

    def __init__(self, tokens: str, words: int, width: int, scale: float) -> None:
        super().__init__()
        chosen = numbers(tokens, words, "tokens")
        if not chosen:
            raise SiteError(f"tokens={tokens!r} names no tokens; the table has {words}")
        self.text, self.words, self.scale = tokens, words, scale
        self.register_buffer("chosen", torch.tensor(chosen), persistent=False)
        self.change = constant((len(self.chosen), width), 0.0)

    def static(self) -> tuple[Any, ...]:
        return (self.text, self.words, self.scale)


class RowsLayer(_Rows):
    """h + D[t] at a table, for the chosen among the tokens t."""

    reads_ids: ClassVar[bool] = True

    def forward(self, p: Params, x: Tensor | None, h: Tensor) -> Tensor:
        assert x is not None
        known, order = self.chosen.sort()
        place = torch.searchsorted(known, x).clamp(max=len(known) - 1)
        own = p.change.take_along_dim(order[place], dim=1)
        return torch.where(known[place] == x, h + self.scale * own, h)

    def merged(self, p: Params, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.index_add(1, self.chosen.to(weight.device), p.change[0].mT), bias


class ScoresLayer(_Rows):
    """h + D x at a language-model head, for the chosen tokens' scores."""

    def forward(self, p: Params, x: Tensor | None, h: Tensor) -> Tensor:
        assert x is not None
        return h.index_add(-1, self.chosen, x @ p.change.mT)

    def merged(self, p: Params, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.index_add(0, self.chosen.to(weight.device), p.change[0]), bias
