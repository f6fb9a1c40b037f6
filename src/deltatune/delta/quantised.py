"""Quantised backbones: a gradient where their products have none, and a refusal where weights would be written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.backbone.load import Backbone
from deltatune.backbone.weights import offloaded, packed, quantised, read_weight, scheme
from deltatune.delta.bank import Bank
from deltatune.delta.call import current, outside
from deltatune.errors import SiteError


class _Through(torch.autograd.Function):
    """The quantised product's value with the gradient of the product of the weight that it stands for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Tensor, linear: nn.Module) -> Tensor:
        ctx.linear = linear
        return product.view_as(product)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] @ read_weight(ctx.linear, "weight").to(gradients[0]), None, None


class GradientHook:
    """Lets gradients pass a linear whose kernel gives none.

    torchao's products of quantised activations cut the graph, and so do those of weights that bitsandbytes packed:
    residual connections hide it: the gradient is then wrong and nothing fails.
    """

    def __init__(self, bank: Bank) -> None:
        self.bank = bank

    @outside
    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Tie the output to the input again, in a call of the own bank."""
        call = current()
        if call is None or call.bank is not self.bank or not torch.is_grad_enabled():
            return None
        cut = not output.requires_grad or packed(module.get_parameter("weight"))
        if not (cut and args[0].requires_grad):
            return None
        tie: Callable[..., Tensor] = _Through.apply
        return tie(args[0], output.detach(), module)


def let_gradients_pass(module: nn.Module, bank: Bank) -> None:
    """Put a hook on every quantised linear; to be called before other hooks are set, since it acts on the product."""
    for part in module.modules():
        weight = part._parameters.get("weight")
        if isinstance(part, nn.Linear) and weight is not None and scheme(weight):
            part.register_forward_hook(GradientHook(bank).after)


def refuse_unwritable(delta: str, source: Backbone) -> None:
    """SiteError for a delta of weights on a backbone whose weights cannot be written."""
    form = quantised(source.module)
    if form is not None or offloaded(source.module):
        raise SiteError(
            f"delta {delta!r} changes the weights themselves, and those of {source.name!r} are "
            f"{f'quantised ({form})' if form else 'offloaded'}; load the backbone whole in a floating dtype, or choose "
            f"a method that acts on activations, such as lora"
        )
