"""A call: which deltas act on which rows of one forward, fixed before it starts.

Attaching is static; what acts is data. So an exception leaves no active delta behind, two threads do not see each
other's choice, and a checkpointed block recomputes under the call that it first ran in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltatune.errors import RoutingError

if TYPE_CHECKING:
    from deltatune.delta.bank import Bank
    from deltatune.delta.plan import Plan


@dataclass(frozen=True)
class Segment:
    """Consecutive rows under one delta (None: the bare backbone), with the weight of its effect."""

    delta: str | None
    rows: int
    scale: float = 1.0


@dataclass(frozen=True)
class Draw:
    """Key of a segment's dropout masks, and the padded length of its own logical batch."""

    seed: int
    step: int
    length: int


@dataclass(frozen=True, eq=False)
class Call:
    """Routing of one forward: rows of dimension 0 -> deltas of `bank`.

    `segments` cover the rows in the order `order` (None: as they stand). `expand` is how many times generation may repeat
    each row (beams, returned sequences). `draws` keys the dropout of each segment; None draws from torch's generator.
    """

    bank: Bank
    plan: Plan
    segments: tuple[Segment, ...]
    order: Tensor | None = None
    expand: int = 1
    training: bool = False
    draws: tuple[Draw, ...] | None = None
    # Inputs of open spans, and parameters gathered for this call; private to the engine.
    spans: dict[str, Tensor] = field(default_factory=dict, repr=False)
    gathered: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def rows(self) -> int:
        """Number of rows before any expansion."""
        return sum(segment.rows for segment in self.segments)

    def expansion(self, size: int, place: str) -> int:
        """Return how often each row is repeated in a tensor of `size` rows. RoutingError if it does not fit."""
        times, rest = divmod(size, self.rows)
        if rest or times not in (1, self.expand):
            expected = f"{self.rows}" if self.expand == 1 else f"{self.rows} or {self.rows * self.expand}"
            raise RoutingError(f"{place} got {size} rows, the call routes {expected}; give one delta per input row")
        return times

    def permutation(self, times: int) -> tuple[Tensor, Tensor] | None:
        """Return (order, inverse) over rows repeated `times`, or None if the rows stand in order already."""
        if self.order is None:
            return None
        if ("order", times) not in self.gathered:
            order = (self.order[:, None] * times + torch.arange(times, device=self.order.device)).reshape(-1)
            self.gathered["order", times] = (order, torch.argsort(order))
        found: tuple[Tensor, Tensor] = self.gathered["order", times]
        return found


_current: ContextVar[Call | None] = ContextVar("deltatune_call", default=None)


def current() -> Call | None:
    """The call that this thread is in, or None: then the backbone acts alone."""
    return _current.get()


@contextmanager
def entered(call: Call | None) -> Iterator[None]:
    """Run a block of code inside a call."""
    token = _current.set(call)
    try:
        yield
    finally:
        _current.reset(token)


def recalling(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a checkpoint function so that recomputation happens inside the call of the first computation."""

    @functools.wraps(checkpoint)
    def wrapped(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = current()

        def again(*inner: Any, **more: Any) -> Any:
            with entered(call):
                return function(*inner, **more)

        return checkpoint(again, *args, **kwargs)

    wrapped.recalls = True  # type: ignore[attr-defined]
    return wrapped


def segments_of(names: Sequence[str | None]) -> tuple[tuple[Segment, ...], list[int] | None]:
    """Group rows by delta, in order of first appearance; return the segments and the row order, None if unchanged."""
    groups: dict[str | None, list[int]] = {}
    for row, name in enumerate(names):
        groups.setdefault(name, []).append(row)
    order = [row for rows in groups.values() for row in rows]
    segments = tuple(Segment(name, len(rows)) for name, rows in groups.items())
    return segments, None if order == list(range(len(names))) else order
