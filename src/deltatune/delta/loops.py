"""What training loops ask of a network, answered for a backbone with deltas: Trainer, TRL, accelerate, DDP."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from deltatune.delta.bank import Bank
from deltatune.delta.call import outside, recalling
from deltatune.errors import RoutingError

INPUTS = (
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "decoder_input_ids",
    "decoder_attention_mask", "pixel_values", "input_features", "labels", "start_positions", "end_positions",
)  # fmt: skip


class InLoops(nn.Module):
    """Base of `Adapted`: its state is the bank's alone, and what it has not itself is asked of the backbone."""

    backbone: nn.Module
    bank: Bank

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the backbone's forward takes `num_items_in_batch`; transformers' Trainer asks."""
        parameters = inspect.signature(self.backbone.forward).parameters.values()
        any_name = any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)
        return bool(getattr(self.backbone, "accepts_loss_kwargs", any_name))

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute blocks in the backward pass; each recomputation runs under the call of its forward.

        RoutingError for the reentrant mode, which loses gradients in silence, and for a network that has no such mode.
        """
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if options["use_reentrant"]:
            raise RoutingError("reentrant checkpointing loses the delta's gradients: leave use_reentrant=False")
        # The second name is the older one.
        older = getattr(self.backbone, "gradient_checkpointing_enable", None)
        enable: Any = getattr(self.backbone, "activation_checkpointing_enable", older)
        if enable is None:
            raise RoutingError(f"{type(self.backbone).__name__} has no gradient checkpointing of its own to turn on")
        enable(options)
        self._recall()

    @outside
    def _recall(self) -> None:
        for module in self.backbone.modules():
            function = module.__dict__.get("_gradient_checkpointing_func")
            if function is not None and not getattr(function, "recalls", False):
                if getattr(function, "keywords", {}).get("use_reentrant", False):
                    raise RoutingError("reentrant checkpointing loses the delta's gradients: use_reentrant=False")
                module.__dict__["_gradient_checkpointing_func"] = recalling(function)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the bank's tensors alone: the backbone is frozen and is no state of an `Adapted`."""
        prefix = kwargs.pop("prefix", "")
        state: dict[str, Any] = self.bank.state_dict(*args, prefix=f"{prefix}bank.", **kwargs)
        return state

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load the bank's tensors, strictly unless told otherwise."""
        own = {name.removeprefix("bank."): value for name, value in state_dict.items()}
        return self.bank.load_state_dict(own, strict=strict, assign=assign)

    def save_pretrained(self, folder: str, **_: Any) -> None:
        """Save the only delta into `folder`, or each into `folder/<name>`."""
        for name in self.bank.names:
            target = folder if len(self.bank.names) == 1 else f"{folder}/{name}"
            self.bank[name].save(target, overwrite=True)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("backbone", "bank", "source"):
                raise
            return getattr(self.backbone, name)


class Headless:
    """A backbone without its head: called, it runs under the deltas; asked for anything else, it is the network's."""

    def __init__(self, network: Any, run: Callable[..., Any]) -> None:
        self._network, self._run = network, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        route = {"route": kwargs.pop("deltas")} if "deltas" in kwargs else {}
        return self._run(self._network, args, kwargs, **route)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


def spelled_out(forward: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of `Adapted.forward` with the inputs of transformers' models by name.

    Trainer drops every column of a data set that is not a parameter of `forward`, and finds labels by name.
    """
    own = inspect.signature(forward)
    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in INPUTS]
    *first, deltas, rest = own.parameters.values()
    return own.replace(parameters=[*first, *named, deltas, rest])
