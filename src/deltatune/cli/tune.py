"""`deltatune tune`: find the delta to take for a task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from deltatune.cli.options import (
    AsJson,
    BackboneName,
    ClassWeightsText,
    Columns,
    Limit,
    MaxRows,
    Track,
    class_weights_of,
    columns_of,
    task_names,
)
from deltatune.cli.output import say
from deltatune.cli.training import command_of, finished, settings_from, watched

EXAMPLE = "deltatune tune reviews.csv --columns text=review,label=stars --budget 10m --out best/"


def tune(
    context: typer.Context,
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK",
            show_default=False,
            autocompletion=task_names,
            help="A file (csv, tsv, jsonl, json, parquet), a folder of splits, hf:NAME, or an embedded task.",
        ),
    ],
    columns: Columns = None,
    budget: Annotated[
        str, typer.Option("--budget", metavar="BUDGET", help="10m, 600s, or 2000steps (then the same each time).")
    ] = "10m",
    max_params: Annotated[
        int | None, typer.Option("--max-params", metavar="N", min=1, help="Leave out deltas with more parameters.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Where to save; left out: nothing is saved.")
    ] = None,
    backbone: BackboneName = "minilm",
    seeds: Annotated[
        int, typer.Option("--seeds", metavar="N", min=1, help="Seeds of the last two and the baseline, at most.")
    ] = 3,
    seed: Annotated[int, typer.Option("--seed", metavar="SEED", min=0, help="The first seed.")] = 0,
    limit: Limit = None,
    max_rows: MaxRows = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Rows in a step.")] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", help="Longest input in tokens.")] = None,
    class_weights: ClassWeightsText = None,
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"] | None, typer.Option("--precision", help="Of the backbone.")
    ] = None,
    track: Track = None,
    as_json: AsJson = False,
) -> None:
    """Find the delta to take: candidates train side by side, the best on dev go on, test is looked at once.

    The chosen delta lands in OUT with a report. A search that was stopped goes on when the same command is given again.
    """
    from deltatune.data.load import load_task
    from deltatune.studies.verbs import check_out
    from deltatune.studies.verbs import tune as find
    from deltatune.training.budget import Budget

    settings = settings_from(
        batch=batch, max_length=max_length, precision=precision, class_weights=class_weights_of(class_weights)
    )
    Budget.parse(budget)
    if out is not None:
        check_out(out)
    loaded = load_task(task, columns=columns_of(columns), limit=limit, max_rows=max_rows)
    with watched(command_of(context), out) as (listener, announce):
        runs = find(
            backbone, loaded, budget=budget, max_params=max_params, seeds=seeds, seed=seed, out=out, listener=listener,
            announce=announce, track=track, command=command_of(context), **settings.record(),
        )  # fmt: skip
    say(runs.json(), as_json, *finished(runs))
