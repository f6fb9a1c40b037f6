"""Laws on every architecture that reads text: each law meets each architecture, with one method after another.

A pairwise covering set in `make test` (every law × architecture, method × architecture and law × method occurs), the
full product in `make test-all`.
"""

from __future__ import annotations

from functools import cache

import pytest
from tests.backbone.families import FAMILIES as ALL
from tests.backbone.families import build, kind
from tests.laws.subjects import METHODS, SPECS

from deltatune.backbone.load import Backbone
from deltatune.laws import LAWS, Subject
from deltatune.laws.families import FAMILIES as UNDER_ALL_LAWS

READ_TEXT = tuple(f for f in ALL if kind(f) in ("text", "causal", "seq2seq") and f not in UNDER_ALL_LAWS)


@cache
def backbone(family: str) -> Backbone:
    return Backbone(build(family), name=family)


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
def test_law_holds(law: str, method: str, family: str) -> None:
    LAWS[law](Subject(SPECS[method], backbone(family)))
