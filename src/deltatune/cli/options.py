"""Options that several verbs share, and how their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from deltatune.errors import UserError


def backbone_names() -> list[str]:
    """Names of the embedded backbones, for completion."""
    from deltatune.backbone.embedded import EMBEDDED

    return list(EMBEDDED)


def task_names(incomplete: str) -> list[str]:
    """Names of the embedded tasks, for completion."""
    from deltatune.data.embedded import embedded_tasks

    return [name for name in embedded_tasks() if name.startswith(incomplete)]


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout and nothing else there.")]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", show_default=False, help="A saved delta.")]
BackboneName = Annotated[
    str,
    typer.Option(
        "--backbone", metavar="NAME", autocompletion=backbone_names, help="minilm, smollm2, a folder, or a hub id."
    ),
]
OtherBackbone = Annotated[
    str | None,
    typer.Option(
        "--backbone",
        metavar="NAME",
        autocompletion=backbone_names,
        help="The backbone to load instead of the one that the delta names.",
    ),
]
TaskName = Annotated[
    str,
    typer.Option(
        "--task",
        metavar="TASK",
        autocompletion=task_names,
        show_default=False,
        help="A file (csv, tsv, jsonl, json, parquet), a folder of splits, hf:NAME, or an embedded task.",
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        "--columns", metavar="FIELD=COLUMN,...", help="Which column holds which field: text=review,label=stars."
    ),
]
Split = Annotated[str, typer.Option("--split", metavar="SPLIT", help="train, dev or test.")]
Metric = Annotated[
    str | None, typer.Option("--metric", metavar="NAME", help="The metric; left out: the one the delta was fitted for.")
]
Limit = Annotated[int | None, typer.Option("--limit", metavar="ROWS", min=3, help="At most so many rows of a split.")]
MaxRows = Annotated[
    int | None,
    typer.Option("--max-rows", metavar="ROWS", min=9, help="Stream hf:NAME, and read so many rows of a split."),
]


ClassWeightsText = Annotated[
    str | None,
    typer.Option(
        "--class-weights",
        metavar="balanced | LABEL=WEIGHT,...",
        help="What labels weigh in the loss; rows weigh by a column: --columns weight=COLUMN.",
    ),
]


def class_weights_of(text: str | None) -> str | dict[str, float] | None:
    """Read `balanced` or `spam=5,ham=1`. UserError for a part that is no label with a number."""
    if text is None or "=" not in text:
        return text
    found: dict[str, float] = {}
    for part in text.split(","):
        label, sign, weight = part.rpartition("=")
        try:
            found[label.strip()] = float(weight)
        except ValueError:
            sign = ""
        if not sign:
            raise UserError(f"--class-weights {text!r}: got {part!r}, expected LABEL=WEIGHT,... such as spam=5,ham=1")
    return found


Track = Annotated[
    Literal["tensorboard", "mlflow", "wandb"] | None,
    typer.Option("--track", help="Log every training as a run of its own there."),
]


def columns_of(text: str | None) -> dict[str, str]:
    """Read `text=review,label=stars`. UserError for a part without a field or a column."""
    found: dict[str, str] = {}
    for part in filter(None, (text or "").split(",")):
        field, sign, column = (piece.strip() for piece in part.partition("="))
        if not (field and sign and column):
            raise UserError(
                f"--columns {text!r}: got {part!r}, expected FIELD=COLUMN,... such as text=review,label=stars"
            )
        if field in found:
            raise UserError(f"--columns {text!r} names the field {field!r} twice; expected one column for each field")
        found[field] = column
    return found
