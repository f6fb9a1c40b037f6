"""A call: which deltas act on which rows of one forward, fixed before it starts.

Attaching is static; what acts is data. So an exception leaves no active delta behind, two threads do not see each
other's choice, and a checkpointed block recomputes under the call that it first ran in.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from deltatune.errors import RoutingError

if TYPE_CHECKING:
    from deltatune.backbone.sites import Site
    from deltatune.delta.bank import Bank
    from deltatune.delta.packing import Packed
    from deltatune.delta.plan import Plan


Function = TypeVar("Function", bound=Callable[..., Any])
Swap = tuple[nn.Module, str, Tensor]  # a module, the name of its parameter, and what replaces it


def outside(function: Function) -> Function:
    """Keep a function out of the graphs that torch.compile makes.

    What depends on the call is kept out: a graph would hold for one routing, and each new list of segments would
    compile again. What lies between is compiled once for all routings.
    """
    kept: Function = torch.compiler.disable(function)
    return kept


def within(function: Function) -> Function:
    """Keep a function itself out of such graphs, but not what it calls."""
    kept: Function = torch.compiler.disable(function, recursive=False)
    return kept


@dataclass(frozen=True)
class Segment:
    """Consecutive rows under one delta (None: the bare backbone), with the weight of its effect."""

    delta: str | None
    rows: int
    scale: float = 1.0


@dataclass(frozen=True)
class Draw:
    """Key of a segment's dropout masks, and the padded length of its own logical batch (masks do not depend on it)."""

    seed: int
    step: int
    length: int


@dataclass(frozen=True, eq=False)
class Call:
    """Routing of one forward: rows of dimension 0 -> deltas of `bank`.

    `segments` cover the rows in the order `order` (None: as they stand). `expand` is how many times generation may
    repeat each row (beams, returned sequences; Whisper repeats for one, then the other). `draws` keys the dropout of
    each segment; None draws from torch's generator. `packed` says where the tokens of each row stand if a batch has no
    padding; its rows stand in order.
    """

    bank: Bank
    plan: Plan
    segments: tuple[Segment, ...]
    order: Tensor | None = None
    expand: int = 1
    training: bool = False
    draws: tuple[Draw, ...] | None = None
    packed: Packed | None = None
    # Weights that stand in for the backbone's, inputs of open spans, and parameters gathered; private to the engine.
    swaps: list[Swap] = field(default_factory=list, repr=False)
    spans: dict[str, Tensor] = field(default_factory=dict, repr=False)
    gathered: dict[Any, Any] = field(default_factory=dict, repr=False)
    # How often each block that serves as several has begun.
    begun: dict[str, int] = field(default_factory=dict, repr=False)

    @cached_property
    def rows(self) -> int:
        """Number of rows before any expansion."""
        return sum(segment.rows for segment in self.segments)

    def expansion(self, size: int, place: str) -> int:
        """Return how often each row is repeated in a tensor of `size` rows. RoutingError if it does not fit."""
        times, rest = divmod(size, self.rows)
        if rest or not times or self.expand % times:
            expected = f"{self.rows}" if self.expand == 1 else f"{self.rows} or {self.rows * self.expand}"
            raise RoutingError(f"{place} got {size} rows, the call routes {expected}; give one delta per input row")
        return times

    def runs(self, site: Site) -> bool:
        """Whether a module that runs now does so as this site: another run of a shared block is another site."""
        return site.calls == 1 or (self.begun[self.bank.shared[site.key]] - 1) % site.calls == site.call

    def start(self, row: int, times: int) -> int:
        """Return where a row begins along dimension 0 of a tensor of rows repeated `times`, or of tokens."""
        return row * times if self.packed is None else self.packed.starts[row]

    def permutation(self, times: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Return (order, inverse) over rows repeated `times`, or None if the rows stand in order already."""
        if self.order is None:
            return None
        key = ("order", times, device)
        if key not in self.gathered:
            order = (self.order.to(device)[:, None] * times + torch.arange(times, device=device)).reshape(-1)
            self.gathered[key] = (order, torch.argsort(order))
        found: tuple[Tensor, Tensor] = self.gathered[key]
        return found


_current: ContextVar[Call | None] = ContextVar("deltatune_call", default=None)
# A delta of weights replaces parameters of modules that all threads share, so its bank runs one call at a time.
_one_at_a_time = threading.RLock()


def current() -> Call | None:
    """The call that this thread is in, or None: then the backbone acts alone."""
    return _current.get()


@contextmanager
def entered(call: Call | None) -> Iterator[None]:
    """Run a block of code inside a call."""
    token = _current.set(call)
    try:
        with _one_at_a_time if call is not None and call.bank.weights_key else nullcontext():
            yield
    finally:
        _current.reset(token)


@contextmanager
def swapped(swaps: Sequence[Swap]) -> Iterator[None]:
    """Run a block of code with other weights in place of the backbone's own."""
    own = [(module, name, module._parameters[name]) for module, name, _ in swaps]
    try:
        for module, name, weight in swaps:
            module._parameters[name] = weight  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in own:
            module._parameters[name] = parameter


def recalling(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a checkpoint function so that recomputation happens inside the call of the first computation."""

    @outside
    @functools.wraps(checkpoint)
    def wrapped(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = current()
        begun = {} if call is None else dict(call.begun)

        def again(*inner: Any, **more: Any) -> Any:
            if call is not None:
                call.begun.update(begun)  # a recomputed block begins as the same one
                for path in call.begun.keys() - begun.keys():
                    call.begun[path] = 0
            with entered(call), swapped(call.swaps if call is not None else ()):
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
