"""`deltatune push`: upload a saved delta to the Hugging Face hub."""

from __future__ import annotations

from typing import Annotated

import typer

from deltatune.cli.options import AsJson, Folder
from deltatune.cli.output import say

EXAMPLE = "deltatune push best/ user/reviews-lora --private"


def push(
    folder: Folder,
    repo: Annotated[str, typer.Argument(metavar="USER/REPO", show_default=False, help="Made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="If it is made, nobody else sees it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a saved delta with a generated card; it can then be loaded as user/repo."""
    from deltatune.cli.saved import read
    from deltatune.delta import hub

    where = hub.push(read(folder), repo, private=private)
    say({"folder": str(folder), "address": where}, as_json, f"{folder} is now {where}")
