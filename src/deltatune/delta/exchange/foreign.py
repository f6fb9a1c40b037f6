"""Folders of other libraries: whose a folder is, and how it is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from deltatune.backbone.load import Backbone
from deltatune.delta.delta import Delta
from deltatune.delta.exchange import opendelta, peft
from deltatune.errors import DeltaFileError

LIBRARIES: dict[str, tuple[Callable[[Path], bool], Callable[[Path, Backbone], Delta]]] = {
    "PEFT": (peft.recognised, peft.read),
    "OpenDelta": (opendelta.recognised, opendelta.read),
}


def library(folder: Path) -> str | None:
    """Name the library that saved a folder; None for one that is of none of them."""
    return next((name for name, (recognised, _) in LIBRARIES.items() if recognised(folder)), None)


def read(folder: Path, backbone: Backbone) -> Delta:
    """Read another library's folder as a delta on a backbone.

    It warns that the backbone's weights cannot be verified. DeltaFileError for a folder of no library that is known,
    one that is damaged or does not fit, and for what has no counterpart.
    """
    name = library(folder)
    if name is None:
        raise DeltaFileError(
            f"{folder} is no folder of {' or '.join(LIBRARIES)}: it has neither {peft.CONFIG} nor a {opendelta.CONFIG} "
            f"that names OpenDelta"
        )
    return LIBRARIES[name][1](folder, backbone)
