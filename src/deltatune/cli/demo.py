"""`deltatune demo`: the whole of it on a real backbone and a real task, or on the visitor's own."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltatune.cli.options import AsJson, BackboneName, Columns, columns_of, task_names
from deltatune.cli.output import note, say, table
from deltatune.cli.training import command_of, finished, watched
from deltatune.errors import BackboneError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import RenderableType
    from rich.table import Table

    from deltatune.studies.demo import Told

EXAMPLE = "deltatune demo\ndeltatune demo --task reviews.csv --columns text=review,label=stars"
PLACE = Path("runs/demo")
LONGEST = 90  # characters of an input in the table


def demo(
    context: typer.Context,
    task: Annotated[
        str | None,
        typer.Option(
            "--task", metavar="TASK", autocompletion=task_names, help="Your own file instead of the built-in task."
        ),
    ] = None,
    columns: Columns = None,
    backbone: BackboneName = "minilm",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Where to save; left out: runs/demo, or runs/demo-2, ..."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train six deltas and two baselines from three seeds in one pass, choose, predict, and write the report."""
    from deltatune.data.load import load_task
    from deltatune.studies.demo import demo as show
    from deltatune.studies.verbs import check_out

    place = out or free_place(PLACE)
    check_out(place)
    loaded = load_task(task, columns=columns_of(columns)) if task is not None else None
    with watched(command_of(context), place) as (listener, announce):
        runs, predictions = show(
            loaded, place, backbone=backbone, listener=listener, announce=announce, command=command_of(context)
        )
        told = _story()
    answer = {**runs.json(), "predictions": predictions, "generation": vars(told) if told else None}
    say(answer, as_json, *finished(runs)[:2], _predictions(predictions), *_written(told), *finished(runs)[2:])


def free_place(wanted: Path) -> Path:
    """Return the first of `demo`, `demo-2`, ... that is free, or that holds a run to be resumed."""
    for number in count(1):
        place = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        if not place.exists() or (place / ".checkpoint").is_dir():
            return place
    raise AssertionError("no end of numbers")


def _story() -> Told | None:
    """Train the small language model and let it write; nothing where it is not installed."""
    from deltatune.studies.demo import story

    try:
        with _one_changing_line() as line:
            return story(line)
    except BackboneError as error:
        note(f"no generation: {error}")
        return None


@contextmanager
def _one_changing_line() -> Iterator[Callable[[str], None]]:
    """Yield what writes a line over the last one on a terminal; elsewhere only the last one is written."""
    said = [""]

    def write(text: str) -> None:
        said[0] = text
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    try:
        yield write
    finally:
        if said[0]:
            print("" if sys.stderr.isatty() else said[0], file=sys.stderr)


def _predictions(rows: Sequence[dict[str, Any]]) -> Table:
    from deltatune.studies.formatting import cut

    made = table(
        "predicted", "confidence", "right answer", "input", right=("confidence",), title="Three of the test rows"
    )
    for row in rows:
        made.add_row(
            _text(row["predicted"]),
            f"{row['confidence']:.3f}",
            _text(row["gold"]),
            cut(" ".join(row["input"].split()), LONGEST),
        )
    return made


def _text(answer: Any) -> str:
    return " ".join(answer) if isinstance(answer, list) else str(answer)


def _written(told: Told | None) -> list[RenderableType]:
    if told is None:
        return []
    made = table("smollm2", "its summary of a function", title=f"A LoRA for a language model, {told.seconds:.0f} s")
    for name, text in (("as it is", told.before), ("with the LoRA", told.after), ("its author wrote", told.wanted)):
        made.add_row(name, " ".join(text.split()))
    return [made]
