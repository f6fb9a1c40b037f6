"""OFT in PEFT's format: one tensor `oft_R.weight` beside each linear.

A fused linear (GPT-NeoX's `query_key_value`) has one rotation there; here q, k and v each have their own, and only
equal ones can be written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Site
from deltatune.delta.assemble import Member, Part, members_of
from deltatune.delta.delta import Delta
from deltatune.delta.exchange.places import linears, shortest
from deltatune.delta.exchange.thin import (
    PREFIX,
    by_module,
    check_shape,
    modules_of,
    placed_at,
    transposed,
    widths,
    without_own_weights,
)
from deltatune.delta.method import members
from deltatune.errors import DeltaFileError, UserError

END = ".oft_R.weight"


def read_oft(config: Mapping[str, Any], tensors: Mapping[str, Tensor], backbone: Backbone, where: str) -> list[Member]:
    """Make the members of an OFT file: one for each size of blocks. DeltaFileError for what has no counterpart."""
    if config.get("bias", "none") != "none":
        raise DeltaFileError(f"{where} has bias={config['bias']!r}: trained biases of the backbone; expected 'none'")
    share, terms = bool(config.get("block_share")), None
    if config.get("use_cayley_neumann", True):
        terms = int(config.get("num_cayley_neumann_terms", 5))
        if terms < 3:
            raise DeltaFileError(
                f"{where} has num_cayley_neumann_terms={terms}, which is no rotation; expected 3 terms or more"
            )
        terms = max(terms, 4)  # PEFT sums up the same for three terms as for four
    found = modules_of(without_own_weights(tensors, backbone, where), {END: "R"}, where)
    groups: dict[int, list[Part]] = {}
    for path, (module, sites) in placed_at(config, found, backbone, where).items():
        width = widths(module, backbone)[0]
        b = _block(width, config.get("r", 0), config.get("oft_block_size", 32))
        R = found[path]["R"]
        check_shape(R, (1 if share else width // b, b * (b - 1) // 2), f"{PREFIX}{path}{END}", where)
        groups.setdefault(b, []).extend(Part(site, {"R": R if i == 0 else R.clone()}) for i, site in enumerate(sites))
    return [
        member
        for b, parts in sorted(groups.items(), key=lambda item: -len(item[1]))
        for member in members_of("oft", {"b": b, "share": share, "neumann": terms}, parts, backbone)
    ]


def _block(width: int, r: int, b: int) -> int:
    """The size of the blocks that PEFT makes for an input: the divisor nearest to what its config asks for."""
    if bool(r) == bool(b):
        raise ValueError(f"r={r} and oft_block_size={b}: one of the two says how many blocks there are")
    near = [n for n in range(1, width + 1) if width % n == 0]
    found = min(near, key=lambda n: (abs(n - (b or r)), n))
    return found if b else width // found


def write_oft(delta: Delta, bound: Mapping[str, Site], backbone: Backbone) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and tensors of an OFT. UserError for a site that is no linear, or what one config cannot say."""
    methods = [method.model_dump() for method in members(delta.spec)]
    terms, share = ({method[name] for method in methods} for name in ("neumann", "share"))
    if len(terms) > 1 or len(share) > 1:
        raise UserError(f"PEFT has one form of OFT a folder; {delta.name!r} has several: {delta.spec}")
    tensors: dict[str, Tensor] = {}
    blocks: dict[str, int] = {}
    fused = linears(backbone)
    for module, placed in by_module(delta, bound, backbone).items():
        if transposed([module], backbone):
            raise UserError(f"PEFT's OFT takes no {type(backbone.module.get_submodule(module)).__name__}: {module!r}")
        R = placed[0][2].get_parameter("R")
        alike = all(layer.get_parameter("R").equal(R) for _, _, layer in placed)
        if len(placed) != len(fused[module]) or len({s.key for _, s, _ in placed}) < len(placed) or not alike:
            raise UserError(
                f"PEFT has one rotation for the input of {module!r}; {delta.name!r} has "
                f"{' and '.join(s.key for _, s, _ in placed)}, each with its own; it can be written where "
                f"{' '.join(site.name for site in fused[module])} have equal ones"
            )
        tensors[f"{PREFIX}{module}{END}"] = R
        blocks[module] = methods[int(placed[0][0].split("/")[0])]["b"]
    return {
        "peft_type": "OFT",
        **_size({(widths(module, backbone)[0], b) for module, b in blocks.items()}, delta),
        "target_modules": shortest(blocks, backbone),
        "block_share": share.pop(),
        "use_cayley_neumann": None not in terms,
        "num_cayley_neumann_terms": terms.pop() or 5,
        "bias": "none",
        "coft": False,
        "module_dropout": 0.0,
        "fan_in_fan_out": False,
    }, tensors


def _size(wanted: set[tuple[int, int]], delta: Delta) -> dict[str, int]:
    """Return the size or number of which PEFT makes blocks of these (input, size) pairs. UserError if there is none."""
    for width, b in sorted(wanted):
        for said in ({"oft_block_size": b, "r": 0}, {"r": width // b, "oft_block_size": 0}):
            if all(_block(other, said["r"], said["oft_block_size"]) == size for other, size in wanted):
                return said
    sizes = ", ".join(f"b={b} on {width}" for width, b in sorted(wanted))
    raise UserError(f"PEFT has one size of blocks a folder; {delta.name!r} has {sizes}")
