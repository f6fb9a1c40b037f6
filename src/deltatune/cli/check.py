"""`deltatune check`: hold a third party's method against the laws."""

from __future__ import annotations

EXAMPLE = "deltatune check my_method.py"


def check() -> None: ...
