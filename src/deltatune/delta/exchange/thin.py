"""LoRA and (IA)³ in PEFT's format: tensors beside linears.

A fused linear (GPT-2's `c_attn`) is one module there and the sites q, k and v here. Read: each gets its own copy of A
and its rows of B, which is the same function. Written: equal copies become one A again; different ones are stacked, A
below A, with zeros in B where they do not meet.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltatune.backbone.blocks import linear_shape
from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Site
from deltatune.delta.assemble import Member, Part, members_of
from deltatune.delta.catalogue import find
from deltatune.delta.delta import Delta, generator
from deltatune.delta.exchange.places import (
    Naming,
    linears,
    named,
    same_modules,
    shortest,
    site_less,
)
from deltatune.delta.layer import Layer
from deltatune.delta.method import members
from deltatune.errors import DeltaFileError, UserError

PREFIX = "base_model.model."
# What the tensors of options look like that have no counterpart here.
FOREIGN = {
    "lora_magnitude_vector": "DoRA's magnitudes",
    "lora_embedding": "a LoRA on a table of embeddings",
    "trainable_tokens": "trained tokens",
    "lora_B.bias": "biases of a LoRA (lora_bias)",
}
STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # those that leave the backbone's weights as they are


def modules_of(tensors: Mapping[str, Tensor], ends: Mapping[str, str], where: str) -> dict[str, dict[str, Tensor]]:
    """Return module path -> {name: tensor} from keys with these ends. DeltaFileError for another key or a lack."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        end = next((end for end in ends if key.startswith(PREFIX) and key.endswith(end)), None)
        if end is None:
            what = next((said for mark, said in FOREIGN.items() if mark in key), "no tensor of this method")
            raise DeltaFileError(f"{where} has {key!r} ({what}); expected {PREFIX}MODULE{' or '.join(ends)}")
        found.setdefault(key.removeprefix(PREFIX).removesuffix(end), {})[ends[end]] = tensor
    for path, own in found.items():
        for end, name in ends.items():
            if name not in own:
                raise DeltaFileError(f"{where} lacks {PREFIX + path + end!r}, the other half of {path!r}")
    if not found:
        raise DeltaFileError(f"{where} holds no tensors")
    return found


def placed_at(
    config: Mapping[str, Any], found: Mapping[str, dict[str, Tensor]], backbone: Backbone, where: str
) -> dict[str, tuple[str, list[Site]]]:
    """Return the file's path -> our path and sites of each module, after checking that the config selects them."""
    naming, sites = Naming(backbone, found), linears(backbone)
    placed: dict[str, tuple[str, list[Site]]] = {}
    for path in found:
        module = naming.ours(path)
        if module not in sites or sum(site.d_out for site in sites[module]) != widths(module, backbone)[1]:
            raise site_less(path, backbone, where)
        placed[path] = (module, sites[module])
    same_modules({module for module, _ in placed.values()}, config, naming, backbone, where)
    for module, _ in placed.values():
        if config.get("fan_in_fan_out") and isinstance(backbone.module.get_submodule(module), torch.nn.Linear):
            raise DeltaFileError(
                f"{where} says fan_in_fan_out=true (weights [in, out]), but {module!r} of {backbone.name!r} is a plain "
                f"linear: it was made for another backbone"
            )
    return placed


def widths(module: str, backbone: Backbone) -> tuple[int, int]:
    shape = linear_shape(backbone.module.get_submodule(module))
    assert shape is not None
    return shape


def check_shape(tensor: Tensor, expected: tuple[int, ...], key: str, where: str) -> None:
    if tuple(tensor.shape) != expected:
        raise DeltaFileError(f"{where}: {key!r} has shape {tuple(tensor.shape)}, expected {expected} for this backbone")


def rows_of(site: Site, tensor: Tensor) -> Tensor:
    """The rows of a tensor [d_out, ...] that belong to a site."""
    return tensor if site.view is None else site.view.take(tensor.mT).mT.contiguous()


def with_rows(site: Site, part: Tensor, like: Tensor) -> Tensor:
    """`like` [d_out, ...] with a site's rows replaced."""
    return part if site.view is None else site.view.put(like.mT, part.mT).mT.contiguous()


# LoRA


