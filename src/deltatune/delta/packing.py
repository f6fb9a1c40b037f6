"""Batches without padding: the tokens of all rows stand in one row, and only attention sees rows.

Real texts differ in length, so a batch of many tasks is padding for the most part. Everything outside attention works
position by position, so there the tokens run as [1, tokens, width]; in attention rows of like length run together.
Whether a backbone allows it is found out by its behaviour, once: three rows packed must give what they give padded.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.errors import RoutingError

# Static rules: pack where padding is more than this share of the tokens; in attention, rows of a bucket are padded to
# the longest of them, which is at most this many times as long as the shortest (measured; see docs/log.md).
WASTE = 0.1
SPREAD = 1.4
INPUTS = {"input_ids", "attention_mask", "token_type_ids"}
PROBED = (5, 3, 7)  # lengths of the three rows
# How far a token's vector may be off, as a share of its norm: rounding differs, but a neighbour's influence is larger.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
ROUGH = 0.05  # other dtypes


class _Moved(torch.autograd.Function):
    """Read rows of x at `there`; `back` says where each row of x then stands, `lost` which are read by nobody.

    Each row is read once, so its gradient is read back and not added up, which takes ten times as long on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor, lost: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, lost)
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        back, lost = ctx.saved_tensors
        moved = gradients[0].index_select(0, back)
        if lost is not None:
            moved.index_fill_(0, lost, 0.0)
        return moved, None, None, None


_move: Callable[..., Tensor] = _Moved.apply


@dataclass(frozen=True, eq=False)
class Grid:
    """Tokens laid out as rectangles: `take` [cells] names each cell's token, `back` [tokens] each token's cell.

    A cell without a token holds some token of its row, whose value there means nothing; `empty` [cells left over].
    `shapes` are the rows and the lengths of the rectangles, one after the other.
    """

    take: Tensor
    back: Tensor
    empty: Tensor | None
    shapes: tuple[tuple[int, int], ...]
    lengths: tuple[tuple[int, ...], ...]

    def spread(self, x: Tensor) -> Tensor:
        """Lay tokens [tokens, ...] out in cells [cells, ...]."""
        # Cells without a token are read by nobody, so no gradient comes back through them.
        return _move(x, self.take, self.back, None)

    def collect(self, cells: Tensor) -> Tensor:
        """Read the tokens [tokens, ...] from cells [cells, ...]."""
        return _move(cells, self.back, self.take, self.empty)

    def masks(self, device: torch.device) -> list[Tensor | None]:
        """Return which keys there are in each rectangle [rows, 1, 1, length], None where all are."""
        return [
            None
            if min(own) == length
            else (torch.arange(length, device=device) < torch.tensor(own, device=device)[:, None])[:, None, None]
            for (_, length), own in zip(self.shapes, self.lengths, strict=True)
        ]


def _grid(rectangles: Sequence[Sequence[tuple[int, int]]], device: torch.device) -> Grid:
    """Make a grid of rectangles whose rows are given as (first token, number of tokens)."""
    take: list[int] = []
    back: dict[int, int] = {}
    empty: list[int] = []
    for rows in rectangles:
        length = max(number for _, number in rows)
        for first, number in rows:
            back.update((first + i, len(take) + i) for i in range(number))
            empty.extend(range(len(take) + number, len(take) + length))
            take.extend((*range(first, first + number), *([first] * (length - number))))
    start = min(back)
    return Grid(
        torch.tensor(take, device=device) - start,
        torch.tensor([back[token] for token in sorted(back)], device=device),
        torch.tensor(empty, device=device) if empty else None,
        tuple((len(rows), max(number for _, number in rows)) for rows in rectangles),
        tuple(tuple(number for _, number in rows) for rows in rectangles),
    )


@dataclass(frozen=True, eq=False)
class Packed:
    """Where the tokens of each row of a call stand: row i has the tokens starts[i]:starts[i + 1]."""

    starts: tuple[int, ...]
    device: torch.device
    _grids: dict[Any, Grid] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> int:
        """Number of tokens of all rows."""
        return self.starts[-1]

    def flat(self, x: Tensor, place: str) -> Tensor:
        """Return x as [tokens, width]. RoutingError if it is not one vector a token."""
        if x.numel() != self.tokens * x.shape[-1]:
            raise RoutingError(f"{place} got {tuple(x.shape)}, the call has {self.tokens} tokens without padding")
        return x.reshape(self.tokens, x.shape[-1])

    def _row(self, row: int) -> tuple[int, int]:
        return self.starts[row], self.starts[row + 1] - self.starts[row]

    def parts(self, start: int, stop: int, number: int) -> Grid | None:
        """Return the grid of rows start:stop cut into `number` equal parts, a row a part; None if they are equal."""
        each = (stop - start) // number
        bounds = [self.starts[start + i * each] for i in range(number + 1)]
        sizes = [b - a for a, b in pairwise(bounds)]
        if min(sizes) == max(sizes):
            return None
        key = (start, stop, number)
        if key not in self._grids:
            self._grids[key] = _grid([list(zip(bounds, sizes, strict=False))], self.device)
        return self._grids[key]

    @cached_property
    def rows(self) -> Grid:
        """The grid of all rows in their order, one rectangle."""
        return _grid([[self._row(i) for i in range(len(self.starts) - 1)]], self.device)

    @cached_property
    def buckets(self) -> Grid:
        """The grid of rows of like length, a rectangle for each bucket."""
        order = sorted(range(len(self.starts) - 1), key=lambda i: -self._row(i)[1])
        found: list[list[tuple[int, int]]] = []
        for row in map(self._row, order):
            if not found or found[-1][0][1] > SPREAD * row[1]:
                found.append([])
            found[-1].append(row)
        return _grid(found, self.device)


