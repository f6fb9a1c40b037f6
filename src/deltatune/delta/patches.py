"""Tokens among an image's patches: the call rewriter where the input is pixels, which take none.

Source: shallow visual prompt tuning, Jia et al. 2022, Visual Prompt Tuning, arXiv:2203.12119, which puts them after the
token for the whole image, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.delta.bank import Bank
from deltatune.delta.call import Call, current, outside
from deltatune.delta.inserted import Reserved, Tokens, place

BEHIND = 1  # positions that stand before the prompt: the token for the whole image
TOKENS, AMONG = "tokens of images", "patches"  # in the call, before and after the embeddings


def reserve(call: Call, tokens: Tokens) -> InsertedPatches:
    """Leave the tokens in the call for `Patches`."""
    call.gathered[TOKENS] = tokens
    return InsertedPatches(call)


@dataclass(frozen=True)
class InsertedPatches:
    """Positions that `Patches` has taken out of the last block's output already."""

    call: Call

    @outside
    def strip(self, output: Any, *, encoder_of_two: bool = False) -> Any:
        """Take the inserted positions out of the hidden states of the blocks before the last."""
        states = output.get("hidden_states") if hasattr(output, "get") else None
        if states is not None:
            cut = self.call.gathered[AMONG][0].cut
            output["hidden_states"] = tuple(cut(v) if v.shape[1] == states[0].shape[1] else v for v in states)
        return output


class Patches:
    """Puts the call's tokens among the patches before the first block, and takes them out after the last.

    So whatever pools or reads the last block's output never sees them.
    """

    def __init__(self, bank: Bank) -> None:
        self.bank = bank

    @outside
    def enter(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Put the tokens into the embeddings [rows, positions, width]."""
        call = self._call()
        if call is None:
            return None
        tokens: Tokens = call.gathered[TOKENS]
        seen = tokens.seen

        def put(h: Tensor) -> Tensor:
            among = place(None, seen, h.shape[1], BEHIND, to_end=not bool(seen.all()))
            call.gathered[AMONG] = (among, among.between(seen.new_ones(h.shape[:2]), seen))
            call.gathered["inserted"] = Reserved(tokens, among, h.shape[1] + seen.shape[1], to_end=True)
            return among.between(h, tokens.added.to(h))

        return _first(output, put)

    @outside
    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Take them out of the last block's output."""
        call = self._call()
        return None if call is None else _first(output, call.gathered[AMONG][0].cut)

    def _call(self) -> Call | None:
        call = current()
        return call if call is not None and call.bank is self.bank and TOKENS in call.gathered else None


def _first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A module's output with its tensor, or the first of several, changed."""
    return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])


def over_patches(call: Call, mask: Tensor | None, keys: int) -> Tensor | None:
    """Return an attention mask without the prompts that rows of images lack of their neighbours'."""
    seen: Tensor | None = call.gathered.get(AMONG, (None, None))[1]
    if seen is None or seen.shape[1] != keys or bool(seen.all()):
        return mask
    seen = seen[:, None, None, :]
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