def read_lora(config: Mapping[str, Any], tensors: Mapping[str, Tensor], backbone: Backbone, where: str) -> list[Member]:
    """Make members of a LoRA file: one for each rank and scale. DeltaFileError for what has no counterpart."""
    check_options(config, where)
    tensors = without_own_weights(tensors, backbone, where)
    found = modules_of(tensors, {".lora_A.weight": "A", ".lora_B.weight": "B"}, where)
    groups: dict[tuple[int, float], list[Part]] = {}
    for path, (module, sites) in placed_at(config, found, backbone, where).items():
        A, B = found[path]["A"], found[path]["B"]
        r, alpha = rank_and_alpha(config, path)
        d_in, d_out = widths(module, backbone)
        check_shape(A, (r, d_in), f"{PREFIX}{path}.lora_A.weight", where)
        check_shape(B, (d_out, r), f"{PREFIX}{path}.lora_B.weight", where)
        own = [Part(site, {"A": A, "B": rows_of(site, B)}) for site in sites]
        groups.setdefault((r, alpha), []).extend(own)
    dropout = config.get("lora_dropout") or 0.0
    return [
        member
        for (r, alpha), parts in sorted(groups.items(), key=lambda item: -len(item[1]))
        for member in members_of("lora", {"r": r, "alpha": alpha, "dropout": dropout}, parts, backbone)
    ]


def check_options(config: Mapping[str, Any], where: str) -> None:
    """DeltaFileError for a LoRA that came with other changes of the backbone."""
    if config.get("init_lora_weights") not in STARTS:
        raise DeltaFileError(
            f"{where} has init_lora_weights={config['init_lora_weights']!r}, which changes the backbone's own weights; "
            f"save it from PEFT with path_initial_model_for_weight_conversion, as an ordinary LoRA"
        )
    if config.get("bias", "none") != "none":
        raise DeltaFileError(f"{where} has bias={config['bias']!r}: trained biases of the backbone; expected 'none'")


def without_own_weights(tensors: Mapping[str, Tensor], backbone: Backbone, where: str) -> dict[str, Tensor]:
    """Leave out the copies of the backbone's weights that PEFT saves beside a LoRA on the language-model head.

    DeltaFileError if they are others than this backbone's.
    """
    end = ".base_layer.weight"
    copies = {key: key.removeprefix(PREFIX).removesuffix(end) for key in tensors if key.endswith(end)}
    naming = Naming(backbone, copies.values())
    for key, path in copies.items():
        own = getattr(naming.modules.get(naming.ours(path)), "weight", None)
        if not isinstance(own, Tensor) or not torch.equal(own.cpu(), tensors[key].to(own.dtype)):
            raise DeltaFileError(f"{where} has {key!r}, the backbone's own weights, and {backbone.name!r} has others")
    return {key: tensor for key, tensor in tensors.items() if key not in copies}


def rank_and_alpha(config: Mapping[str, Any], path: str) -> tuple[int, float]:
    """Return r and alpha of the LoRA at a path of the file."""
    r, alpha = (
        by_pattern(config.get(patterns), path, config[own])
        for patterns, own in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    # With rsLoRA their scale is alpha / sqrt(r); ours is alpha / r.
    return r, float(alpha * math.sqrt(r) if config.get("use_rslora") else alpha)


def by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """PEFT's rule: the first key of the patterns that is the end of a path, as a regular expression."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def write_lora(delta: Delta, bound: Mapping[str, Site], backbone: Backbone) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and tensors of a delta of LoRAs. UserError for a site that is no linear, or several dropouts."""
    methods = [method.model_dump() for method in members(delta.spec)]
    dropouts = {method["dropout"] for method in methods}
    if len(dropouts) > 1:
        raise UserError(f"PEFT has one lora_dropout a folder; {delta.name!r} has {sorted(dropouts)}")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, placed in by_module(delta, bound, backbone).items():
        pieces = []
        for address, site, layer in placed:
            method = methods[int(address.split("/")[0])]
            pieces.append((site, layer.get_parameter("A"), layer.get_parameter("B"), method["alpha"] / method["r"]))
        A, B, scale = _joined(pieces, widths(module, backbone)[1])
        tensors[f"{PREFIX}{module}.lora_A.weight"], tensors[f"{PREFIX}{module}.lora_B.weight"] = A, B
        # The spec's own alpha where it can be had: alpha / r * r may differ in the last bit.
        own = [
            method["alpha"] for method in methods if method["r"] == len(A) and method["alpha"] / method["r"] == scale
        ]
        ranks[module], alphas[module] = len(A), whole(own[0] if own else scale * len(A))
    (r, alpha), _ = Counter((ranks[module], alphas[module]) for module in ranks).most_common(1)[0]
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropouts.pop(),
        "target_modules": shortest(ranks, backbone),
        "rank_pattern": {re.escape(module): own for module, own in ranks.items() if own != r},
        "alpha_pattern": {re.escape(module): own for module, own in alphas.items() if own != alpha},
        "bias": "none",
        "fan_in_fan_out": transposed(ranks, backbone),
        "use_rslora": False,
        "use_dora": False,
    }, tensors


