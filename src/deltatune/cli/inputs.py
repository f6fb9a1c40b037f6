"""What is to be predicted: texts from the command line, or the rows of a file that need have no label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltatune.errors import TaskError, UserError, nearest

if TYPE_CHECKING:
    from deltatune.data.formats import Table
    from deltatune.data.task import Kind, Row


@dataclass(frozen=True)
class Inputs:
    """Rows with the fields that a model may see, and the file's own cells beside them ({} for texts as typed)."""

    rows: list[Row]
    cells: list[dict[str, Any]]


def inputs_of(words: Sequence[str], kind: Kind, columns: Mapping[str, str]) -> Inputs:
    """Read the inputs that `words` name: one file of rows, or texts (two for each row of a pair task).

    TaskError for a file that is absent or malformed, with the row named, and for columns that do not match.
    """
    from deltatune.data import formats

    path = Path(words[0])
    if len(words) == 1 and formats.suffix(path) in formats.READERS:
        if not path.is_file():
            beside = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise TaskError(f"no file {path}{nearest(str(path), beside)}")
        return _from_table(formats.read_table(path), kind, columns)
    if columns:
        raise UserError("--columns is for a file; texts on the command line have no columns")
    rows = _from_texts(words, kind)
    return Inputs(rows, [{} for _ in rows])


def _from_texts(texts: Sequence[str], kind: Kind) -> list[Row]:
    from deltatune.data.task import INPUTS, PAIRS

    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise TaskError(f"text {number} is empty; expected some words")
    if kind in PAIRS:
        if len(texts) % 2:
            raise TaskError(f"this delta reads pairs of texts: got {len(texts)}, expected two for each pair, or a file")
        return [{"text": a, "text_b": b} for a, b in zip(texts[::2], texts[1::2], strict=True)]
    if kind == "image_classification":
        from deltatune.data.images import placed

        return [{"image": placed(text, f"image {n}", Path())} for n, text in enumerate(texts, 1)]
    if kind == "token_classification":
        return [{"tokens": text.split()} for text in texts]
    if kind == "multiple_choice":
        if len(texts) < 3:
            raise TaskError(
                f"this delta chooses: got {len(texts)} texts, expected one and two choices or more, or a file"
            )
        return [{"text": texts[0], "choices": list(texts[1:])}]
    if kind == "extractive_span":
        if len(texts) % 2:
            raise TaskError(
                f"this delta finds answers: got {len(texts)} texts, expected a context and its question, or a file"
            )
        return [{"context": a, "question": b} for a, b in zip(texts[::2], texts[1::2], strict=True)]
    if kind == "chat":
        return [{"messages": [{"role": "user", "content": text}]} for text in texts]
    if kind == "preference":
        if len(texts) % 3:
            raise TaskError(f"this delta reads a prompt and two answers: got {len(texts)} texts, expected three a row")
        return [dict(zip(INPUTS[kind], texts[i : i + 3], strict=True)) for i in range(0, len(texts), 3)]
    return [{INPUTS[kind][0]: text} for text in texts]


def _from_table(table: Table, kind: Kind, columns: Mapping[str, str]) -> Inputs:
    from deltatune.data.columns import OTHER_NAMES
    from deltatune.data.images import placed
    from deltatune.data.task import FIELDS, INPUTS, OPTIONAL

    fields = INPUTS[kind]
    for field in columns:
        if field not in (*FIELDS[kind], *OPTIONAL[kind]):
            raise TaskError(f"--columns names the field {field!r}; this delta reads {', '.join(fields)}")
    mapping = {}
    for field in fields:
        column = columns.get(field, field if field in table.columns else OTHER_NAMES.get(field, field))
        if column not in table.columns and field in OPTIONAL[kind] and field not in columns:
            continue
        if column not in table.columns:
            raise TaskError(
                f"{table.name} has columns {', '.join(table.columns[:20])}; expected {', '.join(fields)}"
                f"{nearest(column, table.columns)}; name them with --columns {','.join(f'{f}=COLUMN' for f in fields)}"
            )
        mapping[field] = column
    rows = [
        {
            field: _cell(cells.get(column), field, f"{table.name}: {place}", column)
            for field, column in mapping.items()
            if field not in OPTIONAL[kind] or cells.get(column) not in (None, "")
        }
        for place, cells in zip(table.places, table.rows, strict=True)
    ]
    if kind == "image_classification":
        for row, place in zip(rows, table.places, strict=True):
            row["image"] = placed(row["image"], f"{table.name}: {place}", Path(table.name).parent)
    return Inputs(rows, table.rows)


def _cell(cell: Any, field: str, where: str, column: str) -> Any:
    import json

    from deltatune.data.rows import messages_of

    if field == "messages":
        said = messages_of(cell, where)
        # An answer at the end is the one that is to be written.
        while said and said[-1]["role"] == "assistant":
            said.pop()
        if not said:
            raise TaskError(f"{where}: no message to answer; expected the user's")
        return said
    if field == "tokens":
        if isinstance(cell, str):
            try:
                cell = json.loads(cell) if cell.lstrip().startswith("[") else cell.split()
            except json.JSONDecodeError:
                cell = cell.split()
        if not isinstance(cell, list) or not cell or not all(isinstance(word, str) and word for word in cell):
            raise TaskError(f"{where}: tokens (column {column!r}) has to be a list of words, none of them empty")
        return cell
    if field == "choices":
        from deltatune.data.choices import choices_of

        return choices_of(cell, where)
    if isinstance(cell, list | dict):
        raise TaskError(f"{where}: {field} (column {column!r}) is a list or a record; expected a text")
    if cell is None or not str(cell).strip():
        raise TaskError(f"{where} has no {field} (column {column!r} is empty or absent); fill it or delete the row")
    return str(cell)
