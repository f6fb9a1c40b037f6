"""`deltatune import`: read a delta that another library saved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltatune.cli.options import AsJson, BackboneName
from deltatune.cli.output import note, say

EXAMPLE = "deltatune import their-lora/ --backbone smollm2 --out ours/"


def import_(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", show_default=False, help="A folder of PEFT or OpenDelta.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", show_default=False, help="Where to save the delta.")],
    backbone: BackboneName = "minilm",
    as_json: AsJson = False,
) -> None:
    """Read a folder of PEFT or OpenDelta onto a backbone and save it as a delta of ours.

    What has no counterpart is refused by name.
    """
    import warnings

    from deltatune.backbone.load import load
    from deltatune.delta.exchange.foreign import read
    from deltatune.errors import OutputError

    if out.exists():
        raise OutputError(f"{out} exists already; choose another place or remove it")
    network = load(backbone)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        delta = read(folder, network)
    for warning in caught:
        note(f"note: {warning.message}")
    delta.save(str(out))
    found = {
        "folder": str(out),
        "delta": str(delta.spec),
        "backbone": network.name,
        "trainable": delta.trainable(),
        "sites": len(delta.sites),
    }
    say(
        found,
        as_json,
        f"{out}: {delta.spec}, {delta.trainable():,} parameters at {len(delta.sites)} sites of {network.name}",
    )
