"""Places inside a mixture of experts: one experts function that stands before whatever the backbone uses.

The experts of a block are one parameter for all, and their projections no modules. While a delta is attached, they are
called through `deltatune_<its own>`; where layers act, each (token, chosen expert) pair is computed here, token after
token. A layer acts on every expert alike, unless it is an `ExpertLayer`, which has parameters for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.backbone.sites import Site
from deltatune.delta.call import Call, current, outside
from deltatune.delta.grouped import Grouping
from deltatune.delta.layer import ExpertLayer, Layer, own_params
from deltatune.errors import SiteError

# A parameter of a mixture, in the order in which a module has them -> the sites that are its rows, in their order.
ROWS = {"gate_up_proj": ("ffn.gate", "ffn.up"), "down_proj": ("ffn.down",)}
Key = tuple[str, str]  # path of a mixture's experts, parameter
PREFIX = "deltatune_"
KNOWN = ("eager", "batched_mm", "grouped_mm")

Experts = Callable[..., Tensor]


def mixtures(sites: Iterable[Site]) -> dict[Key, tuple[Site, ...]]:
    """Return the sites that are the rows of each parameter of experts, of all sites of a backbone."""
    named = {(site.exit, site.name): site for site in sites if site.experts}
    paths = dict.fromkeys(path for path, _ in named)
    return {(path, key): tuple(named[path, name] for name in names) for path in paths for key, names in ROWS.items()}


def folded(
    module: Any, parameter: str, sites: Sequence[Site], layers: Sequence[tuple[Site, Layer]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the parameters of experts, by name, with what layers at their rows do folded in, in a dtype.

    SiteError where a bias would have to be added that the experts lack.
    """
    turned, device = module.is_transposed, getattr(module, parameter).device
    weight = getattr(module, parameter).detach().to(dtype)
    weight = (weight.mT if turned else weight).clone()
    own = getattr(module, f"{parameter}_bias", None)
    bias = None if own is None else own.detach().to(dtype).clone()
    first = {site: sum(other.d_out for other in sites[:i]) for i, site in enumerate(sites)}
    for site, layer in layers:
        rows = slice(first[site], first[site] + site.d_out)
        params = own_params(layer, dtype, device)
        for e in range(len(weight)):
            of_expert = layer.of_expert(params, e) if isinstance(layer, ExpertLayer) else params
            here = None if bias is None else bias[e, rows]
            weight[e, rows], moved = layer.merged(of_expert, weight[e, rows], here)
            if moved is not None:
                if bias is None:
                    raise SiteError(f"a bias cannot be merged at {site.key}: its experts have none")
                bias[e, rows] = moved
    made = {parameter: weight.mT.contiguous() if turned else weight}
    return made if bias is None else made | {f"{parameter}_bias": bias}


def registered(implementation: str) -> str:
    """Register our function in front of `implementation` and return its name."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    name = PREFIX + implementation
    ALL_EXPERTS_FUNCTIONS.register(name, partial(_experts, implementation))
    return name


def check_reachable(module: nn.Module, site: Site) -> None:
    """SiteError if a mixture of experts is computed in a way that takes no delta."""
    own = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if own not in KNOWN and own not in [PREFIX + name for name in KNOWN]:
        raise SiteError(
            f"experts implementation {own!r} takes no delta at {site.key}; load the backbone with "
            f"experts_implementation='grouped_mm', 'batched_mm' or 'eager'"
        )


@outside
def _experts(implementation: str, module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    call = current()
    sites = call.bank.expert_sites.get(module, {}) if call is not None else {}
    if call is None or not any(call.plan.rounds((s.key, port)) for s in sites.values() for port in ("input", "output")):
        return _own(implementation, module)(module, hidden, index, weights)
    return _pairs(call, sites, module, hidden, index, weights)


def _own(implementation: str, module: nn.Module) -> Experts:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    found: Experts = (
        type(module).forward.__wrapped__ if implementation == "eager" else ALL_EXPERTS_FUNCTIONS[implementation]  # type: ignore[attr-defined]
    )
    return found


def _pairs(call: Call, sites: dict[str, Site], module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Compute hidden [tokens, width] with the layers of a call; index, weights [tokens, chosen experts]."""
    grouping = Grouping(index.reshape(-1), module.num_experts)
    order, chosen = call.permutation(1, index.device), index.reshape(call.rows, -1)
    call.gathered["experts"] = chosen if order is None else chosen[order[0]]  # as the rows stand in the engine

    def through(x: Tensor, name: str) -> Tensor:
        """Each pair's x [pairs, d_in] through its own expert's matrix."""
        weight, bias = getattr(module, name), getattr(module, f"{name}_bias", None)
        return grouping.product(x, weight.mT if module.is_transposed else weight, bias)

    def at(name: str, port: str, x: Tensor | None, h: Tensor) -> Tensor:
        return call.bank.execute(call, sites[name], port, x, h) if name in sites else h

    x = hidden.repeat_interleave(index.shape[-1], dim=0)
    x = at("ffn.gate", "input", None, at("ffn.up", "input", None, x))
    gate, up = through(x, "gate_up_proj").chunk(2, dim=-1)
    up = at("ffn.up", "output", x, up)
    gate = at("ffn.act", "input", None, at("ffn.gate", "output", x, gate))
    h = at("ffn.down", "input", None, at("ffn.act", "output", gate, module.act_fn(gate)) * up)
    out = at("ffn.down", "output", h, through(h, "down_proj")) * weights.reshape(-1, 1)
    return out.unflatten(0, index.shape).sum(dim=1).to(hidden.dtype)
