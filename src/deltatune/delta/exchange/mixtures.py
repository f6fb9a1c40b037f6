"""A LoRA for each expert of a mixture in PEFT's format, which calls it `target_parameters`.

There a mixture's `gate_up_proj` [experts, 2 d_out, d_in] and `down_proj` are one LoRA each: `lora_A` is [experts * r,
d_in], expert after expert, and `lora_B` [d_out, r * experts], the expert last. Two of them on one module are nested, so
that the first is called `base_layer` in the names of the other. Here gate and up are two sites. Read: each gets its own
copy of A and its rows of B. Written: equal copies become one A again, different ones are stacked, and a LoRA that all
experts share is written once for each; these are the same functions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Site
from deltatune.delta.assemble import Member, Part, members_of
from deltatune.delta.delta import Delta
from deltatune.delta.exchange.places import Naming
from deltatune.delta.exchange.thin import PREFIX, by_pattern, check_options, check_shape
from deltatune.delta.experts import Key, mixtures
from deltatune.delta.method import members
from deltatune.errors import DeltaFileError, UserError

A, B, INNER = ".lora_A.weight", ".lora_B.weight", ".base_layer"


def read_mixtures(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], backbone: Backbone, where: str
) -> tuple[list[Member], dict[str, Tensor]]:
    """Make the members of LoRAs for each expert; return them and the tensors that are none of theirs.

    DeltaFileError if what `target_parameters` select is no mixture's, or its tensors lack or have other shapes.
    """
    wanted, rest = config.get("target_parameters") or [], dict(tensors)
    sites = mixtures(backbone.anatomy.sites)
    paths = [re.sub(rf"({re.escape(INNER)})*\.lora_[AB]\.weight$", "", key.removeprefix(PREFIX)) for key in tensors]
    naming = Naming(backbone, paths)

    def selected(key: Key, names: Sequence[str]) -> bool:
        own = f"{naming.theirs(key[0])}.{key[1]}"
        return any(own == name or own.endswith(f".{name}") for name in names)

    unknown = next((name for name in wanted if not any(selected(key, [name]) for key in sites)), None)
    if unknown is not None:
        known = " or ".join(dict.fromkeys(f"experts.{parameter}" for _, parameter in sites))
        raise DeltaFileError(
            f"{where} has a LoRA for each part of the parameter {unknown!r}, which is no mixture's experts in "
            f"{backbone.name!r}; expected {known or 'none: it has no such mixture'}"
        )
    if wanted:
        check_options(config, where)
    chosen = [key for key in sites if selected(key, wanted)]
    groups: dict[tuple[int, float], list[Part]] = {}
    for module, parameter in chosen:
        beside = [other for path, other in chosen if path == module]
        path = naming.theirs(module)
        base = PREFIX + path + INNER * (len(beside) - 1 - beside.index(parameter))
        for end in (A, B):
            if base + end not in rest:
                raise DeltaFileError(f"{where} lacks {base + end!r}, which its target_parameters select")
        r, alpha = (
            by_pattern(config.get(patterns), f"{path}.{parameter}", config[own])
            for patterns, own in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        alpha *= math.sqrt(r) if config.get("use_rslora") else 1
        at = sites[module, parameter]
        experts, d_out = at[0].experts, sum(site.d_out for site in at)
        flat = {end: rest.pop(base + end) for end in (A, B)}
        check_shape(flat[A], (experts * r, at[0].d_in), base + A, where)
        check_shape(flat[B], (d_out, r * experts), base + B, where)
        inner, outer = flat[A].unflatten(0, (experts, r)), flat[B].unflatten(1, (r, experts)).permute(2, 0, 1)
        halves = outer.split([site.d_out for site in at], dim=1)
        own_parts = [Part(site, {"A": inner, "B": half}) for site, half in zip(at, halves, strict=True)]
        groups.setdefault((r, float(alpha)), []).extend(own_parts)
    return [
        member
        for (r, alpha), parts in groups.items()
        for member in members_of("lora", {"r": r, "alpha": alpha, "per_expert": True}, parts, backbone)
    ], rest


def write_mixtures(
    delta: Delta, bound: Mapping[str, Site], backbone: Backbone
) -> tuple[dict[str, tuple[int, float]], dict[str, Tensor]]:
    """Return parameter's path -> rank and alpha, and tensors, of the LoRAs inside mixtures. UserError for dropout."""
    methods = [method.model_dump() for method in members(delta.spec)]
    if any(methods[int(address.split("/")[0])]["dropout"] for address in bound):
        raise UserError(f"PEFT has no dropout for a LoRA inside a mixture of experts; {delta.name!r} has: {delta.spec}")
    pieces: dict[Key, list[Piece]] = {}
    sites = mixtures(backbone.anatomy.sites)
    for key, at in sites.items():
        for address, site in bound.items():
            if site in at:
                start = sum(other.d_out for other in at[: at.index(site)])
                method, layer = methods[int(address.split("/")[0])], delta.layers[address]
                inner, outer = (
                    t.expand(site.experts, *t.shape[-2:]) for t in (layer.get_parameter("A"), layer.get_parameter("B"))
                )
                pieces.setdefault(key, []).append((start, inner, outer, method["alpha"] / method["r"]))
    ranks: dict[str, tuple[int, float]] = {}
    tensors: dict[str, Tensor] = {}
    for (module, parameter), own in pieces.items():
        beside = [other for path, other in pieces if path == module]
        base = PREFIX + module + INNER * (len(beside) - 1 - beside.index(parameter))
        inner, outer, scale = _joined(own, sum(site.d_out for site in sites[module, parameter]))
        tensors[base + A], tensors[base + B] = inner.flatten(0, 1), outer.permute(1, 2, 0).flatten(1)
        ranks[f"{module}.{parameter}"] = inner.shape[1], scale * inner.shape[1]
    return ranks, tensors


Piece = tuple[int, Tensor, Tensor, float]  # first row, A [experts, r, d_in], B [experts, rows, r], scale


def _joined(pieces: Sequence[Piece], d_out: int) -> tuple[Tensor, Tensor, float]:
    """One A [experts, r, d_in], B [experts, d_out, r] and scale for what stands at one parameter."""
    _, first, _, scale = pieces[0]
    apart = len({start for start, *_ in pieces}) == len(pieces)
    if apart and all(torch.equal(inner, first) and own == scale for _, inner, _, own in pieces):
        return first, sum((_placed(start, outer, d_out) for start, _, outer, _ in pieces), torch.zeros(())), scale
    columns = [_placed(start, outer * (own / scale), d_out) for start, _, outer, own in pieces]
    return torch.cat([inner for _, inner, _, _ in pieces], dim=1), torch.cat(columns, dim=2), scale


def _placed(start: int, part: Tensor, d_out: int) -> Tensor:
    """A part's rows among zeros."""
    return pad(part, (0, 0, start, d_out - start - part.shape[1]))
