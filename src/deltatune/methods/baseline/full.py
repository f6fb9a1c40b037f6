"""The baseline that trains everything."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from deltatune.backbone.sites import Site
from deltatune.delta.layer import Params, WeightLayer, constant
from deltatune.delta.method import Family, Method


class Full(Method):
    """Train all weights, written as a change of each: W <- W + D.

    Parameters: all of the trunk. It costs a copy of the network for each delta, and the rows of a call cannot mix it
    with others. Start: zero (the identity). Source: ordinary fine-tuning, Howard and Ruder 2018, arXiv:1801.06146.
    """

    family: ClassVar[Family] = "baseline"
    paper: ClassVar[str] = "arXiv:1801.06146"
    rate: ClassVar[float] = 1e-4

    at: str = "weights"

    def layer(self, site: Site, generator: torch.Generator) -> FullLayer:
        return FullLayer(site)


class FullLayer(WeightLayer):
    """D for every parameter of the trunk, named by its canonical key."""

    mergeable: ClassVar[bool] = True
    linear: ClassVar[Literal["linear", "bilinear", "no"]] = "linear"

    def __init__(self, site: Site) -> None:
        super().__init__()
        for key, shape in site.shapes:
            self.register_parameter(key.replace(".", "|"), constant(shape, 0.0))

    def weight(self, p: Params, name: str, weight: Tensor) -> Tensor:
        change = getattr(p, name.replace(".", "|")).reshape(weight.shape)
        return (weight.to(change.dtype) + change).to(weight.dtype)
