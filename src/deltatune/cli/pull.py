"""`deltatune pull`: fetch a delta from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltatune.cli.options import AsJson
from deltatune.cli.output import say

EXAMPLE = "deltatune pull user/reviews-lora@main --out ours/"


def pull(
    address: Annotated[str, typer.Argument(metavar="USER/REPO[@REVISION]", show_default=False, help="A delta there.")],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", show_default=False, help="Where to save it.")],
    as_json: AsJson = False,
) -> None:
    """Fetch a delta and save it in a folder, after checking that it is whole."""
    from deltatune.cli.saved import read
    from deltatune.delta import hub

    delta = read(hub.pull(address))
    delta.save(str(out))
    found = {"address": address, "folder": str(out), "delta": str(delta.spec), "backbone": delta.backbone_name}
    say(found, as_json, f"{out}: {delta.spec} for {delta.backbone_name}, from {address}")
