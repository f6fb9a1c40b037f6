"""Prompt tuning, P-tuning and prefix tuning in PEFT's format: one tensor `prompt_embeddings`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Site
from deltatune.delta.assemble import Member, Part
from deltatune.delta.catalogue import find
from deltatune.delta.delta import Delta
from deltatune.delta.layer import Layer, TokenLayer, own_params
from deltatune.delta.method import members
from deltatune.errors import DeltaFileError, UserError

KEY = "prompt_embeddings"
PROMPT_OF_ENCODER = (
    "PEFT puts a prompt before the first token of an encoder, ours stands after it (the pooler reads it)"
)
PREFIX_OF_TWO = (
    "PEFT's prefix of an encoder-decoder stands in the decoder's cache alone and moves its relative positions, ours in "
    "every attention without a position"
)


def _table(tensors: Mapping[str, Tensor], expected: tuple[int, int], where: str) -> Tensor:
    extra = sorted(tensors.keys() - {KEY})
    if extra or KEY not in tensors:
        raise DeltaFileError(f"{where} {f'has {extra[0]!r}' if extra else 'holds no tensors'}; expected {KEY!r} alone")
    if tuple(tensors[KEY].shape) != expected:
        raise DeltaFileError(
            f"{where}: {KEY!r} has shape {tuple(tensors[KEY].shape)}, expected {expected} for this backbone"
        )
    return tensors[KEY]


def _only(delta: Delta) -> int:
    """The length of the one method of a delta. UserError if there are several."""
    methods = members(delta.spec)
    if len(methods) > 1:
        raise UserError(f"PEFT has one {methods[0].name()} a folder; {delta.name!r} is a composition: {delta.spec}")
    length: int = methods[0].model_dump()["n"]
    return length


def _facts(backbone: Backbone, length: int, site: Site) -> dict[str, Any]:
    """What PEFT asks of the backbone, under its names."""
    heads = site.heads.number if site.heads else backbone.module.config.num_attention_heads  # type: ignore[union-attr]
    return {
        "num_virtual_tokens": length,
        "token_dim": site.heads.number * site.heads.width if site.heads else site.d_out,
        "num_layers": next(iter(backbone.anatomy.depth.values())),
        "num_attention_heads": heads,
        "num_transformer_submodules": 1,
    }


# Prompts


def read_prompt(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], backbone: Backbone, where: str
) -> list[Member]:
    """Make the member of a prompt file. DeltaFileError where PEFT puts it at another place than ours.

    P-tuning's, too: what its network made is in the file, the network is not, so that it is a prompt from then on.
    """
    if backbone.kind == "encoder":
        raise DeltaFileError(f"{where} holds a prompt for an encoder, {backbone.name!r}: {PROMPT_OF_ENCODER}")
    if backbone.kind == "encoder-decoder" and config.get("num_transformer_submodules") != 1:
        raise DeltaFileError(
            f"{where} holds a prompt for the encoder and one for the decoder (num_transformer_submodules="
            f"{config.get('num_transformer_submodules')}); the decoder's input is no site here, expected 1"
        )
    site = backbone.anatomy.select("embed")[0]
    table = _table(tensors, (int(config["num_virtual_tokens"]), site.d_out), where)
    return [Member(find("prompt")(n=len(table)), [Part(site, {"prompt": table})])]


def write_prompt(
    delta: Delta, bound: Mapping[str, Site], backbone: Backbone
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and tensors of a prompt. UserError where PEFT would put it at another place."""
    config, address = _prompt_config(delta, bound, backbone)
    config = {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", **config}
    return config, {KEY: delta.layers[address].get_parameter("prompt")}


def write_p_tuning(
    delta: Delta, bound: Mapping[str, Site], backbone: Backbone
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and tensors of P-tuning: what its network makes, as PEFT keeps it. UserError as for a prompt."""
    config, address = _prompt_config(delta, bound, backbone)
    hidden = members(delta.spec)[0].model_dump()["m"]
    layer = delta.layers[address]
    assert isinstance(layer, TokenLayer)
    tokens = layer.tokens(own_params(layer, layer.get_parameter("prompt").dtype))[0]
    return {
        "peft_type": "P_TUNING",
        "encoder_reparameterization_type": "MLP",
        "encoder_hidden_size": hidden,
        **config,
    }, {KEY: tokens}


def _prompt_config(delta: Delta, bound: Mapping[str, Site], backbone: Backbone) -> tuple[dict[str, Any], str]:
    """What PEFT's prompts have in common, and the address of the one layer."""
    length = _only(delta)
    if backbone.kind == "encoder":
        raise UserError(f"{delta.name!r} cannot go to PEFT: {PROMPT_OF_ENCODER}")
    if len(bound) > 1:
        raise UserError(f"{delta.name!r} cannot go to PEFT, whose prompts stand in the input alone, not before blocks")
    ((address, site),) = bound.items()
    return _facts(backbone, length, site), address


# Prefixes


def read_prefix(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], backbone: Backbone, where: str
) -> list[Member]:
    """Make the member of a prefix file: a prefix that moves the text's positions on, as a cache does.

    The re-parameterising network, if there was one, is not in the file and is not needed.
    """
    if backbone.kind == "encoder-decoder":
        raise DeltaFileError(f"{where} cannot be read onto {backbone.name!r}: {PREFIX_OF_TWO}")
    sites = backbone.anatomy.select("attn")
    lacking = [site.key for site in sites if site.heads is None]
    if lacking:
        raise DeltaFileError(f"{where} holds a prefix, and {lacking[0]!r} of {backbone.name!r} takes none")
    length = int(config["num_virtual_tokens"])
    widths = [site.heads.number * site.heads.width for site in sites if site.heads]
    table = _table(tensors, (length, 2 * sum(widths)), where)
    columns = table.split([width for width in widths for _ in range(2)], dim=1)
    parts = [
        Part(site, {"keys": columns[2 * i].contiguous(), "values": columns[2 * i + 1].contiguous()})
        for i, site in enumerate(sites)
    ]
    return [Member(find("prefix")(n=length, shift=True, at="attn"), parts)]


def write_prefix(
    delta: Delta, bound: Mapping[str, Site], backbone: Backbone
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and tensors of a prefix. UserError where PEFT would compute something else."""
    length = _only(delta)
    if backbone.kind == "encoder-decoder":
        raise UserError(f"{delta.name!r} cannot go to PEFT: {PREFIX_OF_TWO}")
    if not members(delta.spec)[0].model_dump()["shift"]:
        raise UserError(
            f"{delta.name!r} cannot go to PEFT: there the text's positions begin after the prefix, and it was trained "
            f"with positions as they are; fit it with prefix(shift=True)"
        )
    layers = {site.block: (site, delta.layers[address]) for address, site in bound.items()}
    depth = next(iter(backbone.anatomy.depth.values()))
    missing = sorted(set(range(depth)) - layers.keys())
    if missing:
        raise UserError(
            f"{delta.name!r} has no prefix in block {missing[0]}; PEFT has one in each of the {depth} blocks"
        )
    columns: list[Tensor] = []
    for block in range(depth):
        layer = layers[block][1]
        assert isinstance(layer, Layer)
        columns += [layer.get_parameter("keys"), layer.get_parameter("values")]
    facts = _facts(backbone, length, layers[0][0])
    config = {
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "encoder_hidden_size": facts["token_dim"],
        **facts,
    }
    return config, {KEY: torch.cat(columns, dim=1)}
