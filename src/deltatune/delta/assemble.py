"""Deltas put together from tensors at sites: what files of others and decompositions give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Site
from deltatune.delta.catalogue import find
from deltatune.delta.delta import Delta
from deltatune.delta.method import Composition, Method


@dataclass(frozen=True)
class Part:
    """One site of a delta to be made, with the tensors of its layer by name."""

    site: Site
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Member:
    """One method of a delta to be made, and what it holds at each site."""

    method: Method
    parts: list[Part]


def members_of(method: str, fields: Mapping[str, Any], parts: list[Part], backbone: Backbone) -> list[Member]:
    """Return one member for each set of blocks in which a site name occurs, so that `at` and `blocks` say where."""
    blocks: dict[str, set[tuple[str, int | None]]] = {}
    for part in parts:
        blocks.setdefault(part.site.name, set()).add((part.site.stack, part.site.block))
    groups: dict[frozenset[tuple[str, int | None]], list[str]] = {}
    for name, where in blocks.items():
        groups.setdefault(frozenset(where), []).append(name)
    made: list[Member] = []
    for here, names in groups.items():
        every = {(s.stack, s.block) for s in backbone.anatomy.by_key.values() if s.name in names}
        numbers = ",".join(map(str, sorted({block for _, block in here if block is not None})))
        own = {**fields, "at": " ".join(names), "blocks": None if here == every or not numbers else numbers}
        made.append(Member(find(method)(**own), [part for part in parts if part.site.name in names]))
    return made


def assembled(made: Sequence[Member], backbone: Backbone, name: str) -> Delta:
    """Return the delta of some members on a backbone; the tensors keep their dtype."""
    spec = made[0].method if len(made) == 1 else Composition([member.method for member in made])
    placed = [(number, part) for number, member in enumerate(made) for part in member.parts]
    delta = Delta(spec, [(number, part.site) for number, part in placed], name=name)
    delta.backbone_name, delta.fingerprint = backbone.name, backbone.fingerprint()
    for (_, part), layer in zip(placed, delta.layers.values(), strict=True):
        for key, tensor in part.tensors.items():
            layer.get_parameter(key).data = tensor.clone()  # its own, in the file's dtype: several sites may share one
    return delta.place(backbone)
