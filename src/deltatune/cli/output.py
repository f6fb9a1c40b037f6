"""What a verb says: tables and sentences for people, or one JSON value for programs, and nothing else on stdout."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

FILE_WIDTH = 160  # columns where no terminal sets them: a name cut short is of no use in a file
_answer: ContextVar[TextIO | None] = ContextVar("deltatune_answer", default=None)


@contextmanager
def own_stdout() -> Iterator[None]:
    """Keep stdout for `say`: whatever a library prints in the block goes to stderr.

    A reader of stdout that goes away (`| head`) ends the block quietly.
    """
    out = sys.stdout
    token = _answer.set(out)
    try:
        with redirect_stdout(sys.stderr):
            yield
        out.flush()
    except BrokenPipeError:
        # Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
    finally:
        _answer.reset(token)


def say(value: Any, as_json: bool, *shown: RenderableType) -> None:
    """Print the answer of a verb: `value` as JSON, or the renderables `shown`."""
    out = _answer.get() or sys.stdout
    if as_json:
        print(json.dumps(plain(value), ensure_ascii=False, indent=1), file=out)
        return
    console = console_for(out)
    for one in shown:
        console.print(one)


def note(text: str) -> None:
    """Print a line that is no part of the answer, on stderr."""
    print(one_line(text), file=sys.stderr)


def console_for(file: TextIO) -> Console:
    """Return a console on a file; texts with brackets are not markup."""
    from rich.console import Console

    return Console(file=file, width=None if file.isatty() else FILE_WIDTH, markup=False, highlight=False, emoji=False)


def table(*headings: str, title: str | None = None, right: tuple[str, ...] = (), whole: tuple[str, ...] = ()) -> Table:
    """Return an empty table; the columns in `right` hold numbers, those in `whole` are not broken into lines."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        made.add_column(
            heading,
            justify="right" if heading in right else "left",
            overflow="fold",
            no_wrap=heading in (*whole, *right),
        )
    return made


def one_line(text: str) -> str:
    """Return a text with its line breaks made spaces."""
    return " ".join(text.split())


def plain(value: Any) -> Any:
    """Return data that JSON can hold: numbers that are none become null, everything unknown its text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return str(value)
