"""`deltatune predict`: use a saved delta."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltatune.cli.options import AsJson, Columns, Folder, OtherBackbone, columns_of
from deltatune.cli.output import note, plain, say, table
from deltatune.errors import OutputError

if TYPE_CHECKING:
    from rich.table import Table

    from deltatune.cli.saved import Ready

EXAMPLE = (
    'deltatune predict best/ "Arrived broken."\ndeltatune predict best/ new.csv --columns text=review --out answers.csv'
)
FORMATS = (".csv", ".jsonl")
NAMED = {
    "generation": "prediction", "chat": "prediction", "extractive_span": "answer", "embedding": "embedding",
    "preference": "margin",
}  # fmt: skip
UNSURE = ("prediction", "value", "embedding")
LONGEST = 100  # characters of an input in the table


def predict(
    folder: Folder,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT... | FILE",
            show_default=False,
            help="Texts (two for each pair; a text and its choices; a context and its question), images, or a file.",
        ),
    ],
    columns: Columns = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write a .csv or .jsonl with the predictions beside the rows."),
    ] = None,
    backbone: OtherBackbone = None,
    as_json: AsJson = False,
) -> None:
    """Predict with a saved delta: label and confidence for each text, tags for its words, a choice, or an answer."""
    from deltatune.cli.inputs import inputs_of
    from deltatune.cli.saved import ready
    from deltatune.data.task import FIELDS

    if out is not None:
        _check_out(out)
    one = ready(folder, backbone)
    given = inputs_of(inputs, one.task["kind"], columns_of(columns))
    made = one.predict(given.rows)
    kind = one.task["kind"]
    answer = NAMED.get(kind, FIELDS[kind][-1])
    # Written text and numbers come without a probability.
    sure = [None if answer in UNSURE else value for value in made.confidence]
    predictions = [
        {**row, answer: value, "confidence": certain}
        for row, value, certain in zip(given.rows, made.values, sure, strict=True)
    ]
    if out is not None:
        rows = [
            {**(cells or row), f"predicted_{answer}" if answer in cells else answer: value, "confidence": certain}
            for cells, row, value, certain in zip(given.cells, given.rows, made.values, sure, strict=True)
        ]
        _write(out, rows)
        note(f"{len(rows)} predictions in {out}")
    said = {
        "delta": str(folder),
        "backbone": one.delta.backbone_name,
        "task": one.task["name"],
        "predictions": predictions,
    }
    if as_json or out is None:
        say(said, as_json, _table(one, predictions, answer))


def _table(one: Ready, predictions: Sequence[dict[str, Any]], answer: str) -> Table:
    from deltatune.data.answers import inputs_written, written
    from deltatune.studies.formatting import cut

    kind = one.task["kind"]
    made = table(answer, "confidence", "input", right=("confidence",))
    for row in predictions:
        text, value = cut(" · ".join(inputs_written(kind, row)), LONGEST), written(kind, row[answer], row)
        made.add_row(value, "–" if row["confidence"] is None else f"{row['confidence']:.3f}", text)
    return made


def _check_out(out: Path) -> None:
    if out.suffix not in FORMATS:
        raise OutputError(f"--out {out}: got format {out.suffix!r}, expected {' or '.join(FORMATS)}")
    if out.exists():
        raise OutputError(f"--out {out} exists already; choose another name or remove it")


def _write(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as csv or jsonl, whole or not at all."""
    from deltatune.training.checkpoint import whole_file

    if out.suffix == ".jsonl":
        text = "".join(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows)
    else:
        stream = io.StringIO()
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(stream, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {n: json.dumps(v, ensure_ascii=False) if isinstance(v, list) else v for n, v in row.items()}
            )
        text = stream.getvalue()
    with whole_file(out) as work:
        work.write_text(text, encoding="utf-8", newline="")
