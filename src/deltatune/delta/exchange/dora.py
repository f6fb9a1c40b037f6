"""DoRA in PEFT's format: a LoRA's tensors with the rows' lengths beside them, `use_dora` in its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Site
from deltatune.backbone.weights import read_weight
from deltatune.delta.assemble import Member, Part
from deltatune.delta.catalogue import find
from deltatune.delta.delta import Delta
from deltatune.delta.exchange.places import Naming
from deltatune.delta.exchange.thin import (
    PREFIX,
    by_module,
    check_shape,
    read_lora,
    rows_of,
    widths,
    with_rows,
    write_lora,
)
from deltatune.errors import DeltaFileError, UserError

END = ".lora_magnitude_vector"


def read_lora_or_dora(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], backbone: Backbone, where: str
) -> list[Member]:
    """Make the members of a file of `peft_type` LORA. DeltaFileError for what has no counterpart."""
    if not config.get("use_dora"):
        return read_lora(config, tensors, backbone, where)
    lengths = {key: tensor for key, tensor in tensors.items() if key.endswith(END)}
    made = read_lora(config, {key: t for key, t in tensors.items() if key not in lengths}, backbone, where)
    files = [key.removeprefix(PREFIX).removesuffix(END) for key in lengths]
    naming = Naming(backbone, files)
    by_path = {naming.ours(file): tensor for file, tensor in zip(files, lengths.values(), strict=True)}
    modules = {part.site.exit for member in made for part in member.parts}
    for module in sorted(modules ^ by_path.keys()):
        lacks, has = ("lora_magnitude_vector", "lora_A") if module in modules else ("lora_A", "lora_magnitude_vector")
        raise DeltaFileError(f"{where} lacks {lacks} of {naming.theirs(module)!r}, which has {has}")
    for module, tensor in by_path.items():
        check_shape(tensor, (widths(module, backbone)[1],), f"{PREFIX}{naming.theirs(module)}{END}", where)
    return [
        Member(
            find("dora")(**member.method.model_dump(exclude={"per_expert"})),
            [Part(p.site, {**p.tensors, "m": _own(p.site, by_path[p.site.exit])}) for p in member.parts],
        )
        for member in made
    ]


def _own(site: Site, lengths: Tensor) -> Tensor:
    return rows_of(site, lengths[:, None]).flatten()


def write_dora(delta: Delta, bound: Mapping[str, Site], backbone: Backbone) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and tensors of a DoRA. UserError for a site that is no linear or has several."""
    config, tensors = write_lora(delta, bound, backbone)
    for module, placed in by_module(delta, bound, backbone).items():
        if len({site.key for _, site, _ in placed}) < len(placed):
            raise UserError(f"{delta.name!r} has several DoRAs at {module!r}; PEFT has one a module")
        linear = backbone.module.get_submodule(module)
        weight = read_weight(linear, "weight")
        own = placed[0][2].get_parameter("m")
        # Rows of a fused linear at which there is none keep the lengths that they have.
        whole = weight.to(own).norm(dim=0 if config["fan_in_fan_out"] else 1)[:, None]
        for _, site, layer in placed:
            whole = with_rows(site, layer.get_parameter("m")[:, None], whole)
        tensors[f"{PREFIX}{module}{END}"] = whole.flatten()
    return {**config, "use_dora": True}, tensors
