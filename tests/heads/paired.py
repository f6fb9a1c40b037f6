"""Rows of the kinds that set texts side by side or one after the other, as files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.fit.tiny import WORDS


def _row(kind: str, rng: random.Random, number: int) -> dict[str, Any]:
    topic = rng.randrange(4)
    said = [rng.choice(WORDS[20 * topic : 20 * topic + 20]) for _ in range(rng.randrange(3, 7))]
    other = [rng.choice(WORDS) for _ in range(rng.randrange(2, 6))]
    if kind == "embedding":
        row = {"anchor": " ".join([WORDS[number], *said]), "positive": " ".join([*said[:2], *other])}
        return row | {"negative": " ".join(other)} if number % 3 == 0 else row
    if kind == "preference":
        prompt = " ".join([WORDS[number], *said])
        return {"prompt": prompt, "chosen": " ".join(said[:2]), "rejected": " ".join(reversed(other))}
    asked = {"role": "user", "content": " ".join([WORDS[number], *said])}
    answer = {"role": "assistant", "content": " ".join(said[:2])}
    again = [{"role": "user", "content": " ".join(other)}, {"role": "assistant", "content": said[0]}]
    return {"messages": [asked, answer, *(again if number % 2 else [])]}


def rows_of(kind: str, number: int = 60) -> list[dict[str, Any]]:
    """Rows of a kind, no two with the same input."""
    rng = random.Random(0)
    return [_row(kind, rng, i) for i in range(number)]


def write(folder: Path, kind: str, number: int = 60) -> Path:
    """Write rows of a kind as a file."""
    file = folder / f"{kind}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(kind, number)))
    return file
