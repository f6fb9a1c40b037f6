"""`deltatune fit`: train the product of deltas, tasks and seeds."""

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

EXAMPLE = """\
deltatune fit --task reviews.csv --columns text=review,label=stars --delta lora --out runs/lora
deltatune fit --task A.csv B.csv --delta lora "adapter | bitfit" --seeds 5 --out runs/all"""


def fit(
    context: typer.Context,
    task: Annotated[
        list[str],
        typer.Option(
            "--task",
            metavar="TASK...",
            show_default=False,
            autocompletion=task_names,
            help="Files (csv, tsv, jsonl, json, parquet), folders of splits, hf:NAME, or embedded tasks.",
        ),
    ],
    delta: Annotated[
        list[str],
        typer.Option(
            "--delta",
            metavar="DELTA...",
            show_default=False,
            help='Such as lora or "adapter(m=16) | bitfit"; the folder of a saved delta: goes on from there.',
        ),
    ],
    backbone: BackboneName = "minilm",
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", min=1, help="Train from so many seeds: 0, 1, ...")] = 1,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Where to save; left out: nothing is saved.")
    ] = None,
    columns: Columns = None,
    limit: Limit = None,
    max_rows: MaxRows = None,
    lr: Annotated[
        float | None, typer.Option("--lr", help="Learning rate; left out: each method's measured default.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimiser steps, instead of epochs.")] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="Passes over the training rows.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Rows in a step.")] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", help="Longest input in tokens.")] = None,
    patience: Annotated[
        int | None, typer.Option("--patience", help="Stop after so many evaluations without a better dev score.")
    ] = None,
    class_weights: ClassWeightsText = None,
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"] | None, typer.Option("--precision", help="Of the backbone.")
    ] = None,
    track: Track = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Estimate memory and time, and train nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train every delta on every task from every seed, all in one pass over one backbone.

    One run lands in OUT, several in OUT/TASK/DELTA/SEED with OUT/runs.json. A run that was stopped goes on when the
    same command is given again.
    """
    from deltatune.backbone.load import load
    from deltatune.data.load import load_task
    from deltatune.studies.trackers import tracking
    from deltatune.studies.verbs import check_out, plans_of, run_plans

    settings = settings_from(
        lr=lr, steps=steps, epochs=epochs, batch=batch, max_length=max_length, patience=patience, precision=precision,
        class_weights=class_weights_of(class_weights),
    )  # fmt: skip
    if out is not None and not dry_run:
        check_out(out)
    tasks = [load_task(one, columns=columns_of(columns), limit=limit, max_rows=max_rows) for one in task]
    plans = [plan for one in tasks for text in delta for plan in plans_of(text, one, range(seeds), settings)]
    with watched(command_of(context), out) as (shown, announce), tracking(track, shown) as listener:
        runs = run_plans(
            load(backbone), plans, out=out, listener=listener, announce=announce, dry_run=dry_run,
            command=command_of(context),
        )  # fmt: skip
    if dry_run:
        guess = announce.heard
        say(
            {**runs.json(), "estimate": vars(guess) if guess else None}, as_json,
            f"{len(plans)} trainings; {guess}; nothing was trained",
        )  # fmt: skip
        return
    say(runs.json(), as_json, *finished(runs))
