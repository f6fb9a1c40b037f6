"""Arithmetic of deltas: `0.5 * a + 0.5 * b` of their effects, `lerp` and `soup` of their parameters.

An effect is what a layer adds to the tensor at its site. A weighted sum of effects is made without loss: by the
parameters where the effect is linear in them, and otherwise by putting layers side by side. Averages of parameters are
for deltas of one spec that began alike (Wortsman et al. 2022, Model soups, arXiv:2203.05482).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import nn

from deltatune.delta.delta import Delta
from deltatune.delta.layer import Layer
from deltatune.delta.method import Composition, members
from deltatune.errors import UserError

Terms = Sequence[tuple[float, Delta]]


def total(terms: Terms) -> Delta:
    """Return the delta whose effect at each place is the weighted sum of the deltas' effects.

    Heads of one kind for the same labels are summed likewise (so scores are); otherwise the sum has no head. UserError
    if the deltas are of different backbones, or an effect cannot be weighted or added.
    """
    _check(terms)
    weights = [weight for weight, _ in terms]
    if not all(map(math.isfinite, weights)):
        raise UserError(f"weights {weights}: expected finite numbers")
    deltas = [delta for _, delta in terms]
    if _alike(deltas) and all(layer.linear == "linear" for layer in _layers(deltas[0])):
        made = copy.deepcopy(deltas[0])
        for address, layer in made.layers.items():
            for name, parameter in layer.named_parameters(recurse=False):
                neutral = _layer(layer).neutral
                moves = (w * (d.layers[address].get_parameter(name).detach() - neutral) for w, d in terms)
                parameter.data = neutral + sum(moves, torch.zeros_like(parameter))
    elif len(terms) == 1:
        made = _weighted(deltas[0], weights[0])
    else:
        for delta in deltas:
            for site, layer in delta.at_sites():
                if not layer.additive:
                    raise UserError(
                        f"the effect of {delta.name!r} at {site.key} depends on what else acts there, so effects do "
                        f"not add up; take the `lerp` of deltas of one spec, or merge them into the weights"
                    )
        made = _side_by_side([_weighted(delta, weight) for weight, delta in terms])
    made.name = " + ".join(f"{weight:g} * {delta.name}" for weight, delta in terms)
    made.head = _mixed_head(terms)
    made.record = {"made": {"sum": [[weight, delta.name] for weight, delta in terms]}, **_task_of(made, deltas)}
    return made


def soup(deltas: Sequence[Delta], weights: Sequence[float] | None = None) -> Delta:
    """Return the weighted mean of the parameters of deltas of one spec, heads included; the plain mean by default.

    UserError if the specs, shapes or backbones differ, or the weights do not sum to one.
    """
    shares = [1 / len(deltas)] * len(deltas) if weights is None and deltas else list(weights or ())
    if len(shares) != len(deltas) or not deltas:
        raise UserError(f"{len(deltas)} deltas and {len(shares)} weights: expected as many of each, and at least one")
    if not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
        raise UserError(f"weights {shares} sum to {sum(shares):g}; a mean needs weights that sum to 1")
    _check([(1.0, delta) for delta in deltas])
    if not _alike(deltas):
        specs = ", ".join(dict.fromkeys(str(delta.spec) for delta in deltas))
        raise UserError(f"parameters of different deltas do not average: {specs}; add their effects (`a + b`) instead")
    terms = list(zip(shares, deltas, strict=True))
    made = copy.deepcopy(deltas[0])
    with torch.no_grad():
        for address, layer in made.layers.items():
            for name, parameter in layer.named_parameters(recurse=False):
                parameter.data = _sum([(w, d.layers[address].get_parameter(name)) for w, d in terms])
    made.name = "soup of " + ", ".join(delta.name for delta in deltas)
    made.head = _mixed_head(terms)
    made.record = {"made": {"soup": [[weight, delta.name] for weight, delta in terms]}, **_task_of(made, deltas)}
    return made


def lerp(a: Delta, b: Delta, t: float) -> Delta:
    """Return the delta a share t of the way from a to b, in parameters: a at 0, b at 1. UserError as for `soup`."""
    return soup([a, b], [1 - t, t])


def _check(terms: Terms) -> None:
    first = terms[0][1]
    for _, delta in terms[1:]:
        if delta.fingerprint.get("exact") != first.fingerprint.get("exact"):
            raise UserError(
                f"{first.name!r} and {delta.name!r} were trained on different backbones ({first.backbone_name!r}, "
                f"{delta.backbone_name!r}); their sum would mean nothing"
            )


def _layer(module: nn.Module) -> Layer:
    assert isinstance(module, Layer)
    return module


def _layers(delta: Delta) -> list[Layer]:
    return [layer for _, layer in delta.at_sites()]


def _alike(deltas: Sequence[Delta]) -> bool:
    shapes = [
        {name: tuple(p.shape) for name, p in delta.layers.named_parameters(remove_duplicate=False)} for delta in deltas
    ]
    return all(delta.spec == deltas[0].spec for delta in deltas) and all(shape == shapes[0] for shape in shapes)


def _weighted(delta: Delta, weight: float) -> Delta:
    """A copy with its effect times a weight."""
    made = copy.deepcopy(delta)
    if weight == 1.0:
        return made
    done: set[int] = set()
    for site, layer in made.at_sites():
        if not layer.proportional:
            raise UserError(
                f"the effect of {delta.name!r} at {site.key} is not proportional to any of its parameters, so it "
                f"cannot be multiplied by {weight:g}; route it with that weight instead"
            )
        for name in layer.proportional:
            parameter = layer.get_parameter(name)
            if id(parameter) not in done:  # a tied one stands at several sites
                done.add(id(parameter))
                parameter.data = layer.neutral + weight * (parameter.data - layer.neutral)
    return made


def _side_by_side(deltas: Sequence[Delta]) -> Delta:
    """All layers of all deltas as members of one."""
    spec = Composition([method for delta in deltas for method in members(delta.spec)])
    first = deltas[0]
    placed, layers, offset = [], [], 0
    for delta in deltas:
        for address, site in delta.sites.items():
            placed.append((offset + int(address.split("/")[0]), site))
            layers.append(delta.layers[address])
        offset += len(members(delta.spec))
    made = Delta(spec, placed, seed=first.seed)
    for address, layer in zip(list(made.layers), layers, strict=True):
        made.layers[address] = layer
    made.backbone_name, made.fingerprint = first.backbone_name, dict(first.fingerprint)
    return made


def _sum(terms: Sequence[tuple[float, torch.Tensor]]) -> torch.Tensor:
    value = sum(weight * tensor.detach() for weight, tensor in terms)
    assert isinstance(value, torch.Tensor)
    return value.clone()


def _mixed_head(terms: Terms) -> nn.Module | None:
    """The heads' weighted sum where they are of one kind for the same labels, or None."""
    from deltatune.delta.head import head_record

    heads = [delta.head for _, delta in terms]
    first = heads[0]
    if first is None or any(head_record(head) != head_record(first) for head in heads):
        return None
    made = copy.deepcopy(first)
    for name, parameter in made.named_parameters():
        parameter.data = _sum([(w, d.head.get_parameter(name)) for w, d in terms if d.head is not None])
    return made


def _task_of(made: Delta, deltas: Sequence[Delta]) -> dict[str, object]:
    """What a delta with a head needs to predict, as the first of the deltas has it."""
    if made.head is None:
        return {}
    kept = ("task", "settings", "precision")
    return {name: deltas[0].record[name] for name in kept if name in deltas[0].record}
