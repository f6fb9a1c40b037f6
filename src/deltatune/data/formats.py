"""Files of rows: jsonl, json, csv, tsv (each also .gz) and parquet, read with the place of every row kept."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltatune.errors import TaskError

SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Table:
    """Rows as they stand in a file: `places[i]` ("line 7") says where `rows[i]` is, for messages."""

    name: str
    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    places: list[str]


def suffix(path: Path) -> str:
    """Return the format of a file by its name, without `.gz`: ".jsonl" of "train.jsonl.gz"."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def stem(path: Path) -> str:
    """Return a file's name without its format: "train" of "train.jsonl.gz"."""
    name = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
    return Path(name).stem


def read_table(path: Path) -> Table:
    """Read one file of rows.

    Raises TaskError for an unknown format, a file that is empty, damaged or not UTF-8, and a malformed row.
    """
    reader = READERS.get(suffix(path))
    if reader is None:
        raise TaskError(f"{path}: unknown format {path.suffix!r}; valid: {', '.join(READERS)} (each also .gz)")
    try:
        table = reader(path)
    except OSError as error:
        raise TaskError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (EOFError, zlib.error) as error:
        raise TaskError(f"{path}: the compressed file is damaged or cut short; copy or download it again") from error
    if not table.rows:
        raise TaskError(f"{path}: no rows; expected one row for each example")
    return table


def _text(path: Path) -> str:
    data = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        data = gzip.decompress(data)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise TaskError(f"{path}: the text is UTF-16; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TaskError(f"{path}: line {line} is not UTF-8 (byte {data[error.start]:#04x}); save it so") from error
    if not text.strip():
        raise TaskError(f"{path}: the file is empty; expected one row for each example")
    return text


def _jsonl(path: Path) -> Table:
    rows, places = [], []
    for number, line in enumerate(_text(path).split("\n"), 1):  # not splitlines: U+2028 may stand in a JSON string
        if line.strip():
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise TaskError(f"{path}: line {number} is not JSON ({_reason(error)})") from error
            rows.append(_object(row, path, f"line {number}"))
            places.append(f"line {number}")
    return Table(str(path), _columns(rows), rows, places)


def _json(path: Path) -> Table:
    text = _text(path)
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise TaskError(f"{path}: row {_row_of_fault(text)} is not JSON ({_reason(error)})") from error
    if not isinstance(found, list):
        raise TaskError(f'{path}: got {_kind(found)}; expected a list of objects: [{{"text": ..., "label": ...}}, ...]')
    rows = [_object(row, path, f"row {number}") for number, row in enumerate(found, 1)]
    return Table(str(path), _columns(rows), rows, [f"row {number}" for number in range(1, len(rows) + 1)])


def _row_of_fault(text: str) -> int:
    decoder, number = json.JSONDecoder(), 1
    at = text.find("[") + 1
    try:
        while at:
            space = SPACE.match(text, at)
            _, at = decoder.raw_decode(text, space.end() if space else at)
            at = text.index(",", at) + 1
            number += 1
    except (ValueError, RecursionError):
        pass
    return number


def _csv(path: Path) -> Table:
    text = _text(path)
    head = text.split("\n", 1)[0]
    delimiter = "," if "," in head else next((mark for mark in ";\t|" if mark in head), ",")
    return _delimited(path, text, delimiter, quoting=csv.QUOTE_MINIMAL)


def _tsv(path: Path) -> Table:
    """Read with quotes honoured, as spreadsheets write them, else as plain text, as most published tsv files are."""
    text = _text(path)
    try:
        return _delimited(path, text, "\t", quoting=csv.QUOTE_MINIMAL)
    except TaskError:
        return _delimited(path, text, "\t", quoting=csv.QUOTE_NONE)


def _delimited(path: Path, text: str, delimiter: str, quoting: Any) -> Table:
    rows, places = [], []
    with _long_fields():
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
        lines = _lines(reader, path)
        _, header = next(lines)
        columns = tuple(name.strip() for name in header)
        twice = sorted({name for name in columns if columns.count(name) > 1})
        if twice:
            raise TaskError(f"{path}: line 1 names column {twice[0]!r} twice; expected a name for each column, once")
        for line, cells in lines:
            if len(cells) != len(columns):
                fix = f"; put quotes round a text that has a {delimiter!r} in it" if len(cells) > len(columns) else ""
                raise TaskError(
                    f"{path}: line {line} has {len(cells)} columns; expected {len(columns)} ({', '.join(columns)}){fix}"
                )
            rows.append(dict(zip(columns, cells, strict=True)))
            places.append(f"line {line}")
    return Table(str(path), columns, rows, places)


def _lines(reader: Any, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows that are not blank, each with the number of the line on which it starts."""
    start = 1
    try:
        for cells in reader:
            if cells:
                yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise TaskError(f"{path}: line {start} has misplaced quotes ({error}); double a quote inside a text") from error


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lift the csv module's limit of 128 KiB for a field, which is the process's, for as long as we read."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        # Not read_table(path): it would take folders called name=value for columns.
        with path.open("rb") as file:
            table = pyarrow.parquet.read_table(file)
    except pyarrow.ArrowException as error:
        raise TaskError(f"{path}: not a parquet file, or damaged ({str(error).splitlines()[0]})") from error
    places = [f"row {number}" for number in range(1, table.num_rows + 1)]
    return Table(str(path), tuple(table.column_names), table.to_pylist(), places)


def _object(row: object, path: Path, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise TaskError(f'{path}: {place} is {_kind(row)}; expected an object: {{"text": ..., "label": ...}}')
    return row


def _columns(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for row in rows for name in row))


def _reason(error: Exception) -> str:
    return f"{error.msg} at character {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


READERS: Mapping[str, Callable[[Path], Table]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
