"""VeRA in PEFT's format: two vectors beside each linear, and the random matrices that all of them share.

The matrices follow from the config's `projection_prng_key`. Those in a file are held against what is drawn here, and
refused if they are others: a delta holds what is trained alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Site
from deltatune.delta.assemble import Member, Part, members_of
from deltatune.delta.delta import Delta
from deltatune.delta.exchange.places import shortest
from deltatune.delta.exchange.thin import (
    PREFIX,
    by_module,
    check_shape,
    modules_of,
    placed_at,
    rows_of,
    transposed,
    widths,
    with_rows,
    without_own_weights,
)
from deltatune.delta.frozen import projections
from deltatune.delta.method import members
from deltatune.errors import DeltaFileError, UserError

A, B = "base_model.vera_A", "base_model.vera_B"
ENDS = {".vera_lambda_b": "b", ".vera_lambda_d": "d"}


def read_vera(config: Mapping[str, Any], tensors: Mapping[str, Tensor], backbone: Backbone, where: str) -> list[Member]:
    """Make the members of a VeRA file. DeltaFileError for what has no counterpart, and for other random matrices."""
    if config.get("bias", "none") != "none":
        raise DeltaFileError(f"{where} has bias={config['bias']!r}: trained biases of the backbone; expected 'none'")
    own = {key: tensor for key, tensor in tensors.items() if key not in (A, B)}
    found = modules_of(without_own_weights(own, backbone, where), ENDS, where)
    placed = placed_at(config, found, backbone, where)
    r, key = config["r"], config.get("projection_prng_key", 0)
    width = max(widths(module, backbone)[0] for module, _ in placed.values())
    height = max(widths(module, backbone)[1] for module, _ in placed.values())
    shared = [tensors[name] for name in (A, B) if name in tensors]
    if shared or config.get("save_projection", True):
        _check_drawn(shared, key, r, width, height, where)
    parts: list[Part] = []
    for path, (module, sites) in placed.items():
        b, d = found[path]["b"], found[path]["d"]
        check_shape(b, (widths(module, backbone)[1],), f"{PREFIX}{path}.vera_lambda_b", where)
        check_shape(d, (r,), f"{PREFIX}{path}.vera_lambda_d", where)
        parts += [Part(site, {"b": rows_of(site, b[:, None]).flatten(), "d": d}) for site in sites]
    fields = {
        "r": r,
        "key": key,
        "dropout": config.get("vera_dropout") or 0.0,
        "d_initial": config.get("d_initial", 0.1),
        # Several members, one for each set of blocks, would each take the largest of their own.
        "width": None if all(part.site.d_in == width for part in parts) else width,
    }
    return members_of("vera", fields, parts, backbone)


def _check_drawn(shared: list[Tensor], key: int, r: int, width: int, height: int, where: str) -> None:
    if len(shared) != 2:
        raise DeltaFileError(f"{where} says save_projection=true and lacks {A} or {B}")
    check_shape(shared[0], (r, width), A, where)
    check_shape(shared[1], (height, r), B, where)
    drawn = projections(key, r, width, height, torch.float32, torch.device("cpu"))
    if not all(torch.equal(made.to(held.dtype), held) for made, held in zip(drawn, shared, strict=True)):
        raise DeltaFileError(
            f"{where} has other random matrices than projection_prng_key={key} gives here; a VeRA here is its key and "
            f"what was trained: save it from PEFT as an ordinary LoRA (peft.save_as_lora)"
        )


def write_vera(delta: Delta, bound: Mapping[str, Site], backbone: Backbone) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and tensors of a VeRA, its random matrices among them.

    UserError for a site that is no linear, and for what one pair of matrices cannot say.
    """
    methods = [method.model_dump() for method in members(delta.spec)]
    for name in ("r", "key", "dropout"):
        if len({method[name] for method in methods}) > 1:
            raise UserError(f"PEFT has one {name} for a VeRA; {delta.name!r} has several: {delta.spec}")
    r, key = methods[0]["r"], methods[0]["key"]
    tensors: dict[str, Tensor] = {}
    placed = by_module(delta, bound, backbone)
    width = max(widths(module, backbone)[0] for module in placed)
    height = max(widths(module, backbone)[1] for module in placed)
    for module, own in placed.items():
        d = own[0][2].get_parameter("d")
        apart = len({site.key for _, site, _ in own}) == len(own)
        if not apart or not all(torch.equal(layer.get_parameter("d"), d) for _, _, layer in own):
            raise UserError(
                f"PEFT has one vera_lambda_d for {module!r}; {delta.name!r} has "
                f"{' and '.join(site.key for _, site, _ in own)}, each with its own"
            )
        b = d.new_zeros(widths(module, backbone)[1], 1)
        for _, site, layer in own:
            if layer.width != width:
                raise UserError(
                    f"PEFT draws A as wide as the largest input, {width}; {delta.name!r} has width={layer.width}"
                )
            b = with_rows(site, layer.get_parameter("b")[:, None], b)
        tensors[f"{PREFIX}{module}.vera_lambda_b"], tensors[f"{PREFIX}{module}.vera_lambda_d"] = b.flatten(), d
    tensors[A], tensors[B] = projections(key, r, width, height, torch.float32, torch.device("cpu"))
    return {
        "peft_type": "VERA",
        "r": r,
        "projection_prng_key": key,
        "save_projection": True,
        "vera_dropout": methods[0]["dropout"],
        "d_initial": methods[0]["d_initial"],
        "target_modules": shortest(placed, backbone),
        "bias": "none",
        "fan_in_fan_out": transposed(placed, backbone),
    }, tensors
