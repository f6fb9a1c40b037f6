"""Where the call rewriter put trained tokens, and how to take their positions out again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.delta.call import Call, outside
from deltatune.errors import RoutingError, SiteError

if TYPE_CHECKING:
    from deltatune.delta.plan import Run

# Settings of image networks by which positions count within the blocks.
COUNTED = ("use_relative_position_bias", "use_shared_relative_position_bias", "use_mid_position_embeddings")
PER_TOKEN = ("logits", "last_hidden_state", "hidden_states")


def check_takes_tokens(backbone: Backbone) -> None:
    """SiteError for a backbone among whose positions no trained token can be put.

    Text gets them as embeddings; an image network that takes none gets them after its token for the whole image.
    """
    if backbone.takes_embeddings:
        return
    config: Any = getattr(backbone.module, "config", None)
    whole = all(site.heads is not None for site in backbone.anatomy.sites if site.name == "attn")
    one = len(backbone.anatomy.depth) == 1
    if not backbone.class_token or not whole or not one or any(getattr(config, name, False) for name in COUNTED):
        raise SiteError(
            f"{backbone.name!r} takes no prompt: one stands among embeddings of text, or in one stack of blocks after "
            f"a token for the whole image, in attention that sees all positions and where no block counts them; take "
            f"another method"
        )


class Tokens(NamedTuple):
    """Tokens [rows, number, width] for the rows of a call, filled from the right.

    seen [rows, number] says which are real, `own` how many those are by segment, `starts` where those of a method (its
    segment, its member of the delta) begin.
    """

    added: Tensor
    seen: Tensor
    own: list[int]
    starts: dict[tuple[int, int], int]


@dataclass(frozen=True)
class Inserted:
    """`number` positions stand in each row: where, `layout` says, or before position `at` of every row.

    layout [rows, tokens + number]: which of (the text's tokens, then the added ones) stands at a position.
    """

    at: int
    number: int
    layout: Tensor | None = None

    def between(self, text: Tensor, added: Tensor) -> Tensor:
        """Put `added` [rows, number, ...] among `text` [rows, tokens, ...]."""
        if self.layout is None:
            return torch.cat([text[:, : self.at], added, text[:, self.at :]], dim=1)
        return _taken(torch.cat([text, added], dim=1), self.layout)

    @outside
    def strip(self, output: Any, *, encoder_of_two: bool = False) -> Any:
        """Take the inserted positions out of a model output [rows, positions, ...].

        `encoder_of_two`: the output is an encoder-decoder's, and the positions are in its encoder's part.
        """
        prefix = "encoder_" if encoder_of_two else ""
        for name in PER_TOKEN:
            value = output.get(prefix + name) if hasattr(output, "get") else None
            if isinstance(value, Tensor) and value.ndim > 2:  # a classifier's logits [rows, labels] have no positions
                output[prefix + name] = self.cut(value)
            elif isinstance(value, tuple):
                output[prefix + name] = tuple(self.cut(v) for v in value)
        return output

    def cut(self, value: Tensor) -> Tensor:
        """Take the inserted positions out of [rows, positions, ...]."""
        if self.layout is None:
            return torch.cat([value[:, : self.at], value[:, self.at + self.number :]], dim=1)
        return _taken(value, self.layout.argsort(dim=1)[:, : -self.number])


@dataclass
class Reserved:
    """The positions that tokens have in the rows of a call, for what comes after the input.

    `length` counts a row's positions with them; `cached`: only the first run of a block has them, a cache later on.
    """

    tokens: Tokens
    where: Inserted
    length: int
    to_end: bool
    cached: bool = False
    renewed: set[Run] = field(default_factory=set)


def renew(call: Call, run: Run, tokens: Tensor, place: str, h: Tensor) -> Tensor:
    """Put the tokens [n, width] of a deep layer where its method put some at the input, in h [rows, positions, width].

    RoutingError if the block has not the positions that the input had.
    """
    held: Reserved = call.gathered["inserted"]
    if held.cached and (run in held.renewed or h.shape[1] != held.length):
        return h
    if h.shape[1] != held.length:
        raise RoutingError(
            f"{place!r} has {h.shape[1]} positions where the input had {held.length}: no prompt fits there"
        )
    held.renewed.add(run)
    first = held.tokens.starts[run.segments[0], run.layers[0].member]
    tokens = tokens.to(h).expand(len(h), -1, -1)
    layout = held.where.layout
    if layout is None:
        start = held.where.at + first
        return torch.cat([h[:, :start], tokens, h[:, start + tokens.shape[1] :]], dim=1)
    order = call.permutation(1, h.device)
    layout = (layout if order is None else layout[order[0]])[run.start : run.stop]
    stands = layout.argsort(dim=1)[:, held.length - held.where.number + first :][:, : tokens.shape[1]]
    stands = stands.repeat_interleave(len(h) // len(layout), dim=0)
    return h.scatter(1, stands[..., None].expand_as(tokens), tokens)


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """Rearrange values [rows, positions, ...] by index [rows, positions wanted]."""
    return values.take_along_dim(index.reshape(*index.shape, *[1] * (values.ndim - 2)), dim=1)


def place(first: Tensor | None, seen: Tensor, length: int, skip: int, *, to_end: bool) -> Inserted:
    """Work out where the tokens go: behind `skip` tokens from the first on.

    What a row lacks of `seen` [rows, number] goes to its end (`to_end`) or before its own tokens.
    """
    number = seen.shape[1]
    if first is None and not to_end:
        return Inserted(skip, number)
    start = column_of(first, seen) + skip
    column = torch.arange(length + number, device=seen.device).expand(len(seen), -1)
    own = seen.sum(dim=1, keepdim=True) if to_end else number
    added = length + number - own + column - start
    # At the end `column - own` counts what is lacking: it stands first among the added.
    layout = torch.where(column < start, column, torch.where(column < start + own, added, column - own))
    return Inserted(skip, number, layout)


def column_of(first: Tensor | None, like: Tensor) -> Tensor:
    """Return where the first token of each row stands [rows, 1]; `first` is None where that is at the front of all."""
    return torch.zeros(len(like), 1, dtype=torch.long, device=like.device) if first is None else first
