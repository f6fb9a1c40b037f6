"""What `eval` and `compare` say of scores and of rows."""

from __future__ import annotations

from typing import Literal, cast

from deltatune.data.intervals import Interval
from deltatune.errors import UnknownName

SPLITS = ("train", "dev", "test")


def split_of(name: str) -> Literal["train", "dev", "test"]:
    """Check the name of a split. UnknownName otherwise."""
    if name not in SPLITS:
        raise UnknownName("split", name, SPLITS)
    return cast(Literal["train", "dev", "test"], name)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the p-value of the exact McNemar test: how likely so uneven a disagreement is between equals."""
    from scipy.stats import binomtest

    both = only_first + only_second
    return float(binomtest(only_first, both, 0.5).pvalue) if both else 1.0


def said(value: Interval) -> dict[str, float | None]:
    """Return an interval as plain data."""
    return {"value": value.mean, "low": value.low, "high": value.high}


def shown(value: dict[str, float | None]) -> str:
    """Return `0.812 [0.790, 0.834]` of what `said` returned."""
    if value["low"] is None or value["high"] is None:
        return f"{value['value']:.3f}"
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
