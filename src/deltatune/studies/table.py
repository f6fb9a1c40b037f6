"""A result as a table for the console."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deltatune.studies.comparison import (
    baseline_scores,
    diverged,
    gain,
    measured,
    ordered,
    seeds_phrase,
    shown_split,
)
from deltatune.studies.formatting import UNKNOWN, count, duration, scale_of, size
from deltatune.studies.schema import HEAD_ONLY, SummaryRow, check_result

if TYPE_CHECKING:
    from rich.table import Table


def summary_table(result: Mapping[str, Any]) -> Table:
    """Return a row per delta: parameters, mean ± interval on dev and test, gain over head-only, seconds, bytes.

    The chosen is marked and first, the baselines are last; the caption says what the intervals are and what diverged.
    Raises UserError when `result` does not fit the schema.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    result = check_result(result)
    scale, split = scale_of(result), shown_split(result)
    broken = diverged(result)
    notes = [seeds_phrase(result)]
    if broken:
        notes.append("Diverged: " + ", ".join(f"{run['delta']} (seed {run['seed']})" for run in broken) + ".")
    # Text, not str: brackets in a delta or a task are not markup.
    table = Table(
        title=Text(f"{result['task']['name']} on {result['backbone']['name']}: {scale.label}"),
        caption=Text(" ".join(notes)),
        caption_justify="left",
        # Without lines the name of a delta has room in 80 columns.
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("delta", overflow="fold", min_width=15)
    for heading in ("trained", "dev", "test", f"{split} over\n{HEAD_ONLY}", "time", "size"):
        table.add_column(heading, justify="right", no_wrap=True)

    def score(row: SummaryRow, on_test: bool) -> str:
        interval = measured(row, "test" if on_test else "dev")
        return scale.interval(interval["mean"], interval["low"], interval["high"]) if interval else UNKNOWN

    rows = ordered(result)
    for place, row in enumerate(rows):
        chosen = row["delta"] == result["chosen"]
        more = gain(result, row["delta"], split=split) if row["delta"] != HEAD_ONLY else None
        table.add_row(
            Text(f"{'▸ ' if chosen else '  '}{row['delta']}"),
            count(row["trainable"]),
            score(row, on_test=False),
            score(row, on_test=True),
            scale.difference(more.mean if more else None),
            duration(row["seconds"]),
            size(row["bytes"]),
            style="bold" if chosen else "dim" if row["baseline"] else None,
            end_section=place + 1 < len(rows) and rows[place + 1]["baseline"] and not row["baseline"],
        )
    dev, test = dict(baseline_scores(result, "dev")), dict(baseline_scores(result, "test"))
    for baseline in result["baselines"]:
        name = baseline["name"]
        table.add_row(
            Text(f"  {name}"), "0", scale.score(dev.get(name)), scale.score(test.get(name)), UNKNOWN, UNKNOWN, UNKNOWN,
            style="dim",
        )  # fmt: skip
    return table
