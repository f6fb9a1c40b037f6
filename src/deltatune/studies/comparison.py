"""What a result says when its rows are set beside each other: order, the split to show, gain, divergence."""

from __future__ import annotations

from typing import Literal

from deltatune.data import intervals
from deltatune.studies.formatting import Scale, scale_of
from deltatune.studies.schema import HEAD_ONLY, Interval, Result, Run, SummaryRow

Split = Literal["dev", "test"]


def shown_split(result: Result) -> Split:
    """Return `test` when it was opened for every row of the summary, `dev` otherwise."""
    rows = result["summary"]
    return "test" if rows and all(measured(row, "test") for row in rows) else "dev"


def measured(row: SummaryRow, split: Split) -> Interval | None:
    """Return the interval of `row` on a split, None where there is no score."""
    interval = row["dev"] if split == "dev" else row.get("test")
    return interval if interval and interval["mean"] is not None else None


def ordered(result: Result) -> list[SummaryRow]:
    """Return the summary: the chosen first, then the others from best to worst on dev, then the baselines."""
    scale = scale_of(result)

    def place(row: SummaryRow) -> tuple[bool, bool, float]:
        mean = row["dev"]["mean"]
        worst = float("inf") if mean is None else mean * (-1 if scale.descending else 1)
        return row["baseline"], row["delta"] != result["chosen"], worst

    return sorted(result["summary"], key=place)


def leader(result: Result) -> SummaryRow | None:
    """Return the chosen row, or the best on dev when nothing was chosen, or None when nothing has a score."""
    rows = [row for row in ordered(result) if measured(row, "dev")]
    return rows[0] if rows else None


def runs_of(result: Result, delta: str) -> list[Run]:
    """Return the runs of one delta, by seed."""
    return sorted((run for run in result["runs"] if run["delta"] == delta), key=lambda run: run["seed"])


def diverged(result: Result) -> list[Run]:
    """Return the runs that ended in NaN."""
    return [run for run in result["runs"] if run["state"] == "nan"]


def gain(result: Result, delta: str, over: str = HEAD_ONLY, split: Split = "dev") -> intervals.Interval | None:
    """Return how much better `delta` is than `over` on a split, in the metric's direction.

    Paired by seed where both have runs of the same seeds; otherwise a difference of means without an interval; None
    where one of them was not measured.
    """
    ours, theirs = _by_seed(result, delta, split), _by_seed(result, over, split)
    sign = 1 if scale_of(result).descending else -1
    seeds = sorted(ours.keys() & theirs.keys())
    if seeds:
        return intervals.paired_interval([sign * ours[seed] for seed in seeds], [sign * theirs[seed] for seed in seeds])
    means = [measured(row, split) for name in (delta, over) for row in result["summary"] if row["delta"] == name]
    if len(means) != 2 or means[0] is None or means[1] is None:
        return None
    return intervals.Interval(sign * ((means[0]["mean"] or 0.0) - (means[1]["mean"] or 0.0)), None, None)


def baseline_scores(result: Result, split: Split) -> list[tuple[str, float]]:
    """Return the baselines that need no training, with their score on a split."""
    metric = result["task"]["metric"]
    scores = []
    for baseline in result["baselines"]:
        metrics = baseline["metrics"]["dev"] if split == "dev" else baseline["metrics"].get("test") or {}
        value = metrics.get(metric)
        if value is not None:
            scores.append((baseline["name"], value))
    return scores


def seeds_phrase(result: Result) -> str:
    """Return what the intervals of this result are, in a sentence."""
    most = max((row["seeds"] for row in result["summary"]), default=0)
    if most <= 1:
        return "One seed: there is no interval over seeds. Run with --seeds 5 for one."
    return f"Means over {most} seeds; bars and ± are 95 % intervals (Student t over seeds)."


def scale_and_split(result: Result) -> tuple[Scale, Split]:
    """Return how scores are shown and on which split everything can be compared."""
    return scale_of(result), shown_split(result)


def _by_seed(result: Result, delta: str, split: Split) -> dict[int, float]:
    metric = result["task"]["metric"]
    scores = {}
    for run in runs_of(result, delta):
        metrics = run["metrics"]["dev"] if split == "dev" else run["metrics"].get("test") or {}
        value = metrics.get(metric)
        if value is not None and run["state"] != "nan":
            scores[run["seed"]] = value
    return scores
