"""Places inside a mixture of experts: one experts function that stands before whatever the backbone uses.

The experts of a block are one parameter for all, and their projections no modules. While a delta is attached, they are
called through `deltatune_<its own>`; where layers act, each (token, chosen expert) pair is computed here, token after
token. A layer acts on every expert alike: a delta has one set of parameters for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.backbone.sites import Site
from deltatune.delta.call import Call, current, outside
from deltatune.errors import SiteError

PREFIX = "deltatune_"
KNOWN = ("eager", "batched_mm", "grouped_mm")

Experts = Callable[..., Tensor]


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
    expert = index.reshape(-1)
    order = torch.argsort(expert, stable=True)
    back, counts = torch.argsort(order), torch.bincount(expert, minlength=module.num_experts).tolist()

    def through(x: Tensor, name: str) -> Tensor:
        """Each pair's x [pairs, d_in] through its own expert's matrix."""
        weight, bias = getattr(module, name), getattr(module, f"{name}_bias", None)
        made = [
            F.linear(part, weight[i].T if module.is_transposed else weight[i], None if bias is None else bias[i])
            for i, part in enumerate(x[order].split(counts))
            if len(part)
        ]
        return torch.cat(made)[back]

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
