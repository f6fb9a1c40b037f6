"""From the cells of a table to canonical rows."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltatune.data.choices import choices_of, right_choice
from deltatune.data.formats import Table
from deltatune.data.images import placed as placed_image
from deltatune.data.spans import answers_of
from deltatune.data.task import FIELDS, OPTIONAL, Kind, Row
from deltatune.errors import TaskError, nearest

ROLES = ("system", "user", "assistant", "tool")
Placed = tuple[str, Row]
"""A row and where it stands ("reviews.csv: line 7"), for messages."""


def canonical(table: Table, kind: Kind, columns: Mapping[str, str]) -> list[Placed]:
    """Return the rows with canonical fields only, `columns` saying which column holds which field.

    Raises TaskError, the row named, for a field that is missing, empty or of another type.
    """
    folder = Path(table.name).parent
    optional = {*OPTIONAL[kind]} & columns.keys()
    placed = []
    for place, cells in zip(table.places, table.rows, strict=True):
        where = f"{table.name}: {place}"
        row = {field: _value(field, cells.get(columns[field]), where, columns[field], folder) for field in FIELDS[kind]}
        for field in optional:
            if field == "weight" or not _missing(cells.get(columns[field])):
                row[field] = _value(field, cells[columns[field]], where, columns[field], folder)
        if kind == "token_classification" and len(row["tokens"]) != len(row["tags"]):
            raise TaskError(
                f"{where} has {len(row['tokens'])} tokens and {len(row['tags'])} tags; expected one tag for each token"
            )
        if kind == "multiple_choice":
            row["label"] = right_choice(cells[columns["label"]], cells[columns["choices"]], row["choices"], where)
        if kind == "extractive_span":
            row["answers"] = answers_of(row["answers"], row["context"], where)
        placed.append((where, row))
    return placed


def _value(field: str, cell: Any, where: str, column: str, folder: Path) -> Any:
    if field == "labels":
        return _labels(cell, where)
    if _missing(cell):
        raise TaskError(f"{where} has no {field} (column {column!r} is empty or absent); fill it or delete the row")
    if field in ("value", "weight"):
        return _number(cell, field, where, column)
    if field == "choices":
        return [_checked(text, where, field) for text in choices_of(cell, where)]
    if field == "answers":
        return cell
    if field in ("tokens", "tags", "targets"):
        return _texts(cell, field, where)
    if field == "messages":
        return messages_of(cell, where)
    if field == "image":
        return placed_image(cell.strip() if isinstance(cell, str) else cell, where, folder)
    if isinstance(cell, list) and column == "table":
        return _checked(_linearised(cell, where), where, field)
    if isinstance(cell, list | dict):
        raise TaskError(f"{where}: {field} is a {'list' if isinstance(cell, list) else 'record'}; expected a text")
    text = _checked(str(cell), where, field)
    return text.strip() if field == "label" else text


def _number(cell: Any, field: str, where: str, column: str) -> float:
    try:
        value = float(cell)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value) or (field == "weight" and value < 0):
        what = "a number" if field == "value" else "0 or more"
        raise TaskError(f"{where}: {field} is {cell!r} (column {column!r}); expected {what}")
    return value


def _labels(cell: Any, where: str) -> list[str]:
    """Return the labels of a row, each once and in order, none at all included; in a csv cell with , ; or | between."""
    if _missing(cell):
        return []
    if isinstance(cell, str) and not cell.lstrip().startswith("["):
        cell = [part.strip() for part in re.split(r"[,;|]", cell) if part.strip()]
    return sorted(set(_texts(cell, "labels", where))) if cell else []


def _missing(cell: Any) -> bool:
    if isinstance(cell, float):
        return math.isnan(cell)
    return cell is None or (isinstance(cell, str) and not cell.strip()) or (isinstance(cell, list) and not cell)


def _texts(cell: Any, field: str, where: str) -> list[str]:
    """Return a list of texts; in a csv cell it is a JSON list, or words with spaces between them."""
    if isinstance(cell, str):
        try:
            cell = json.loads(cell) if cell.lstrip().startswith("[") else cell.split()
        except json.JSONDecodeError:
            cell = cell.split()
    if not isinstance(cell, list) or not cell or any(_missing(one) or isinstance(one, list | dict) for one in cell):
        raise TaskError(f"{where}: {field} has to be a list of texts, none of them empty")
    return [_checked(str(one), where, field) for one in cell]


def messages_of(cell: Any, where: str) -> list[dict[str, str]]:
    """Return the messages of a conversation as role and content; in a csv cell they are a JSON list.

    Raises TaskError, the row named, for anything else.
    """
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except json.JSONDecodeError:
            cell = None
    if (
        not isinstance(cell, list)
        or not cell
        or not all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in cell)
    ):
        raise TaskError(f'{where}: messages has to be a list like [{{"role": "user", "content": "Hello"}}, ...]')
    made = []
    for number, one in enumerate(cell, 1):
        if one["role"] not in ROLES:
            raise TaskError(
                f"{where}: message {number} has role {one['role']!r}{nearest(str(one['role']), ROLES)}; expected "
                f"{', '.join(ROLES)}"
            )
        if not isinstance(one["content"], str):
            raise TaskError(f"{where}: message {number} has content that is no text; expected a text")
        made.append({"role": one["role"], "content": _checked(one["content"], where, "messages")})
    return made


def _linearised(table: list[Any], where: str) -> str:
    """Return "name: value | name: value" of a table of [name, value] pairs."""
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in table):
        raise TaskError(f"{where}: table has to be a list of [name, value] pairs")
    return " | ".join(f"{name}: {value}" for name, value in table)


def _checked(text: str, where: str, field: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TaskError(f"{where}: {field} has half a character at place {error.start + 1} (lone surrogate)") from error
    return text
