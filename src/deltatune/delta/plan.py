"""Plans: how the layers at each site run for one routing. Worked out once per routing and kept by the bank.

One meaning, two executions. The meaning is a loop over segments of rows. Neighbouring segments whose layers are of one
kind and whose row counts agree run as one batched product instead; a law says that both agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deltatune.delta.call import Segment
from deltatune.delta.layer import Layer

if TYPE_CHECKING:
    from deltatune.delta.bank import Bank
    from deltatune.delta.delta import Delta

Place = tuple[str, str]  # (site key, port)


@dataclass(frozen=True, eq=False)
class Run:
    """Rows `start:stop` whose deltas' layers run together: the same kind, the same number of rows each."""

    start: int
    stop: int
    layers: tuple[Layer, ...]
    deltas: tuple[str, ...]
    segments: tuple[int, ...]
    scale: float = 1.0
    # Where the layers stand in their stack; found once by the bank, whose stacks live no longer than its plans.
    stacked: list[Any] = field(default_factory=list, repr=False)


class Plan:
    """The runs at every place for one sequence of segments."""

    def __init__(self, bank: Bank, segments: tuple[Segment, ...], batched: bool = True) -> None:
        self._bank, self._segments, self._batched = bank, segments, batched
        self._rounds: dict[Place, tuple[tuple[Run, ...], ...]] = {}

    def rounds(self, place: Place) -> tuple[tuple[Run, ...], ...]:
        """Return the rounds at a place: in round j every delta's j-th layer there acts."""
        found = self._rounds.get(place)
        if found is None:  # of two threads that build it at a time, one wins
            found = self._rounds.setdefault(place, tuple(self._build(place)))
        return found

    def packs(self, training: bool) -> bool:
        """Whether every delta of this routing may run on tokens without padding."""
        names = {segment.delta for segment in self._segments if segment.delta is not None}
        return all(packs(self._bank[name], training) for name in names)

    def _build(self, place: Place) -> list[tuple[Run, ...]]:
        layers = self._bank.layers_at(place)
        here = [layers.get(s.delta, ()) if s.delta is not None else () for s in self._segments]
        depth = max((len(found) for found in here), default=0)
        rounds = (self._round([found[j] if j < len(found) else None for found in here]) for j in range(depth))
        return [runs for runs in rounds if runs]  # at weight 0 nothing runs

    def _round(self, layers: Sequence[Layer | None]) -> tuple[Run, ...]:
        runs: list[Run] = []
        start = 0
        for number, (segment, layer) in enumerate(zip(self._segments, layers, strict=True)):
            stop = start + segment.rows
            if layer is not None and segment.scale != 0 and segment.delta is not None:
                run = Run(start, stop, (layer,), (segment.delta,), (number,), segment.scale)
                if runs and self._batched and self._joins(runs[-1], run):
                    last = runs.pop()
                    run = Run(
                        last.start,
                        stop,
                        last.layers + run.layers,
                        last.deltas + run.deltas,
                        last.segments + run.segments,
                    )
                runs.append(run)
            start = stop
        return tuple(runs)

    @staticmethod
    def _joins(left: Run, right: Run) -> bool:
        first, layer = left.layers[0], right.layers[0]
        return (
            left.stop == right.start
            and layer.positionwise
            and layer.dropout == 0
            and left.scale == right.scale == 1.0
            and (left.stop - left.start) // len(left.layers) == right.stop - right.start
            and first.kind() == layer.kind()
        )


def packs(delta: Delta, training: bool) -> bool:
    """Whether a delta may run on tokens without padding.

    Layers that see whole rows, and those that put tokens in or move positions, need the rows; dropout is drawn row by
    row, and a mixture of experts sees several pairs for each token.
    """
    return all(
        layer.positionwise
        and layer.port != "tokens"
        and not layer.shift
        and not site.experts
        and not (training and layer.dropout)
        for site, layer in delta.at_sites()
    )
