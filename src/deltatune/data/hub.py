"""Data sets of the Hugging Face hub, and objects of `datasets`, streams among them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from deltatune.data.formats import Table
from deltatune.errors import TaskError

NAME = re.compile(r"(?P<path>[^@:]+?)(:(?P<config>[^@]+))?(@(?P<revision>.+))?")
SPLIT_NAMES = {
    "train": ("train",),
    "dev": ("validation", "dev", "val", "validation_matched"),
    "test": ("test", "test_matched"),
}


def read_hub(name: str, max_rows: int | None = None) -> dict[str, Table]:
    """Return the splits of `owner/name[:config][@revision]` as tables, class numbers turned into names.

    With `max_rows` the set is streamed: so many rows of each split are read, the first ones, and no more. A split
    without labels (every label -1, as GLUE's tests) is left out.
    Raises TaskError where the name is unknown, the network absent or the data set has no train split.
    """
    import datasets

    parts = NAME.fullmatch(name)
    if parts is None:
        raise TaskError(f"hf:{name}: expected hf:OWNER/NAME, hf:OWNER/NAME:CONFIG or hf:OWNER/NAME@REVISION")
    try:
        with _quiet():
            streamed = {"streaming": True} if max_rows else {}
            found = datasets.load_dataset(parts["path"], parts["config"], revision=parts["revision"], **streamed)
            return _splits(f"hf:{name}", found, max_rows)
    except TaskError:
        raise
    except Exception as error:  # datasets, huggingface_hub, the http client and fsspec each raise their own
        raise TaskError(_advice(name, error)) from error


def is_dataset(source: object) -> bool:
    """Say whether `source` is an object of `datasets`, without importing it."""
    return any(kind.__module__.partition(".")[0] == "datasets" for kind in type(source).__mro__)


def read_dataset(source: Any, max_rows: int | None = None) -> tuple[str, dict[str, Table]]:
    """Return the name and the splits of a Dataset, a DatasetDict, or a stream of either, of which it reads `max_rows`.

    A lone Dataset is train. Raises TaskError for a stream without `max_rows`, and where there is no train split.
    """
    from datasets import IterableDataset

    splits = source if isinstance(source, dict) else {"train": source}
    kind = type(source).__name__
    if max_rows is None and any(isinstance(one, IterableDataset) for one in splits.values()):
        raise TaskError(f"{kind}: a stream may have no end; say how many rows to read of a split with max_rows=")
    info = next((one.info for one in splits.values() if one.info is not None), None)
    return getattr(info, "dataset_name", None) or "dataset", _splits(kind, splits, max_rows)


def _splits(name: str, found: Mapping[str, Any], max_rows: int | None) -> dict[str, Table]:
    tables = {}
    for split, names in SPLIT_NAMES.items():
        there = next((one for one in names if one in found), None)
        if there:
            table = _table(f"{name}[{there}]", found[there] if max_rows is None else found[there].take(max_rows))
            if table.rows and not all(row.get("label") == -1 for row in table.rows):
                tables[split] = table
    if "train" not in tables:
        raise TaskError(f"{name}: no train split with labels; splits: {', '.join(found)}")
    return tables


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the hub client's line for each retry: what went wrong is said once, at the end."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _table(name: str, dataset: Any) -> Table:
    names = {column: _names(feature) for column, feature in (dataset.features or {}).items()}
    rows = [{column: _named(cell, names.get(column)) for column, cell in row.items()} for row in dataset]
    # A stream that was mapped does not know its columns before it is read.
    columns = tuple(dataset.column_names or dict.fromkeys(column for row in rows for column in row))
    return Table(name, columns, rows, [f"row {number}" for number in range(1, len(rows) + 1)])


def _names(feature: Any) -> list[str] | None:
    """Return the class names of a feature or of the list it holds, None where it has none."""
    inner = getattr(feature, "feature", feature)
    return getattr(inner, "names", None)


def _named(cell: Any, names: list[str] | None) -> Any:
    if names is None:
        return cell
    if isinstance(cell, list):
        return [_named(one, names) for one in cell]
    return names[cell] if isinstance(cell, int) and 0 <= cell < len(names) else cell


def _advice(name: str, error: Exception) -> str:
    kind, text = type(error).__name__, str(error).strip().split("\n")[0]
    if isinstance(error, ConnectionError) or re.search("Connect|Offline|Timeout|ProxyError", kind + text):
        return (
            f"hf:{name}: the hub cannot be reached and the data set is not in the local cache; "
            f"run once with a network, or give a folder of train.jsonl, dev.jsonl and test.jsonl instead"
        )
    if "config" in text.lower():
        return f"hf:{name}: {text}; give hf:{name}:CONFIG"
    return f"hf:{name}: {kind}: {text or 'no reason given'}; check the name on the hub"
