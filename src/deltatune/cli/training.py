"""What the verbs that train have in common: settings, progress, being interrupted, and the last words."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltatune.cli.command import Invocation
from deltatune.cli.output import note
from deltatune.cli.progress import Listener, progress
from deltatune.errors import Interrupted

if TYPE_CHECKING:
    import typer
    from rich.console import RenderableType

    from deltatune.studies.verbs import Runs
    from deltatune.training.estimate import Estimate
    from deltatune.training.settings import Settings


class Announce:
    """Says the estimate before the first step, and keeps it."""

    heard: Estimate | None = None

    def __call__(self, estimate: Estimate) -> None:
        self.heard = estimate
        note(f"estimate: {estimate}")


def command_of(context: typer.Context) -> str:
    """Return the command as it can be pasted into a shell."""
    said = context.find_root().obj
    return said.command if isinstance(said, Invocation) else "deltatune"


def settings_from(**fields: Any) -> Settings:
    """Make settings of the options that were given. UserError for a value that does not fit."""
    from deltatune.studies.verbs import make_settings

    return make_settings(**{name: value for name, value in fields.items() if value is not None})


@contextmanager
def watched(command: str, out: Path | None) -> Iterator[tuple[Listener, Announce]]:
    """Show the progress of a training; say how to go on if it is interrupted."""
    try:
        with progress() as listener:
            yield listener, Announce()
    except KeyboardInterrupt:
        what = "interrupted; resume with" if out is not None else "interrupted, nothing was saved; start again with"
        raise Interrupted(f"{what}: {command}") from None


def finished(runs: Runs) -> Sequence[RenderableType]:
    """Return what to print of finished runs: the decision, the table, where things are and how to use them."""
    shown: list[RenderableType] = []
    for result, table in zip(runs.results, runs.tables, strict=True):
        shown += [result["sentence"], table]
    if runs.out is None:
        return [*shown, "Nothing was saved: give --out FOLDER to keep deltas and a report."]
    best = [_best(result) for result in runs.results]
    shown += [f'Saved. Use it: deltatune predict {shlex.quote(folder)} "..."' for folder in best if folder is not None]
    return [*shown, *(f"Report: {file}" for file in sorted(runs.out.rglob("report.html")))]


def _best(result: Mapping[str, Any]) -> str | None:
    """Return the folder of the chosen delta: of its seeds the one that is best on dev."""
    metric = result["task"]["metric"]
    mine = [run for run in result["runs"] if run["saved"] is not None and run["delta"] == result["chosen"]]
    scored = [run for run in mine if run["metrics"]["dev"].get(metric) is not None]
    return max(scored, key=lambda run: run["metrics"]["dev"][metric])["saved"] if scored else None