# Runs the bare backbone on inputs, packed or (None) padded, and returns its last hidden states.
Run = Callable[["Packed | None", dict[str, Tensor]], Tensor]


def pack(
    backbone: Backbone, run: Run, inputs: dict[str, Tensor], order: Tensor | None
) -> tuple[Packed, dict[str, Tensor], Tensor] | None:
    """Return a batch without its padding: where the rows stand, the inputs, and each token's place in [rows, length].

    `order` is the order in which the rows are to stand. None where it is not worth it or not possible.
    """
    mask = inputs.get("attention_mask")
    if mask is None or set(inputs) - INPUTS or mask.ndim != 2 or len(mask) < 2:
        return None
    lengths = mask.sum(dim=1)
    if int(lengths.sum()) > (1 - WASTE) * mask.numel() or int(lengths.min()) == 0:
        return None
    if bool((mask[:, 1:] > mask[:, :-1]).any()):  # padded on the left, or with holes
        return None
    offset = offset_of(backbone, run)
    if offset is None:
        return None
    if order is not None:
        lengths = lengths[order]
    return _packed(inputs, lengths.tolist(), None if order is None else order.tolist(), offset)


def _packed(
    inputs: dict[str, Tensor], lengths: Sequence[int], order: Sequence[int] | None, offset: int
) -> tuple[Packed, dict[str, Tensor], Tensor]:
    ids = inputs["input_ids"]
    width = ids.shape[1]
    rows = range(len(lengths)) if order is None else order
    places = torch.tensor(
        [row * width + i for row, number in zip(rows, lengths, strict=True) for i in range(number)], device=ids.device
    )
    made = {
        name: value.reshape(-1).index_select(0, places)[None]
        for name, value in inputs.items()
        if name != "attention_mask"
    }
    made["position_ids"] = (_positions(ids, offset).index_select(0, places))[None]
    return Packed((0, *accumulate(lengths)), ids.device), made, places


def _positions(ids: Tensor, offset: int) -> Tensor:
    """Number the cells of [rows, length] as a backbone does whose rows begin at `offset`, flattened.

    One that begins after the number of its padding token (RoBERTa) counts the tokens that are not padding.
    """
    if not offset:
        return torch.arange(ids.shape[1], device=ids.device).expand_as(ids).reshape(-1)
    real = (ids != offset - 1).long()
    return (real.cumsum(dim=1) * real + offset - 1).reshape(-1)


def unpack(hidden: Tensor, places: Tensor, rows: int, length: int) -> Tensor:
    """Put hidden states [1, tokens, width] back into [rows, length, width]; padding is zero."""
    empty = torch.zeros(rows * length, hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
    return empty.index_copy(0, places, hidden.squeeze(0)).unflatten(0, (rows, length))


_offsets: weakref.WeakKeyDictionary[Any, int | None] = weakref.WeakKeyDictionary()


def offset_of(backbone: Backbone, run: Run) -> int | None:
    """Return the number of a row's first position if the backbone can run packed rows, None if it cannot."""
    if backbone.module.training:  # dropout would hide what is to be seen
        return None
    if backbone.module not in _offsets:
        _offsets[backbone.module] = _probed(backbone, run)
    return _offsets[backbone.module]


def _probed(backbone: Backbone, run: Run) -> int | None:
    """Try where positions may begin, and take what gives the same hidden states packed as padded."""
    config: Any = getattr(backbone.module, "config", None)
    windows = "sliding" in str(getattr(config, "layer_types", "")) or getattr(config, "sliding_window", None)
    if windows or "position_ids" not in inspect.signature(backbone.trunk.forward).parameters:
        return None
    draw = torch.Generator().manual_seed(0)
    words = backbone.embeddings.num_embeddings
    padding = getattr(config, "pad_token_id", None)
    ids = torch.randint(0, words, (len(PROBED), max(PROBED)), generator=draw)
    mask = torch.arange(max(PROBED)) < torch.tensor(PROBED)[:, None]
    if padding is not None:
        ids = torch.where(ids == padding, (ids + 1) % words, ids).masked_fill(~mask, padding)
    inputs = {"input_ids": ids.to(backbone.device), "attention_mask": mask.long().to(backbone.device)}
    with torch.no_grad():
        wanted = run(None, inputs)[mask.to(backbone.device)]
        limit = TOLERANCE.get(backbone.dtype, ROUGH) * wanted.norm(dim=-1)
        for offset in (0, (padding or 0) + 1):
            packed, made, _ = _packed(inputs, PROBED, None, offset)
            try:
                found = run(packed, made)
            except (IndexError, RuntimeError, TypeError, ValueError, RoutingError):
                continue
            if found.shape[1:] == wanted.shape and bool(((found[0] - wanted).norm(dim=-1) <= limit).all()):
                return offset
    return None
