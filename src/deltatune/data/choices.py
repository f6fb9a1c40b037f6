"""Multiple choice: the choices of a row, and which of them is right."""

from __future__ import annotations

import json
import string
from typing import Any

from deltatune.errors import TaskError


def choices_of(cell: Any, where: str) -> list[str]:
    """Return the choices of a cell: a list of texts, {"text": [...], "label": [...]}, JSON of either, or a | b | c.

    Raises TaskError, the row named, for fewer than two, or one that is empty.
    """
    found = _plain(cell)
    if isinstance(found, dict):
        found = found.get("text")
    if isinstance(found, str):
        found = found.split("|")
    if not isinstance(found, list) or any(isinstance(one, list | dict | None) for one in found):
        raise TaskError(f"{where}: choices has to be a list of texts, or texts with | between them")
    texts = [str(one).strip() for one in found]
    if len(texts) < 2 or not all(texts):
        raise TaskError(f"{where}: got choices {texts}; expected two or more, none of them empty")
    return texts


def right_choice(cell: Any, choices_cell: Any, choices: list[str], where: str) -> int:
    """Return the number of the right choice, from 0.

    A number counts from 0; a text is a name that stands beside the choices, else a choice itself, its number or its
    letter. Raises TaskError, the row named, for what is none of these, or means two different choices.
    """
    beside = _plain(choices_cell)
    names = [str(one) for one in beside.get("label") or []] if isinstance(beside, dict) else []
    if isinstance(cell, int | float) and not isinstance(cell, bool):
        meant = {int(cell)} if cell in range(len(choices)) else set()
    else:
        text = str(cell).strip()
        meant = {i for i, one in enumerate(choices) if one == text}
        if text in names:
            meant = {names.index(text)}
        elif not names:
            letter = string.ascii_uppercase.find(text.upper()) if len(text) == 1 else -1
            number = int(text) if text.isdecimal() else letter
            meant |= {number} & {*range(len(choices))}
    if len(meant) != 1:
        what = f"means choices {' and '.join(map(str, sorted(meant)))}" if meant else "is no choice"
        expected = ", ".join(names) if names else f"0 to {len(choices) - 1}, a letter from A, or the text of one choice"
        raise TaskError(f"{where}: label {cell!r} {what}; expected {expected}")
    return meant.pop()


def _plain(cell: Any) -> Any:
    if isinstance(cell, str) and cell.lstrip().startswith(("[", "{")):
        try:
            return json.loads(cell)
        except json.JSONDecodeError:
            return cell
    return cell
