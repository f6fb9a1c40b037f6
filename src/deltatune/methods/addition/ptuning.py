"""P-tuning: trained tokens in the input, made by a small network."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deltatune.backbone.sites import Site
from deltatune.delta.layer import Params, TokenLayer, normal, uniform
from deltatune.delta.method import Family, Method


class PTuning(Method):
    """Put n vectors that a small network makes of n trained ones among the input's embeddings.

    E(x) <- [W3 relu(W2 relu(W1 P + b1) + b2) + b3; E(x)] with P [n, d], W1 [m, d], W2 [m, m], W3 [d, m]; BERT-likes get
    them after their first token. Parameters: n d + 2 d m + m m + 2 m + d. At inference every row is n tokens longer,
    the network's output is all that counts, and it cannot be merged. Start: P normal, the network's weights uniform;
    not the identity. The network couples the tokens, which learn slowly by themselves. Source: Liu et al. 2021, GPT
    Understands, Too, arXiv:2103.10385; there an LSTM stands before it, and some of the tokens inside the text.
    """

    family: ClassVar[Family] = "addition"
    paper: ClassVar[str] = "arXiv:2103.10385"
    rate: ClassVar[float] = 3e-4

    n: int = Field(default=20, ge=1)
    m: int = Field(default=128, ge=1)
    at: str = "embed"

    def layer(self, site: Site, generator: torch.Generator) -> PTuningLayer:
        return PTuningLayer(site, self.n, self.m, generator)


class PTuningLayer(TokenLayer):
    """n tokens, made of P by two hidden layers."""

    def __init__(self, site: Site, n: int, m: int, generator: torch.Generator) -> None:
        super().__init__()
        d = site.d_out
        self.prompt = normal((n, d), 1.0, generator)
        for i, (inside, out) in enumerate(((d, m), (m, m), (m, d)), 1):
            self.register_parameter(f"W{i}", uniform((out, inside), inside**-0.5, generator))
            self.register_parameter(f"b{i}", uniform((out,), inside**-0.5, generator))

    def tokens(self, p: Params) -> Tensor:
        inner = torch.baddbmm(p.b1, p.prompt, p.W1.mT).relu()
        return torch.baddbmm(p.b3, torch.baddbmm(p.b2, inner, p.W2.mT).relu(), p.W3.mT)
