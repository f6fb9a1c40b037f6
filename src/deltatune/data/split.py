"""Cutting splits by a seed, with no input in two of them."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from typing import Any

from deltatune.data.images import digest_of
from deltatune.data.rows import Placed
from deltatune.data.task import INPUTS, Kind, Row
from deltatune.errors import TaskError

SHARE = 0.1
LEAST = 3


def input_key(kind: Kind, row: Row) -> tuple[str, ...]:
    """Return what makes two inputs identical: their texts, whatever the white space between words; images' files."""
    parts = (digest_of(row[field]) if field == "image" else as_text(row.get(field, "")) for field in INPUTS[kind])
    return tuple(" ".join(part.split()) for part in parts)


def as_text(part: Any) -> str:
    """Return an input as one text: words with spaces between, messages one a line with their roles before."""
    if not isinstance(part, list):
        return str(part)
    if part and isinstance(part[0], dict):
        return "\n".join(f"{one['role']}: {one['content']}" for one in part)
    return " ".join(part)


def distinct(kind: Kind, placed: list[Placed]) -> tuple[list[Placed], int]:
    """Return the first row of each input, and how many rows were left out."""
    kept: dict[tuple[str, ...], Placed] = {}
    for one in placed:
        kept.setdefault(input_key(kind, one[1]), one)
    return list(kept.values()), len(placed) - len(kept)


def cut(name: str, kind: Kind, placed: list[Placed], parts: tuple[str, ...], seed: int) -> dict[str, list[Placed]]:
    """Cut each of `parts` (a tenth, at least 3 rows) from rows of distinct inputs; the rest is train.

    Labels have about the same share in every part, and every label keeps a row in train.
    Raises TaskError where there are too few rows for it.
    """
    size = max(LEAST, round(SHARE * len(placed)))
    rng = random.Random(seed)
    groups: dict[str, list[Placed]] = defaultdict(list)
    often = Counter(label for _, row in placed for label in row.get("labels", ()))
    for one in placed:
        # Of several labels the rarest: it is the one that might be left without a row in train.
        several = min(one[1].get("labels") or [""], key=lambda label: (often[label], label))
        groups[one[1].get("label", several)].append(one)
    train, spread = [], []
    for label in sorted(groups):
        rows = groups[label]
        rng.shuffle(rows)
        train.append(rows.pop())
        # Each label's rows are laid evenly over the unit interval, so any stretch of it is stratified.
        spread += [((i + 0.5) / len(rows), label, one) for i, one in enumerate(rows)]
    if len(placed) < LEAST + size * len(parts) or len(spread) < size * len(parts):
        labels = f" with {len(groups)} labels" if len(groups) > 1 else ""
        raise TaskError(
            f"{name}: {len(placed)} rows of distinct inputs{labels} are too few to cut {' and '.join(parts)} from; "
            f"expected {LEAST} rows or more in each split and, in train, one of each label"
        )
    spread.sort(key=lambda one: one[:2])
    made = {}
    for i, part in enumerate(parts):
        made[part] = [one for _, _, one in spread[i * size : (i + 1) * size]]
    made["train"] = train + [one for _, _, one in spread[len(parts) * size :]]
    for rows in made.values():
        rng.shuffle(rows)
    return made
