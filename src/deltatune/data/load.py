"""From a file, a folder, a hub data set or an embedded name to a task."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from deltatune.data import formats
from deltatune.data.check import CHECKS, check_answered, check_seen, check_sizes, check_words, known_only
from deltatune.data.columns import as_option, propose, resolve
from deltatune.data.embedded import build, embedded_tasks
from deltatune.data.formats import Table
from deltatune.data.hub import is_dataset, read_dataset, read_hub
from deltatune.data.images import image_folder
from deltatune.data.metrics import check_metric, default_metric
from deltatune.data.rows import Placed, canonical
from deltatune.data.split import cut, distinct, input_key
from deltatune.data.tags import is_bio, repaired
from deltatune.data.task import FIELDS, LABELLED, Kind, Task
from deltatune.errors import TaskError

if TYPE_CHECKING:
    import datasets

# A text, so that `datasets` is not imported for it.
Source: TypeAlias = (
    "str | Path | Task | datasets.Dataset | datasets.DatasetDict | datasets.IterableDataset | "
    "datasets.IterableDatasetDict"
)
SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}


def load_task(
    source: Source,
    *,
    columns: Mapping[str, str] | None = None,
    kind: Kind | None = None,
    metric: str | None = None,
    seed: int = 0,
    limit: int | None = None,
    template: str | None = None,
    verbalizer: Mapping[str, str] | None = None,
    unseen: Literal["refuse", "drop"] = "refuse",
    max_rows: int | None = None,
) -> Task:
    """Load a task.

    `source` is an embedded name (a folder of that name is `./NAME`), `hf:OWNER/NAME[:CONFIG][@REVISION]`, a folder of
    train, dev and test files, one file, an object of `datasets` (a Dataset, a DatasetDict, or a stream of either), or a
    Task, which only has `metric`, `template` and `verbalizer` replaced. Of a stream, `hf:` among them, `max_rows` of
    each split are read, the first ones: one that is in an order has to be shuffled before.

    A file is cut 80/10/10 by `seed`, stratified by label, after rows that repeat an input are left out; a folder's own
    splits are kept as they are, and a dev or test split it lacks is cut from train in that way. What was left out, cut,
    repaired or found to overlap is said in `Task.source`. `columns` maps canonical fields to columns; `limit` is the
    most rows of a split; `unseen="drop"` leaves out dev and test rows whose label train lacks.

    Raises TaskError for a source, rows, columns or labels that do not make a task, UnknownName for a kind or metric.
    """
    if max_rows is not None and (max_rows < 1 or not (is_dataset(source) or str(source).startswith("hf:"))):
        raise TaskError(
            f"max_rows={max_rows}: expected 1 or more, of a data set of the hub or an object of `datasets`; for other "
            f"tasks there is limit="
        )
    if isinstance(source, Task) or (isinstance(source, str) and source in embedded_tasks()):
        made = source if isinstance(source, Task) else build(str(source))
        if columns or (kind and kind != made.kind):
            raise TaskError(f"task {made.name!r} has its fields and kind ({made.kind}); leave columns and kind out")
    else:
        made = _assembled(source, columns, kind, seed, drop=unseen == "drop", max_rows=max_rows)
    check_words(made.kind, made.labels, template, verbalizer)
    made = dataclasses.replace(
        made,
        metric=made.metric if metric is None else check_metric(metric, made.kind, made.labels),
        template=made.template if template is None else template,
        verbalizer=made.verbalizer if verbalizer is None else verbalizer,
    )
    return made.limited(limit, limit, limit)


def task(source: Source, **options: Any) -> Task:
    """Load a task with columns as keywords: `task("reviews.csv", text="review", label="stars")`.

    Options of `load_task` keep their meaning; every other keyword is a canonical field and the column that holds it.
    """
    known = {"columns", "kind", "metric", "seed", "limit", "template", "verbalizer", "unseen", "max_rows"}
    named = {field: column for field, column in options.items() if field not in known}
    rest = {name: value for name, value in options.items() if name in known}
    return load_task(source, **{**rest, "columns": {**(rest.get("columns") or {}), **named}})


def _assembled(
    source: Source, columns: Mapping[str, str] | None, kind: Kind | None, seed: int, drop: bool, max_rows: int | None
) -> Task:
    name, origin, tables = _tables(source, max_rows)
    found, mapping = resolve(tables["train"], columns, kind)
    placed = {split: canonical(table, found, _same_columns(table, found, mapping)) for split, table in tables.items()}
    notes = [] if max_rows is None else [f"the first {max_rows} rows of each split"]
    if found == "token_classification" and any(is_bio(row["tags"]) for rows in placed.values() for _, row in rows):
        fixed = {split: repaired(rows) for split, rows in placed.items()}
        placed = {split: rows for split, (rows, _) in fixed.items()}
        notes += _note(sum(count for _, count in fixed.values()), "with tags that were not strict BIO repaired")
    check_sizes(origin, placed)
    if found in CHECKS:
        CHECKS[found](origin, placed["train"])
    if found == "chat":
        for rows in placed.values():
            check_answered(origin, rows)
    if "weight" in mapping and not any(row["weight"] for _, row in placed["train"]):
        raise TaskError(f"{origin}: every weight is 0 (column {mapping['weight']!r}); expected some above 0")
    placed, cut_notes = _whole(origin, found, placed, seed)
    notes += cut_notes
    check_sizes(origin, placed)
    if found in LABELLED and found != "token_classification":
        if drop:
            placed, left_out = known_only(placed)
            notes += _note(left_out, "of dev and test with a label that train lacks left out")
            check_sizes(origin, placed)
        check_seen(placed)
    labels = sorted({label for rows in placed.values() for _, row in rows for label in _labels_of(found, row)})
    return Task(
        name=name,
        kind=found,
        metric=default_metric(found, labels),
        train=[row for _, row in placed["train"]],
        dev=[row for _, row in placed["dev"]],
        test=[row for _, row in placed["test"]],
        labels=tuple(labels),
        source="; ".join([origin, *notes]),
    )


def _tables(source: Source, max_rows: int | None) -> tuple[str, str, dict[str, Table]]:
    """Return a name, where it came from, and the tables of the splits that are there, train among them."""
    if is_dataset(source):
        name, tables = read_dataset(source, max_rows)
        return name, f"{type(source).__name__} of datasets", tables
    text = str(source)
    if text.startswith("hf:"):
        name = text.removeprefix("hf:")
        return name.split("@")[0].rsplit("/", 1)[-1].replace(":", "_"), text, read_hub(name, max_rows)
    try:
        path = Path(text).expanduser()
        if path.is_dir():
            return path.resolve().name, text, _folder(path)
        if path.is_file():
            return formats.stem(path), text, {"train": formats.read_table(path)}
        message = _absent(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: ~NAME of no user
        raise TaskError(f"{text[:200]!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    raise TaskError(message)


def _folder(path: Path) -> dict[str, Table]:
    readable = sorted(file for file in path.iterdir() if formats.suffix(file) in formats.READERS and file.is_file())
    files: dict[str, Path] = {}
    for split, names in SPLIT_NAMES.items():
        fitting = [file for file in readable if formats.stem(file) in names]
        if len(fitting) > 1:
            raise TaskError(f"{path}: {fitting[0].name} and {fitting[1].name} are both {split}; keep one of them")
        if fitting:
            files[split] = fitting[0]
    if not files and (images := image_folder(path, SPLIT_NAMES)):
        return images
    if "train" not in files:
        there = ", ".join(file.name for file in readable[:8]) or "no file of rows"
        raise TaskError(f"{path}: no train.jsonl (or .json, .csv, .tsv, .parquet, each .gz); got {there}")
    return {split: formats.read_table(file) for split, file in files.items()}


def _absent(path: Path) -> str:
    """Say that nothing is at `path`, with the nearest names beside it and among the embedded tasks."""
    folder = path.parent
    beside = [str(folder / file.name) for file in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(str(path), [*beside, *embedded_tasks()], n=4, cutoff=0.6)
    if not close:
        # A folder or format got wrong: the same stem elsewhere in the folder is near enough.
        close = [name for name in beside if formats.stem(Path(name)) == formats.stem(path)][:4]
    missing = "" if folder.is_dir() else f" (there is no folder {folder})"
    near = f"nearest: {', '.join(close)}" if close else "embedded tasks start with stdlib_ and proc_"
    return f"no task {str(path)!r}: no file or folder of that name{missing}, nor an embedded task; {near}"


def _same_columns(table: Table, kind: Kind, mapping: Mapping[str, str]) -> dict[str, str]:
    """Return `mapping` for another split's table, whose optional columns may be absent; it has to have the others."""
    for field, column in mapping.items():
        if column not in table.columns and field in FIELDS[kind]:
            proposed = propose(table, kind, {f: c for f, c in mapping.items() if c in table.columns})
            fix = f"; as {as_option(proposed)} would read it" if proposed else ""
            raise TaskError(
                f"{table.name} has columns {', '.join(table.columns)}; expected column {column!r}, as train has{fix}"
            )
    return {field: column for field, column in mapping.items() if column in table.columns}


