"""A LoRA for each expert of a mixture in PEFT's format, which calls it `target_parameters`.

There a mixture's `gate_up_proj` [experts, 2 d_out, d_in] and `down_proj` are one LoRA each: `lora_A` is [experts * r,
d_in], expert after expert, and `lora_B` [d_out, r * experts], the expert last. Two of them on one module are nested, so
that the first is called `base_layer` in the names of the other. Here gate and up are two sites. Read: each gets its own
copy of A and its rows of B. Written: equal copies become one A again, different ones are stacked, and a LoRA that all
experts share is written once for each; these are the same functions.

Files from before transformers 5 have the LoRA of a linear for each expert (`experts.3.w1`); they are read, too.
"""

from __future__ import annotations

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
from deltatune.delta.exchange.places import Naming, site_less, targets
from deltatune.delta.exchange.thin import PREFIX, check_options, check_shape, rank_and_alpha
from deltatune.delta.experts import Key, mixtures
from deltatune.delta.method import members
from deltatune.errors import DeltaFileError, UserError

# The linears of an expert before transformers 5 -> sites.
LINEARS = {
    "w1": "ffn.gate", "gate_proj": "ffn.gate", "w3": "ffn.up", "up_proj": "ffn.up", "w2": "ffn.down",
    "down_proj": "ffn.down",
}  # fmt: skip
APART = re.compile(rf"{re.escape(PREFIX)}((.+)\.\w+\.experts)\.(\d+)\.({'|'.join(LINEARS)})\.lora_([AB])\.weight")
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
        r, alpha = rank_and_alpha(config, f"{path}.{parameter}")
        at = sites[module, parameter]
        experts, d_out = at[0].experts, sum(site.d_out for site in at)
        flat = {end: rest.pop(base + end) for end in (A, B)}
        check_shape(flat[A], (experts * r, at[0].d_in), base + A, where)
        check_shape(flat[B], (d_out, r * experts), base + B, where)
        inner, outer = flat[A].unflatten(0, (experts, r)), flat[B].unflatten(1, (r, experts)).permute(2, 0, 1)
        halves = outer.split([site.d_out for site in at], dim=1)
        own_parts = [Part(site, {"A": inner, "B": half}) for site, half in zip(at, halves, strict=True)]
        groups.setdefault((r, alpha), []).extend(own_parts)
    return [
        member
        for (r, alpha), parts in groups.items()
        for member in members_of("lora", {"r": r, "alpha": alpha, "per_expert": True}, parts, backbone)
    ], rest


def read_apart(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], backbone: Backbone, where: str
) -> tuple[list[Member], dict[str, Tensor]]:
    """Make the members of LoRAs at the linears of each expert; return them and the tensors that are none of theirs.

    DeltaFileError if they are at some experts of a mixture alone, or at others than `target_modules` select.
    """
    found: dict[tuple[str, str], dict[str, dict[int, Tensor]]] = {}  # path in the file, linear -> A, B -> by expert
    blocks: dict[str, str] = {}
    rest = dict(tensors)
    for key in tensors:
        match = APART.fullmatch(key)
        if match:
            path, block, expert, linear, half = match.groups()
            found.setdefault((path, linear), {"A": {}, "B": {}})[half][int(expert)] = rest.pop(key)
            blocks[path] = block
    if not found:
        return [], rest
    check_options(config, where)
    naming = Naming(backbone, blocks.values())
    # The block says which mixture it is: what stands between has other names now.
    mixed = {site.exit.rsplit(".", 2)[0]: site.exit for site in backbone.anatomy.sites if site.experts}
    named = {(site.exit, site.name): site for site in backbone.anatomy.sites if site.experts}
    everything = str(config.get("target_modules")).lower() == "all-linear"
    selected = (lambda path: True) if everything else targets(config)
    middle = next(iter(blocks)).removeprefix(next(iter(blocks.values())))
    linears = dict.fromkeys(linear for _, linear in found)
    for block in mixed:
        for linear in linears:
            path = naming.theirs(block) + middle
            if selected(f"{path}.0.{linear}") and (path, linear) not in found:
                raise DeltaFileError(f"{where} lacks tensors for '{path}.0.{linear}', which its target_modules select")
    groups: dict[tuple[int, float], list[Part]] = {}
    for (path, linear), halves in found.items():
        site = named.get((mixed.get(naming.ours(blocks[path]), ""), LINEARS[linear]))
        if site is None:
            raise site_less(f"{path}.0.{linear}", backbone, where)
        sizes = set()
        for e in range(site.experts):
            own = f"{path}.{e}.{linear}"
            if not selected(own):
                raise DeltaFileError(f"{where} has tensors for {own!r}, which its target_modules do not select")
            r, alpha = rank_and_alpha(config, own)
            sizes.add((r, alpha))
            for half, shape in (("A", (r, site.d_in)), ("B", (site.d_out, r))):
                key = f"{PREFIX}{own}.lora_{half}.weight"
                if e not in halves[half]:
                    raise DeltaFileError(f"{where} lacks {key!r}; the mixture has {site.experts} experts")
                check_shape(halves[half][e], shape, key, where)
        beyond = max(halves["A"] | halves["B"])
        if beyond >= site.experts:
            raise DeltaFileError(f"{where} has tensors for '{path}.{beyond}', but there are {site.experts} experts")
        if len(sizes) > 1:
            raise DeltaFileError(
                f"{where} has experts of several ranks or scales at {path!r}, which has no counterpart"
            )
        stacked = {half: torch.stack([own[e] for e in sorted(own)]) for half, own in halves.items()}
        groups.setdefault(sizes.pop(), []).append(Part(site, stacked))
    fields = {"dropout": config.get("lora_dropout") or 0.0, "per_expert": True}
    return [
        member
        for (r, alpha), parts in groups.items()
        for member in members_of("lora", {**fields, "r": r, "alpha": alpha}, parts, backbone)
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
