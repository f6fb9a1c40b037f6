"""The baseline without a delta: a head on frozen features."""

from __future__ import annotations

from typing import ClassVar

from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Selection
from deltatune.delta.method import Family, Method


class Head(Method):
    """Train the head alone: what the frozen features are worth.

    No parameters in the backbone, nothing to merge. It is the first figure to hold a delta against. Source: linear
    probing, Alain and Bengio 2016, arXiv:1610.01644.
    """

    family: ClassVar[Family] = "baseline"
    paper: ClassVar[str] = "arXiv:1610.01644"
    rate: ClassVar[float] = 3e-4

    at: str = ""

    def sites(self, backbone: Backbone) -> Selection:
        return Selection(())
