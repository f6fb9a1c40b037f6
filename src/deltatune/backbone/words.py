"""From hidden states to words by the network's own way: what it scales, adds and bends around its last linear counts.

A network is run with its body replaced, in a shallow copy that shares all else, so that nothing of the network itself
is touched and other threads see nothing.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


class _Output:
    """What a body returns: its last hidden states first and by name, and nothing else that it is asked for."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __len__(self) -> int:
        return 1

    def __getitem__(self, place: Any) -> Any:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        return None


class _Kept(nn.Module):
    """A body that keeps its last hidden states and passes none on, so that no logits are computed."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.states: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.body(*args, **kwargs)
        self.states = output.last_hidden_state
        output.last_hidden_state = self.states[:, :0]
        return output


class _Given(nn.Module):
    """A body that returns given states, whatever it is asked."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    @property
    def decoder(self) -> _Given:
        """Itself, for networks that call the inner part of their body (OPT)."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> _Output:
        return _Output(self.states)


def body_of(network: nn.Module) -> str | None:
    """Name the part of a network after which its logits are made.

    None where it is not apart (two joined networks), or does not return what they are made of (ProphetNet's streams).
    """
    if getattr(getattr(network, "config", None), "ngram", None):
        return None
    output: Any = network.get_output_embeddings()  # type: ignore[operator]
    for name in (getattr(network, "base_model_prefix", ""), "decoder"):
        body = network._modules.get(name)
        if body is not None:
            return None if output in list(body.modules()) else name
    return None


def without_logits(network: nn.Module, body: str) -> tuple[nn.Module, _Kept]:
    """Return a network that computes no logits, and what keeps its last hidden states once it has run."""
    kept = _Kept(network.get_submodule(body))
    return _around(network, body, kept), kept


def logits_of(network: nn.Module, body: str, states: Tensor) -> Tensor:
    """Return the logits [items, words] that a network makes of its body's states [items, width]."""
    given = states[None]
    inputs: dict[str, Any] = {"attention_mask": None}
    if getattr(getattr(network, "config", None), "is_encoder_decoder", False):
        # Something has to be given to both stacks, of which neither runs.
        inputs = {"encoder_outputs": _Output(given), "decoder_inputs_embeds": given}
    made: Tensor = type(network).forward(_around(network, body, _Given(given)), **inputs).logits
    return made[0]


def _around(network: nn.Module, name: str, body: nn.Module) -> nn.Module:
    made = copy.copy(network)
    # What dispatches or compiles the whole network is bound to the network itself.
    made.__dict__.pop("forward", None)
    made.__dict__["_compiled_call_impl"] = None
    made.__dict__["_modules"] = {**network._modules, name: body}
    return made
