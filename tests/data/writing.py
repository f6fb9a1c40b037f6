"""Rows written in every format that can be read, for tests."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

FORMATS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".csv.gz", ".tsv", ".parquet")


def write(folder: Path, name: str, rows: list[dict[str, Any]], suffix: str = ".jsonl") -> Path:
    """Write rows that all have the same fields; lists stand as JSON in csv and tsv. Return the file."""
    path = folder / f"{name}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    opened = gzip.open if suffix.endswith(".gz") else open
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        if suffix.startswith(".jsonl"):
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        elif suffix == ".json":
            json.dump(rows, file)
        else:
            writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",")
            writer.writerow(rows[0])
            writer.writerows([_cell(value) for value in row.values()] for row in rows)
    return path


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list) else value


def reviews(count: int = 60, classes: tuple[str, ...] = ("bad", "good")) -> list[dict[str, Any]]:
    """Return rows of distinct texts, the classes taking turns."""
    return [{"text": f"review {i} is long enough", "label": classes[i % len(classes)]} for i in range(count)]
