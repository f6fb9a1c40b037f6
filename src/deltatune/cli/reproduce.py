"""`deltatune reproduce`: the published systems, their claims, and what was shown of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltatune.cli.options import AsJson
from deltatune.cli.output import say, table
from deltatune.errors import UnknownName, UserError

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLE = "deltatune reproduce --list"


def _names(incomplete: str) -> list[str]:
    from deltatune.recipes.ledger import load_systems

    return [system.id for system in load_systems() if system.id.startswith(incomplete)]


def reproduce(
    system: Annotated[
        str | None,
        typer.Argument(metavar="[SYSTEM]", show_default=False, autocompletion=_names, help="One of the list."),
    ] = None,
    list_all: Annotated[bool, typer.Option("--list", help="List the systems with their claims and states.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the published systems that this project reproduces, each in its honest state."""
    from deltatune.recipes.ledger import load_systems, reproduce_list

    known = [one.id for one in load_systems()]
    if system is not None and system not in known:
        raise UnknownName("system", system, known, "`deltatune reproduce --list` names them")
    rows = [row for row in reproduce_list() if system in (None, row["system"])]
    if list_all:
        say(rows, as_json, _table(rows), f"{sum(len(row['claims']) for row in rows)} claims of {len(rows)} systems.")
        return
    if system is None:
        raise UserError("`deltatune reproduce` needs a SYSTEM, or --list, which names them")
    # No recipe can be run yet: this says so in the words of the ledger, which computes the state.
    raise UserError(
        f"{system}: {rows[0]['state']}, so there is nothing to run; its {len(rows[0]['claims'])} claims and their "
        f"criteria are in `deltatune reproduce {system} --list --json`"
    )


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    made = table("system", "claims", "state", "source", right=("claims",))
    for row in rows:
        made.add_row(row["system"], str(len(row["claims"])), row["state"], row["source"])
    return made
