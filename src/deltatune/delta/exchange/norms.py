"""LN-tuning in PEFT's format: whole norms, where ours holds what is made of the backbone's own.

Both are the same function as long as no gain of the backbone is zero. What is read is kept in float64 where float32
would not give the file's values back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.backbone.gains import has_gain, offset_of
from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Site
from deltatune.delta.assemble import Member, Part, members_of
from deltatune.delta.delta import Delta
from deltatune.delta.exchange.places import Naming, same_modules, shortest
from deltatune.errors import DeltaFileError, UserError, nearest

PREFIX, MARK = "base_model.model.", ".ln_tuning_layers."


def read_ln(config: Mapping[str, Any], tensors: Mapping[str, Tensor], backbone: Backbone, where: str) -> list[Member]:
    """Make the members of an LN-tuning file. DeltaFileError for a module that is no norm of ours, or a gain of zero."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, mark, name = key.removeprefix(PREFIX).rpartition(MARK)
        if not mark or not key.startswith(PREFIX):
            raise DeltaFileError(f"{where} has {key!r}; expected {PREFIX}MODULE{MARK}weight or {MARK}bias")
        found.setdefault(path, {})[name] = tensor
    naming = Naming(backbone, found)
    norms = {site.exit: site for site in backbone.anatomy.sites if site.name.startswith("norm.")}
    parts: list[Part] = []
    for path, own in found.items():
        site = norms.get(naming.ours(path))
        module = naming.modules.get(naming.ours(path))
        if site is None or module is None or not has_gain(module):
            raise DeltaFileError(
                f"{where} has tensors for {path!r}, which is no norm at a site of {backbone.name!r}"
                f"{nearest(path, norms)}; `deltatune sites` lists them"
            )
        wanted = {name: tuple(p.shape) for name, p in module.named_parameters()}
        have = {name: tuple(tensor.shape) for name, tensor in own.items()}
        if have != wanted:
            raise DeltaFileError(f"{where}: {path!r} has {have}, expected {wanted} for this backbone")
        parts.append(Part(site, _apart(module, own, f"{where}: {path!r}")))
    same_modules({part.site.exit for part in parts}, config, naming, backbone, where)
    if not parts:
        raise DeltaFileError(f"{where} holds no tensors")
    return members_of("lntuning", {}, parts, backbone)


def _apart(norm: nn.Module, theirs: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """What makes a norm of the backbone's: gain and, where it has one, bias."""
    offset = offset_of(norm)
    own, wanted = (_wide(norm.get_parameter("weight")) + offset, _wide(theirs["weight"]) + offset)
    if bool(((own == 0) & (wanted != 0)).any()):
        raise DeltaFileError(f"{what} moves a gain that is zero in this backbone; ours is a factor, which cannot")
    gain = torch.where(own == 0, 0.0, wanted / own - 1)
    made = {"gain": gain}
    if "bias" in theirs:
        made["bias"] = _wide(theirs["bias"]) - _wide(norm.get_parameter("bias")) * (1 + gain)
    single = {name: tensor.float() for name, tensor in made.items()}
    exact = all(torch.equal(tensor, theirs[name]) for name, tensor in _whole(norm, single).items())
    return single if exact else made


def _whole(norm: nn.Module, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The norm's own parameters with a delta in them, in their own dtype."""
    offset, weight = offset_of(norm), norm.get_parameter("weight")
    factor = 1 + _wide(made["gain"])
    whole = {"weight": ((_wide(weight) + offset) * factor - offset).to(weight.dtype)}
    if "bias" in made:
        bias = norm.get_parameter("bias")
        whole["bias"] = (_wide(bias) * factor + _wide(made["bias"])).to(bias.dtype)
    return whole


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()  # MPS has no float64


def write_ln(delta: Delta, bound: Mapping[str, Site], backbone: Backbone) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and tensors of an LN-tuning, rounded to the norms' own dtype as PEFT's copies are.

    UserError for a norm that is changed twice.
    """
    tensors: dict[str, Tensor] = {}
    for address, site in bound.items():
        made = {name: parameter.detach() for name, parameter in delta.layers[address].named_parameters()}
        for name, tensor in _whole(backbone.module.get_submodule(site.exit), made).items():
            key = f"{PREFIX}{site.exit}{MARK}{name}"
            if key in tensors:
                raise UserError(f"{delta.name!r} changes {site.exit!r} twice; PEFT has one copy of a norm")
            tensors[key] = tensor
    return {"peft_type": "LN_TUNING", "target_modules": shortest({s.exit for s in bound.values()}, backbone)}, tensors
