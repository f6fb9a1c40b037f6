"""Merge: write a delta's effect into the backbone's own weights, say what that lost, and take it out to the bit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.backbone.blocks import is_norm, linear_shape
from deltatune.backbone.gains import offset_of
from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Site
from deltatune.backbone.weights import offloaded, quantised
from deltatune.delta.attach import LEDGER, check_fits
from deltatune.delta.delta import Delta
from deltatune.delta.experts import folded, mixtures
from deltatune.delta.layer import Layer, WeightLayer, own_params
from deltatune.errors import RoutingError, SiteError

Kept = tuple[nn.Module, str, nn.Parameter | None]


@dataclass(frozen=True)
class Change:
    """What merging did to one parameter.

    `size`: norm of the change over the norm of the parameter before (infinite where that was zero or not there);
    `lost`: norm of what rounding to the parameter's dtype took away, over the norm of the change (0: nothing, 1: all).
    """

    parameter: str
    size: float
    lost: float


@dataclass
class Merged:
    """A backbone with a delta merged into it. `unmerge` gives the weights back to the bit, from a kept copy."""

    backbone: Backbone
    changes: tuple[Change, ...]
    _kept: list[Kept] = field(repr=False)

    @property
    def lost(self) -> float:
        """The largest share of a change that rounding took away."""
        return max((change.lost for change in self.changes), default=0.0)

    def unmerge(self) -> nn.Module:
        """Put back the parameters that stood there before, and return the network."""
        while self._kept:
            module, name, parameter = self._kept.pop()
            module._parameters[name] = parameter
        return self.backbone.module


def merge(backbone: Backbone, delta: Delta, *, verify: bool = True) -> Merged:
    """Write a delta into the backbone's weights, in place; at inference it then costs nothing.

    Computed in float32 (float64 for a float64 backbone) and rounded once to the parameter's dtype. SiteError if a layer
    is no change of weights or its weight is tied to another place, RoutingError while deltas are attached,
    BackboneMismatch if the delta is of another backbone.
    """
    sites = check_fits(delta, backbone, verify=verify)
    if LEDGER in backbone.module.__dict__:
        raise RoutingError(f"deltas are attached to {backbone.name!r} and would act twice: `remove()` them, then merge")
    found = [(sites[address], layer) for address, layer in delta.layers.items()]
    _check(backbone, delta, found)  # type: ignore[arg-type]
    kept: list[Kept] = []
    changes: list[Change] = []
    written: dict[int, nn.Parameter] = {}  # a parameter that stands in several places stays one
    with torch.no_grad():
        for module, name, value, path in _values(backbone, delta, found):  # type: ignore[arg-type]
            before = module._parameters.get(name)
            kept.append((module, name, before))
            after = written.get(id(before)) if before is not None else None
            if after is None:
                dtype = backbone.dtype if before is None else before.dtype
                after = nn.Parameter(value.to(dtype), requires_grad=before is not None and before.requires_grad)
                changes.append(_change(f"{path}.{name}", before, value, after))
                written[id(before)] = after
            module._parameters[name] = after
    return Merged(backbone, tuple(changes), kept)


def _check(backbone: Backbone, delta: Delta, found: Sequence[tuple[Site, Layer]]) -> None:
    form = quantised(backbone.module)
    if form is not None:
        raise SiteError(
            f"{delta.name!r} cannot be merged: the weights of {backbone.name!r} are quantised ({form}), and rounding "
            f"them again would lose the delta; merge into the backbone in a floating dtype, then quantise"
        )
    if offloaded(backbone.module):
        raise SiteError(
            f"{delta.name!r} cannot be merged: weights of {backbone.name!r} are offloaded; load it whole, then merge"
        )
    stuck = next((site for site, layer in found if not layer.mergeable), None)
    if stuck is not None:
        raise SiteError(
            f"{delta.name!r} cannot be merged: at {stuck.key} it is no change of the weights; leave it attached, or "
            f"fit one that is, such as lora"
        )
    for site, layer in found:
        if isinstance(layer, WeightLayer):
            continue
        if site.experts and (site.name == "ffn.act" or (layer.port == "input" and site.name != "ffn.down")):
            raise SiteError(
                f"{delta.name!r} cannot be merged: at {site.key} it acts on what several matrices of an expert read, "
                f"or on none; leave it attached"
            )
        if site.experts:
            continue
        module = backbone.module.get_submodule(site.exit)
        if site.calls > 1:
            raise SiteError(
                f"{delta.name!r} cannot be merged: the weights at {site.key} serve as {site.calls} blocks, and it acts "
                f"in one of them; leave it attached"
            )
        weight = module._parameters.get("weight")
        if site.entry != site.exit or weight is None or not (linear_shape(module) or is_norm(module) or site.words):
            raise SiteError(
                f"{delta.name!r} cannot be merged: {site.key} is no linear, table or norm with a weight; leave it "
                f"attached"
            )
        if is_norm(module) and (layer.reads_input or layer.port == "input"):
            raise SiteError(
                f"{delta.name!r} cannot be merged: at {site.key} it acts on what the norm reads, which is no change of "
                f"its gain and bias; leave it attached"
            )


@dataclass(frozen=True)
class Folded:
    """A linear, table or norm with all that a delta does to it folded in, weights as [d_out, d_in] or [d_out]."""

    path: str
    module: Any
    turned: bool  # the parameter itself is [d_in, d_out]
    sites: tuple[Site, ...]
    weight: Tensor
    weight_after: Tensor
    bias: Tensor | None
    bias_after: Tensor | None


def fold(backbone: Backbone, delta: Delta, *, verify: bool = True) -> list[Folded]:
    """Return what a delta makes of each linear and norm at which it acts, in float64, and write nothing.

    SiteError if a layer is no change of weights; BackboneMismatch if the delta is of another backbone.
    """
    sites = check_fits(delta, backbone, verify=verify)
    found: list[tuple[Site, Layer]] = [(sites[a], layer) for a, layer in delta.layers.items()]  # type: ignore[misc]
    _check(backbone, delta, found)
    within = next((site for site, _ in found if site.experts), None)
    if within is not None:
        raise SiteError(
            f"{delta.name!r} acts inside a mixture of experts, at {within.key}: it has no one matrix there; merge it "
            f"into the backbone instead"
        )
    return _folded(backbone, delta, found, torch.float64, torch.device("cpu"))  # MPS has no float64


def _folded(
    backbone: Backbone, delta: Delta, found: Sequence[tuple[Site, Layer]], least: torch.dtype, on: torch.device
) -> list[Folded]:
    by_module: dict[str, list[tuple[Site, Layer]]] = defaultdict(list)
    for site, layer in found:
        if not isinstance(layer, WeightLayer) and not site.experts:
            by_module[site.exit].append((site, layer))
    made: list[Folded] = []
    for path, layers in by_module.items():
        module: Any = backbone.module.get_submodule(path)
        # The input of all that stands here passes the input ports first, so they are the last to be folded in.
        layers.sort(key=lambda pair: pair[1].port == "input")
        turned = not (is_norm(module) or isinstance(module, nn.Linear))  # GPT-2's Conv1D, and a table
        dtype = torch.promote_types(module.weight.dtype, least)
        before = (module.weight.detach().T if turned else module.weight.detach()).to(on).to(dtype)
        own = getattr(module, "bias", None)
        bias_before = None if own is None else own.detach().to(on).to(dtype)
        offset = offset_of(module)
        effective = before + offset
        weight, bias = effective.clone(), None if bias_before is None else bias_before.clone()
        for site, layer in layers:
            rows = torch.arange(len(weight), device=weight.device)
            rows = rows if site.view is None else site.view.take(rows)
            own_bias = None if bias_before is None else bias_before[rows]
            params = layer.read(own_params(layer, dtype, on), before[rows], own_bias)
            part, part_bias = layer.merged(params, weight[rows], None if bias is None else bias[rows])
            weight[rows] = part
            if part_bias is not None:
                if bias is None and not linear_shape(module):
                    raise SiteError(
                        f"a bias cannot be merged at {site.key}: {type(module).__name__} has none and would pass over "
                        f"it; leave the delta attached"
                    )
                if bias is None:
                    bias = torch.zeros(len(weight), dtype=dtype, device=weight.device)
                bias[rows] = part_bias
        here = tuple(dict.fromkeys(site for site, _ in layers))
        after = before if torch.equal(weight, effective) else weight - offset
        made.append(Folded(path, module, turned, here, before, after, bias_before, bias))
    _check_shared(backbone, delta, made)
    return made


def _check_shared(backbone: Backbone, delta: Delta, made: Sequence[Folded]) -> None:
    """SiteError if a weight stands in several places, and not all of them change alike."""
    places: dict[int, list[str]] = defaultdict(list)
    for path, parameter in backbone.module.named_parameters(remove_duplicate=False):
        places[id(parameter)].append(path)
    after = {f"{one.path}.weight": one.weight_after.T if one.turned else one.weight_after for one in made}
    for one in made:
        own = after[f"{one.path}.weight"]
        for path in places[id(one.module.weight)]:
            if path not in after or not torch.equal(after[path], own):
                raise SiteError(
                    f"{delta.name!r} cannot be merged: the weight at {one.sites[0].key} is also {path}, which would "
                    f"change with it; leave the delta attached, or fit one without that site"
                )


def _values(
    backbone: Backbone, delta: Delta, found: Sequence[tuple[Site, Layer]]
) -> list[tuple[nn.Module, str, Tensor, str]]:
    """Return what is to be written: module, name of its parameter, value in the dtype of the computation, path."""
    values: list[tuple[nn.Module, str, Tensor, str]] = []
    for _, layer in found:
        if isinstance(layer, WeightLayer):
            values += _whole(backbone, layer)
    for one in _folded(backbone, delta, found, torch.float32, backbone.device):
        if not torch.equal(one.weight_after, one.weight):
            after = one.weight_after.T.contiguous() if one.turned else one.weight_after
            values.append((one.module, "weight", after, one.path))
        if one.bias_after is not None and (one.bias is None or not torch.equal(one.bias_after, one.bias)):
            values.append((one.module, "bias", one.bias_after, one.path))
    for (path, parameter), rows in mixtures(backbone.anatomy.sites).items():
        here = [(site, layer) for site, layer in found if site in rows]
        if here:
            module: Any = backbone.module.get_submodule(path)
            dtype = torch.promote_types(getattr(module, parameter).dtype, torch.float32)
            # What stands at the input is the last to be folded in, as for linears.
            here.sort(key=lambda pair: pair[1].port == "input")
            values += [
                (module, name, value, path) for name, value in folded(module, parameter, rows, here, dtype).items()
            ]
    return values


def _whole(backbone: Backbone, layer: WeightLayer) -> list[tuple[nn.Module, str, Tensor, str]]:
    dtype = torch.promote_types(backbone.dtype, torch.float32)
    params, keys = own_params(layer, dtype), {path: key for key, path in backbone.anatomy.parameters.items()}
    made: dict[int, Tensor] = {}
    for path, key in keys.items():
        parameter = backbone.module.get_parameter(path)
        made[id(parameter)] = layer.weight(params, key, parameter.to(dtype))
    return [  # tied weights stand in several places
        (module, name, made[id(parameter)], path)
        for path, module in backbone.module.named_modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in made
    ]


def _change(path: str, before: Tensor | None, value: Tensor, after: Tensor) -> Change:
    start = torch.zeros_like(value) if before is None else before.to(value.dtype)
    change = float((value - start).norm())
    size = float(start.norm())
    return Change(
        path,
        change / size if size else float("inf"),
        float((after.to(value.dtype) - value).norm()) / change if change else 0.0,
    )
