"""`deltatune compare`: two saved deltas on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltatune.cli.options import AsJson, Columns, Limit, Metric, OtherBackbone, Split, TaskName, columns_of
from deltatune.cli.output import say, table
from deltatune.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from deltatune.backbone.load import Backbone
    from deltatune.cli.saved import Ready
    from deltatune.data.task import Task

EXAMPLE = "deltatune compare runs/lora runs/adapter --task reviews.csv --columns text=review,label=stars"
SHOWN = 5  # rows on which the two disagree
LONGEST = 100  # characters of an input in the table


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", show_default=False, help="A saved delta.")],
    second: Annotated[Path, typer.Argument(metavar="B", show_default=False, help="Another one.")],
    task: TaskName,
    split: Split = "test",
    columns: Columns = None,
    metric: Metric = None,
    limit: Limit = None,
    backbone: OtherBackbone = None,
    as_json: AsJson = False,
) -> None:
    """Compare two saved deltas on the same rows: scores, the interval of their difference, where they disagree."""
    from deltatune.cli.saved import ready, task_for
    from deltatune.cli.scoring import split_of

    part = split_of(split)
    known: dict[str, Backbone] = {}
    a, b = ready(first, backbone, known), ready(second, backbone, known)
    if metric is None and a.task["metric"] != b.task["metric"]:
        raise UserError(
            f"{first} was fitted for {a.task['metric']}, {second} for {b.task['metric']}; say which with --metric"
        )
    loaded = task_for(a, task, columns_of(columns), metric, limit)
    task_for(b, task, columns_of(columns), metric, limit)
    result = compared(a, b, str(first), str(second), loaded, part)
    say(result, as_json, *_shown(result))


def compared(a: Ready, b: Ready, first: str, second: str, task: Task, split: str) -> dict[str, Any]:
    """Return what `--json` prints of two deltas on a split of a task."""
    from deltatune.cli.scoring import mcnemar, said
    from deltatune.data.answers import hit, inputs_written, within, written
    from deltatune.data.metrics import references
    from deltatune.data.scores import difference_interval, resamples, score_interval
    from deltatune.training.evaluate import task_rows

    rows = task_rows(task, split)
    gold = references(task.kind, rows)
    ours, theirs = a.predict(rows).values, b.predict(rows).values
    apart = difference_interval(task.metric, ours, theirs, gold, task.labels)
    near = within(task.kind, gold)
    least = 1.0 if near is None else -near
    cells = [
        (hit(task.kind, p, g) >= least, hit(task.kind, q, g) >= least)
        for p, q, g in zip(ours, theirs, gold, strict=True)
    ]
    asked = [" · ".join(inputs_written(task.kind, row)) for row in rows]
    answers = [[written(task.kind, one[i], row) for one in (gold, ours, theirs)] for i, row in enumerate(rows)]
    differ = [i for i, (_, first_says, second_says) in enumerate(answers) if first_says != second_says]
    differ.sort(key=lambda i: (cells[i][0] == cells[i][1], i))  # first those that one of them has right
    told = apart.low is not None and apart.high is not None and not apart.low <= 0 <= apart.high
    better = ("a" if apart.mean > 0 else "b") if told else None
    return {
        "task": task.name,
        "split": split,
        "rows": len(rows),
        "metric": task.metric,
        "a": {"delta": first, "score": said(score_interval(task.metric, ours, gold, task.labels))},
        "b": {"delta": second, "score": said(score_interval(task.metric, theirs, gold, task.labels))},
        "difference": said(apart),
        "resamples": resamples(task.metric),
        "disagreement": {
            "both_right": cells.count((True, True)),
            "only_a_right": cells.count((True, False)),
            "only_b_right": cells.count((False, True)),
            "both_wrong": cells.count((False, False)),
            "different_answers": len(differ),
            "right": _right(task.kind, near),
            "p": mcnemar(cells.count((True, False)), cells.count((False, True))),
        },
        "better": better,
        "sentence": _sentence(better, first, second, len(rows), split),
        "examples": [
            {"row": i + 1, "input": asked[i], **dict(zip(("gold", "a", "b"), answers[i], strict=True))}
            for i in differ[:SHOWN]
        ],
    }  # fmt: skip


def _sentence(better: str | None, first: str, second: str, rows: int, split: str) -> str:
    if better is None:
        return f"{first} and {second} cannot be told apart on these {rows:,} {split} rows."
    winner, loser = (first, second) if better == "a" else (second, first)
    return f"{winner} is better than {loser} on these {rows:,} {split} rows."


def _right(kind: str, near: float | None) -> str | None:
    """Say what counts as right on a row; None where nothing does: how likely an answer is, is neither."""
    if kind == "chat":
        return None
    return "" if near is None else f" (within half a standard deviation, {near:.3g})"


def _shown(result: dict[str, Any]) -> Sequence[RenderableType]:
    from deltatune.cli.scoring import shown
    from deltatune.studies.formatting import cut

    metric, counts = result["metric"], result["disagreement"]
    scores = table("", metric, right=(metric,), title=f"{result['task']}, {result['split']}: {result['rows']:,} rows")
    scores.add_row(f"A  {result['a']['delta']}", shown(result["a"]["score"]))
    scores.add_row(f"B  {result['b']['delta']}", shown(result["b"]["score"]))
    scores.add_row("A − B", shown(result["difference"]))
    lines: list[RenderableType] = [
        result["sentence"],
        scores,
        f"In brackets: 95 % paired bootstrap over rows, {result['resamples']:,} resamples.",
    ]
    if counts["right"] is not None:
        lines[-1] = (
            f"{lines[-1]} Right on a row{counts['right']}: both {counts['both_right']:,}, only A "
            f"{counts['only_a_right']:,}, only B {counts['only_b_right']:,}, neither {counts['both_wrong']:,} (exact "
            f"McNemar test: p = {counts['p']:.2g})."
        )
    if not result["examples"]:
        return [*lines, "They give the same answer on every row."]
    title = f"{len(result['examples'])} of {counts['different_answers']:,} rows with different answers"
    rows = table("row", "gold", "A", "B", "input", right=("row",), title=title)
    for one in result["examples"]:
        rows.add_row(str(one["row"]), one["gold"], one["a"], one["b"], cut(one["input"], LONGEST))
    return [*lines, rows]
