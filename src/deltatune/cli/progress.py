"""Progress of a training: a table with a row for each delta on a terminal, a line for each evaluation anywhere else.

It is shown on stderr, and heard of through the engine's listener.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from deltatune.cli.output import console_for, table

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

    from deltatune.training.job import Job

EVERY = 0.25  # seconds between two drawings
RECENT = 20  # steps over which a loss is averaged
Listener = Callable[[Sequence["Job"], str], None]


@contextmanager
def progress(file: TextIO | None = None) -> Iterator[Listener]:
    """Yield a listener for the engine that shows how far each delta is; what it showed stays when the block ends."""
    shown = Progress(file or sys.stderr)
    try:
        yield shown.hear
    finally:
        shown.close()


class Progress:
    """What has been heard, and where it is shown."""

    def __init__(self, file: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console_for(file), clock
        self._live: Live | None = None
        self._jobs: Sequence[Job] = ()
        self._started = self._drawn = 0.0
        self._first = 0  # steps that were done when it was first heard of

    def hear(self, jobs: Sequence[Job], event: str) -> None:
        """Take note of a step or an evaluation of these jobs."""
        now = self._clock()
        fresh = {id(job) for job in jobs} != {id(job) for job in self._jobs}
        if fresh:
            self.close()
            self._started, self._first = now, sum(job.step for job in jobs)
        self._jobs = jobs
        if self._console.is_terminal:
            if fresh or now - self._drawn >= EVERY:
                self._draw(now)
        elif fresh or event == "evaluated":
            self._console.print(self.line(), soft_wrap=True)

    def close(self) -> None:
        """Draw the last state and let it stand."""
        if self._live is not None:
            self._draw(self._clock())
            self._live.stop()
            self._live = None

    def _draw(self, now: float) -> None:
        from rich.live import Live

        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False)
            self._live.start()
        self._live.update(self.table(), refresh=True)
        self._drawn = now

    def groups(self) -> dict[str, list[Job]]:
        """Return label -> the jobs of its seeds; with several tasks the label begins with the task's name."""
        several = len({job.plan.task.name for job in self._jobs}) > 1
        found: dict[str, list[Job]] = {}
        for job in self._jobs:
            label = job.plan.label or str(job.plan.spec)
            found.setdefault(f"{job.plan.task.name}: {label}" if several else label, []).append(job)
        return found

    def left(self) -> float | None:
        """Seconds to the end at the pace so far, None while there is none."""
        done = sum(job.step for job in self._jobs) - self._first
        open_steps = sum(job.steps - job.step for job in self._jobs if job.active)
        spent = self._clock() - self._started
        return spent / done * open_steps if done > 0 and spent > 0 else None

    def table(self) -> Table:
        """Return a row for each delta: its seeds together."""
        numbers = ("step", "loss", "dev", "best dev", "tokens/s")
        made = table("delta", "seeds", *numbers, "state", right=("seeds", *numbers))
        longest = max(1, max(job.steps - job.step for job in self._jobs))
        whole = self.left()
        for label, jobs in self.groups().items():
            going = [job for job in jobs if job.active]
            # All deltas take their steps side by side: one with half the steps to go ends in half the time.
            ahead = max((job.steps - job.step for job in going), default=0)
            step = f"{min(job.step for job in jobs)}/{jobs[0].steps}"
            means = (number(mean(map(value, jobs))) for value in (loss, last_dev, best_dev))
            made.add_row(label, str(len(jobs)), step, *means, rate(jobs), state(jobs, whole, ahead / longest))
        return made

    def line(self) -> str:
        """Return the state of all deltas in one line."""
        jobs = self._jobs
        scores = {label: mean(map(best_dev, group)) for label, group in self.groups().items()}
        known = {label: value for label, value in scores.items() if value is not None}
        said = [
            f"step {max(job.step for job in jobs)}/{max(job.steps for job in jobs)}",
            f"{sum(job.active for job in jobs)} of {len(jobs)} trainings going",
            f"loss {number(mean(map(loss, jobs)))}",
        ]
        if known:
            best = max(known, key=lambda label: known[label])
            said.append(f"best dev {known[best]:.3f} ({best})")
        said.append(f"{rate(jobs)} tokens/s")
        whole = self.left()
        if whole is not None and any(job.active for job in jobs):
            said.append(f"about {seconds(whole)} left")
        return ", ".join(said)


def loss(job: Job) -> float | None:
    """Mean loss of the last steps, or that of the last logged point."""
    recent = job.losses[-RECENT:]
    if recent:
        return sum(recent) / len(recent)
    return job.curve[-1].loss if job.curve else None


def last_dev(job: Job) -> float | None:
    """The last dev score."""
    return job.curve[-1].dev if job.curve else None


def best_dev(job: Job) -> float | None:
    """The best dev score."""
    return job.best_dev


def mean(values: Iterator[float | None]) -> float | None:
    """Mean of the values that are numbers, None where there is none."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def number(value: float | None) -> str:
    """Return three decimals."""
    return "–" if value is None else f"{value:.3f}"


def rate(jobs: Sequence[Job]) -> str:
    """Return tokens trained on per second of these jobs' own share of the time."""
    spent = sum(job.seconds for job in jobs)
    return f"{sum(job.tokens for job in jobs) / spent:,.0f}" if spent > 0 else "–"


def state(jobs: Sequence[Job], whole: float | None, share: float) -> str:
    """Return the time left for these jobs, or how they ended."""
    broken = sum(job.state == "nan" for job in jobs)
    ended = f"{broken} diverged" if broken else ""
    if any(job.active for job in jobs):
        left = "" if whole is None else f"{seconds(whole * share)} left"
        return ", ".join(filter(None, (left, ended)))
    return ended or ("stopped" if any(job.state == "stopped" for job in jobs) else "done")


def seconds(value: float) -> str:
    """Return a duration in whole seconds or minutes."""
    return f"{value:.0f} s" if value < 100 else f"{value / 60:.0f} min"
