"""`deltatune eval`: score a saved delta on a task."""

from __future__ import annotations

from deltatune.cli.options import AsJson, Columns, Folder, Limit, Metric, OtherBackbone, Split, TaskName, columns_of
from deltatune.cli.output import say, table

EXAMPLE = "deltatune eval best/ --task reviews.csv --columns text=review,label=stars"


def evaluate(
    folder: Folder,
    task: TaskName,
    split: Split = "test",
    columns: Columns = None,
    metric: Metric = None,
    limit: Limit = None,
    backbone: OtherBackbone = None,
    as_json: AsJson = False,
) -> None:
    """Score a saved delta on a split of a task, with a bootstrap interval over examples, beside the majority class."""
    from deltatune.cli.saved import ready, task_for
    from deltatune.cli.scoring import said, shown, split_of
    from deltatune.data.answers import written
    from deltatune.data.metrics import constant, majority, references, score
    from deltatune.data.scores import resamples, score_interval
    from deltatune.training.evaluate import task_rows

    part = split_of(split)
    one = ready(folder, backbone)
    loaded = task_for(one, task, columns_of(columns), metric, limit)
    rows = task_rows(loaded, part)
    gold = references(loaded.kind, rows)
    made = score_interval(loaded.metric, one.predict(rows).values, gold, loaded.labels)
    guess = majority(loaded)
    baseline = score(loaded.metric, constant(guess, loaded, rows), gold, loaded.labels)
    result = {
        "delta": str(folder),
        "backbone": one.delta.backbone_name,
        "task": loaded.name,
        "split": part,
        "rows": len(rows),
        "metric": loaded.metric,
        "score": said(made),
        "majority": baseline,
        "resamples": resamples(loaded.metric),
    }
    answer = table("on", loaded.metric, right=(loaded.metric,), title=f"{loaded.name}, {part}: {len(rows):,} rows")
    answer.add_row(str(folder), shown(said(made)))
    answer.add_row(
        f"always {repr(guess) if isinstance(guess, str) else written(loaded.kind, guess)}", f"{baseline:.3f}"
    )
    say(
        result,
        as_json,
        answer,
        f"In brackets: 95 % bootstrap interval over examples, {resamples(loaded.metric):,} resamples.",
    )