def _joined(pieces: Sequence[tuple[Site, Tensor, Tensor, float]], d_out: int) -> tuple[Tensor, Tensor, float]:
    """One A, B and scale for what stands at one module."""
    site, A, B, scale = pieces[0]
    if len(pieces) == 1 and site.view is None:
        return A, B, scale
    apart = len({piece[0].key for piece in pieces}) == len(pieces)
    if apart and all(torch.equal(other, A) and own == scale for _, other, _, own in pieces):
        whole = B.new_zeros(d_out, B.shape[1])
        for place, _, part, _ in pieces:
            whole = with_rows(place, part, whole)
        return A, whole, scale
    columns = [with_rows(p, part * (own / scale), part.new_zeros(d_out, part.shape[1])) for p, _, part, own in pieces]
    return torch.cat([piece[1] for piece in pieces]), torch.cat(columns, dim=1), scale


# (IA)³


def read_ia3(config: Mapping[str, Any], tensors: Mapping[str, Tensor], backbone: Backbone, where: str) -> list[Member]:
    """Make the members of an (IA)³ file. DeltaFileError for a scale at the other end of a module than ours."""
    found = modules_of(tensors, {".ia3_l": "scale"}, where)
    method, parts = find("ia3"), []
    for path, (module, sites) in placed_at(config, found, backbone, where).items():
        scale, (d_in, d_out) = found[path]["scale"], widths(module, backbone)
        rule = config.get("feedforward_modules")
        # PEFT takes any end of the path here, not only whole words.
        inner = named(path, rule) if rule is None or isinstance(rule, str) else any(map(path.endswith, rule))
        check_shape(scale, (1, d_in) if inner else (d_out, 1), f"{PREFIX}{path}.ia3_l", where)
        for site in sites:
            # The layer is asked for its port alone.
            if (method(at=site.name).layer(site, generator(0)).port == "input") != inner:
                raise DeltaFileError(
                    f"{where} scales the {'input' if inner else 'output'} of {path!r}; (IA)³ at site {site.name!r} "
                    f"scales its {'output' if inner else 'input'}"
                )
            parts.append(Part(site, {"scale": scale.flatten() if inner else rows_of(site, scale).flatten()}))
    return members_of("ia3", {}, parts, backbone)


def write_ia3(delta: Delta, bound: Mapping[str, Site], backbone: Backbone) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and tensors of an (IA)³. UserError for a site that is no linear or that is scaled twice."""
    tensors: dict[str, Tensor] = {}
    inside: set[str] = set()
    placed = by_module(delta, bound, backbone)
    for module, own in placed.items():
        whole: Tensor | None = None
        if len({site.key for _, site, _ in own}) < len(own):
            raise UserError(f"{delta.name!r} scales {module!r} twice; PEFT has one (IA)³ a module")
        for _, site, layer in own:
            scale = layer.get_parameter("scale")
            if layer.port == "input":
                inside.add(module)
                whole = scale[None]
            else:
                start = scale.new_ones(widths(module, backbone)[1], 1) if whole is None else whole
                whole = with_rows(site, scale[:, None], start)
        assert whole is not None
        tensors[f"{PREFIX}{module}.ia3_l"] = whole
    return {
        "peft_type": "IA3",
        "target_modules": shortest(placed, backbone),
        "feedforward_modules": shortest(inside, backbone),
        "fan_in_fan_out": transposed(placed, backbone),
    }, tensors


def by_module(delta: Delta, bound: Mapping[str, Site], backbone: Backbone) -> dict[str, list[tuple[str, Site, Layer]]]:
    """Return module path -> (address, site, layer) of all layers. UserError for a site that is no linear."""
    found: dict[str, list[tuple[str, Site, Layer]]] = {}
    known = linears(backbone)
    for address, site in bound.items():
        if site not in known.get(site.exit, ()):
            raise UserError(
                f"{delta.name!r} has a layer at {site.key!r}, which is no single linear; PEFT takes linears alone"
            )
        layer = delta.layers[address]
        assert isinstance(layer, Layer)
        found.setdefault(site.exit, []).append((address, site, layer))
    return found


def transposed(modules: Iterable[str], backbone: Backbone) -> bool:
    """Whether the weights are [in, out], as in GPT-2."""
    return any(not isinstance(backbone.module.get_submodule(m), torch.nn.Linear) for m in modules)


def whole(number: float) -> float:
    """Return a number as an integer where it is one: PEFT and vLLM write lora_alpha so."""
    return int(number) if float(number).is_integer() else number