def _whole(
    origin: str, kind: Kind, placed: dict[str, list[Placed]], seed: int
) -> tuple[dict[str, list[Placed]], list[str]]:
    """Cut the splits that are absent from train; return all three, and what to say about it."""
    absent = tuple(split for split in ("dev", "test") if split not in placed)
    notes: list[str] = []
    if absent:
        rows, repeats = distinct(kind, placed["train"])
        placed = {**placed, **cut(origin, kind, rows, absent, seed)}
        parts = "train, dev and test 80/10/10" if len(absent) == 2 else f"{absent[0]} from train, a tenth of it,"
        notes += [f"cut into {parts} by seed {seed}" if len(absent) == 2 else f"{parts} cut by seed {seed}"]
        notes += _note(repeats, "that repeat an earlier row's input left out")
    known = {input_key(kind, row) for _, row in placed["train"]}
    for split in ("dev", "test"):
        shared = sum(input_key(kind, row) in known for _, row in placed[split])
        notes += _note(shared, f"of {split} with an input of train")
    return placed, notes


def _note(count: int, what: str) -> list[str]:
    return [f"{count} {'row' if count == 1 else 'rows'} {what}"] if count else []


def _labels_of(kind: Kind, row: Mapping[str, Any]) -> list[str]:
    if kind not in LABELLED:
        return []
    return row.get("tags") or row.get("labels") or ([row["label"]] if "label" in row else [])
