"""Read a weight, wherever it lies and in whatever form: plain, quantised, offloaded by accelerate."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.backbone.blocks import linear_shape
from deltatune.backbone.sites import Site
from deltatune.errors import BackboneError, SiteError

BITSANDBYTES = ("Params4bit", "Int8Params")


def scheme(parameter: Tensor) -> str | None:
    """Name the form of a quantised weight (`Int8Tensor`, `Params4bit`, ...); None for a plain one."""
    kind = type(parameter)
    # Every torch.Tensor has a `dequantize`; torchao's kinds of tensor bring one of their own.
    own = kind.dequantize is not Tensor.dequantize
    return kind.__name__ if own or kind.__name__ in BITSANDBYTES else None


def quantised(model: nn.Module) -> str | None:
    """Name the form of a model's first quantised weight; None if it has none."""
    return next((name for name in map(scheme, model.parameters()) if name), None)


def packed(parameter: Tensor) -> bool:
    """Say whether bitsandbytes packed a 4-bit weight anew, as it does for some CPUs at the first evaluation.

    Its products are without a gradient then, and its dequantising does not know of that form.
    """
    return bool(getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False))


def offloaded(model: nn.Module) -> bool:
    """Say whether accelerate keeps weights of this model elsewhere and brings them in for each forward."""
    return any(parameter.is_meta for parameter in model.parameters())


def read_weight(model: nn.Module, path: str) -> Tensor:
    """Return a parameter's values as a plain tensor of a floating dtype, detached.

    A quantised weight is dequantised, an offloaded one is brought in; a plain one is not copied. BackboneError for a
    weight without values.
    """
    owner, _, name = path.rpartition(".")
    module: Any = model.get_submodule(owner)
    with _brought_in(module):
        parameter = module._parameters[name]
        if parameter.is_meta:
            raise BackboneError(
                f"the weight {path!r} was never loaded (it is on the meta device); load the backbone whole"
            )
        kind = scheme(parameter)
        if kind is None:
            return parameter.detach()
        if packed(parameter):
            return _unpacked(parameter)
        if kind in BITSANDBYTES:
            from transformers.integrations.bitsandbytes import dequantize_bnb_weight

            return dequantize_bnb_weight(parameter, getattr(module, "state", None)).detach()
        return parameter.detach().dequantize()


def linear_at(model: nn.Module, site: Site) -> nn.Module:
    """Return the linear that a site is. SiteError where it is something else, or no module of its own."""
    module = model.get_submodule(site.exit)
    if site.experts or site.entry != site.exit or linear_shape(module) is None:
        raise SiteError(f"{site.key} is no linear with a weight of its own; expected a site such as attn.q or ffn.up")
    return module


def read_linear(linear: nn.Module, site: Site) -> tuple[Tensor, Tensor | None]:
    """Return weight [d_out, d_in] and bias [d_out] (None where there is none) of a site of a linear, detached.

    A plain weight is copied only where the site's rows are interleaved with others. Forms as for `read_weight`.
    """
    weight = read_weight(linear, "weight")
    weight = weight if isinstance(linear, nn.Linear) else weight.mT  # GPT-2's Conv1D is [d_in, d_out]
    bias = None if getattr(linear, "bias", None) is None else read_weight(linear, "bias")
    if site.view is None:
        return weight, bias
    return site.view.take(weight.mT).mT, None if bias is None else site.view.take(bias)


def _unpacked(parameter: Any) -> Tensor:
    """The values of a packed weight: only products know of that form, so it is the product with the identity."""
    import bitsandbytes

    unit = torch.eye(parameter.quant_state.shape[1], dtype=torch.bfloat16)  # the packed form's own dtype
    made: Tensor = bitsandbytes.matmul_4bit(unit, parameter, quant_state=parameter.quant_state)  # type: ignore[attr-defined]
    return made.detach().mT.float()


def _brought_in(module: nn.Module) -> Any:
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def device_of(module: nn.Module) -> torch.device | None:
    """Return the device that a module computes on; None if it has no weights and accelerate has not placed it."""
    hook = getattr(module, "_hf_hook", None)
    placed = getattr(hook, "execution_device", None)
    if placed is not None:
        return torch.device(f"cuda:{placed}" if isinstance(placed, int) else placed)
    return next((p.device for p in module.parameters() if not p.is_meta), None)
