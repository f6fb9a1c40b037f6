"""What a search may spend, and how it spends it: candidates, rates, seeds and steps from plenty to little."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from deltatune.errors import OutputError, UserError
from deltatune.training import checkpoint

ETA = 3  # a rung keeps one in ETA
RUNGS = 3
ENOUGH = 0.5
FEWEST = 30  # steps below which a choice on dev says nothing
FEWEST_ROWS = 100  # the same of dev rows
LOOKS = 0.1  # share of the time that looking at dev may take
SURE = 0.93  # share of the time that is left which training plans for: a machine is not always as fast as it was


@dataclass(frozen=True)
class Budget:
    """Seconds of wall clock, or optimiser steps over all candidates (then the result is deterministic for a seed)."""

    seconds: float | None = None
    steps: int | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Parse `10m`, `90s`, `1h` or `2000steps`. UserError otherwise."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|min|h|steps?)\s*", text)
        if not match or float(match[1]) <= 0 or (match[2].startswith("step") and "." in match[1]):
            raise UserError(f"budget {text!r}: expected a time such as 10m, 90s or 1h, or steps such as 2000steps")
        number, unit = float(match[1]), match[2]
        if unit.startswith("step"):
            return cls(steps=int(number))
        return cls(seconds=number * {"s": 1, "m": 60, "min": 60, "h": 3600}[unit])


@dataclass(frozen=True)
class Effort:
    """How widely a search looks: how many specs, rates of each, share of the seeds asked for, finalists."""

    specs: int
    rates: tuple[float, ...]
    seeds: float
    finalists: int = 2


# The first effort is made that lets a finalist train for ENOUGH of the steps that are worth its time: a delta trained
# too briefly is worth less than another rate, an interval over seeds, or a wider choice, in this order.
LADDER: tuple[Effort, ...] = (
    Effort(7, (0.3, 1.0, 3.0), 1.0),
    Effort(7, (1.0, 3.0), 1.0),
    Effort(7, (1.0,), 1.0),
    Effort(7, (1.0,), 2 / 3),
    Effort(7, (1.0,), 0.0),
    Effort(4, (1.0,), 0.0),
    Effort(2, (1.0,), 0.0, finalists=1),
)


@dataclass(frozen=True)
class Shape:
    """A search by its numbers: candidates, seeds of the finalists, finalists, cost of a step of the baseline."""

    number: int
    seeds: int
    finalists: int
    baseline: float = 1.0

    def kept(self, rung: int) -> int:
        """Return how many of the candidates train in a rung."""
        return min(self.number, max(self.finalists, math.ceil(self.number / ETA**rung)))

    @property
    def search(self) -> float:
        """What the rungs of the candidates and the baseline cost, in whole trainings."""
        parts = (self.kept(r) * (goal(1.0, r) - (goal(1.0, r - 1) if r else 0.0)) for r in range(RUNGS))
        return self.baseline + sum(parts)

    @property
    def others(self) -> float:
        """What the finalists and the baseline cost from the other seeds, in whole trainings."""
        return (self.finalists + self.baseline) * (self.seeds - 1)

    @property
    def trainings(self) -> float:
        """What a search and the training of its finalists cost, in whole trainings."""
        # A finalist of another spec may have been stopped at the first rung; it is trained to the end.
        return self.search + (self.finalists - 1) * (1 - goal(1.0, 0)) + self.others

    @property
    def looks(self) -> int:
        """How often dev is looked at during all trainings."""
        rungs = sum(self.kept(r) + 1 for r in range(RUNGS))
        return rungs + (self.finalists - 1) * (RUNGS - 1) + (self.finalists + 1) * (self.seeds - 1) * RUNGS


@dataclass(frozen=True)
class Means:
    """What a search may spend: what is left of the budget, and what things cost, in seconds.

    `step`: an optimiser step of one training, of which one of the baseline takes the share `baseline`; `look`: dev rows
    looked at during a training; `score`: dev and test of one training at the end. For a budget of steps a step costs
    one, and looking nothing.
    """

    budget: float
    left: float
    step: float = 1.0
    look: float = 0.0
    score: float = 0.0
    baseline: float = 1.0

    def last(self, shape: Shape) -> float:
        """Return what is kept for the end, when the finalists and the baseline are scored."""
        return (shape.finalists + 1) * shape.seeds * self.score

    def rows(self, shape: Shape, rows: int) -> int:
        """Return how many of `rows` dev rows a look may take."""
        looks = shape.looks * self.look
        return min(rows, max(FEWEST_ROWS, int(rows * LOOKS * self.left / looks))) if looks else rows

    def horizon(self, shape: Shape, rows: int) -> float:
        """Return the steps of a whole training that there are means for, with looks at some of `rows` dev rows."""
        looks = shape.looks * self.look * self.rows(shape, rows) / rows
        return max(0.0, self.left - self.last(shape) - looks) / self.step / shape.trainings


def goal(horizon: float, rung: int) -> float:
    """Return the step to which a rung trains: a ninth, a third, all of the horizon."""
    return horizon * ETA ** (rung - RUNGS + 1)


def settled(place: Path | None, budget: Budget, measure: Callable[[], Means]) -> Means:
    """Return the means of a budget, measured once: a search that is resumed goes on as it began.

    OutputError if it began with another budget.
    """
    if place is None or budget.seconds is None:
        return measure()
    file = place / "budget.json"
    if not file.is_file():
        means = measure()
        with checkpoint.whole_file(file) as work:
            work.write_text(json.dumps(asdict(means)), encoding="utf-8")
        return means
    began = Means(**json.loads(file.read_text(encoding="utf-8")))
    if began.budget != budget.seconds:
        raise OutputError(
            f"{place.parent} holds an unfinished search of {began.budget:g} s; finish that one with its own "
            f"--budget, or choose another --out"
        )
    return began
