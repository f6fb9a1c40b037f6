"""Laws on every architecture that reads text: each law meets each architecture, with one method after another.

A pairwise covering set in `make test` (every law × architecture, method × architecture and law × method occurs), the
full product in `make test-all`.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import pytest
import torch
from tests.backbone.families import FAMILIES as ALL
from tests.backbone.families import build, kind
from tests.laws.subjects import METHODS, SPECS, exemptions

from deltatune.backbone.load import Backbone
from deltatune.delta.delta import Delta
from deltatune.errors import RoutingError, SiteError
from deltatune.laws import LAWS, Subject
from deltatune.laws.families import FAMILIES as UNDER_ALL_LAWS
from deltatune.laws.subject import TOLERANCE

# Each row alone or padded, their own outputs differ, with no delta anywhere: rows of one length there.
PADDING_MATTERS = ("convbert", "nystromformer", "yoso")
# Attention computes in float32, whatever the weights are.
SINGLE = ("codegen", "gpt_neo", "gptj", "mpt")
UNABLE = {"xglm": "its mask has a number that float64 turns into infinity"}
READ_TEXT = tuple(
    f for f in ALL if kind(f) in ("text", "causal", "seq2seq") and f not in UNDER_ALL_LAWS and f not in UNABLE
)
# Laws in which several deltas have rows of one call.
MIXED = tuple(law for law, method, family in exemptions() if (method, family) == ("full", "bert"))


@cache
def backbone(family: str) -> Backbone:
    return Backbone(build(family), name=family)


@cache
def stands(method: str, family: str) -> bool:
    """Whether the method has a place: a prefix has none where attention asks transformers for nothing."""
    return "prefix" not in method or any(site.heads for site in backbone(family).anatomy.sites)


@cache
def alone_only(method: str, family: str) -> bool:
    """Whether all rows of a call must be one delta's: weights of its own, or a table that all rows share."""
    if method == "full":
        return True
    delta = Delta.build(SPECS[method], backbone(family), seed=0, name="it")
    return any(site.rows == "none" for site in delta.sites.values())


def cases() -> list[object]:
    found = []
    for number, family in enumerate(READ_TEXT):
        for place, law in enumerate(LAWS):
            for index, method in enumerate(METHODS):
                marks = () if index == (number + place) % len(METHODS) else pytest.mark.slow
                found.append(pytest.param(law, method, family, id=f"{law}-{method}-{family}", marks=marks))
    return found


@pytest.mark.parametrize(("law", "method", "family"), cases())
@pytest.mark.filterwarnings("ignore:delta .* was trained on the same backbone")
def test_law_holds(law: str, method: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if family in SINGLE:
        monkeypatch.setitem(TOLERANCE, torch.float64, 1e-5)
    subject = Subject(SPECS[method], backbone(family), length=7 if family in PADDING_MATTERS else None)
    if not stands(method, family):
        with pytest.raises(SiteError):
            Delta.build(SPECS[method], backbone(family), seed=0, name="it")
        return
    generates = law != "generates_as_alone" or kind(family) != "text"
    with pytest.raises(RoutingError) if law in MIXED and generates and alone_only(method, family) else nullcontext():
        LAWS[law](subject)
