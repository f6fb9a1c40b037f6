"""The drawings of the report: score against parameters, learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from deltatune.studies.comparison import Split, baseline_scores, measured, ordered, runs_of, shown_split
from deltatune.studies.formatting import Scale, count, cut, scale_of
from deltatune.studies.labels import place_labels
from deltatune.studies.schema import Result, Run, SummaryRow
from deltatune.studies.svg import FIRST, GROUND, INK, MUTED, SECOND, canvas, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LABELS = 9
MOST_POINTS = 80
BESIDE = 10  # pixels from the dev score to the test score of the same delta


def score_against_parameters(result: Result, first: str, second: str | None, narrow: bool) -> Markup | None:
    """Draw each delta's score over its number of trained parameters, with intervals and baselines.

    Returns None when no row has both a score and parameters. `narrow` is the drawing for a phone.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    scale, split = scale_of(result), shown_split(result)
    rows = [row for row in ordered(result) if row["trainable"] > 0 and measured(row, split)]
    if not rows:
        return None
    with canvas(*((344, 380) if narrow else (840, 430))) as figure:
        axes = figure.add_axes((0.14, 0.135, 0.85, 0.835) if narrow else (0.067, 0.12, 0.93, 0.86))
        axes.set_xscale("log")
        _limits(axes, result, rows, scale)
        tips: dict[str, str] = {}
        shown: list[Split] = ["dev", "test"] if split == "dev" else ["test"]
        for place, row in enumerate(reversed(rows)):
            tips[f"row{place}"] = _point(axes, row, scale, split, first, second, f"row{place}")
            if split == "dev" and measured(row, "test"):
                tips[f"test{place}"] = _point(axes, row, scale, "test", first, second, f"test{place}")
        sizes = [row["trainable"] for row in rows]
        # Less than a decade and a half may hold a single power of ten, or none.
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(sizes) < 30 * min(sizes) else (1,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(round(value))))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("trained parameters", labelpad=5)
        axes.set_ylabel(f"{split} {scale.label}", labelpad=6)
        texts = _baselines(axes, result, scale)
        place_labels(
            axes,
            [
                (
                    cut(row["delta"], 22 if narrow else 34),
                    row["trainable"],
                    _span(row, split, scale),
                    _colour(row, first, second),
                )
                for row in _worth_a_label(rows, first, second)
            ],
            [
                (row["trainable"], *_span(row, one, scale), BESIDE if one != split else 0)
                for row in rows
                for one in shown
                if measured(row, one)
            ],
            texts,
        )
        label = f"{split} {scale.name} against trained parameters: " + "; ".join(tips.values())
        return to_svg(figure, f"scatter-{'narrow' if narrow else 'wide'}", label, tips)


def learning_curves(result: Result, deltas: Sequence[str], first: str, second: str | None) -> dict[str, Markup]:
    """Draw one small panel a delta: its dev score and its training loss over the steps, the others behind in grey.

    All panels have the same axes. Deltas without a curve are left out.
    """
    scale = scale_of(result)
    curves = {delta: [run for run in runs_of(result, delta) if run.get("curve")] for delta in deltas}
    curves = {delta: runs for delta, runs in curves.items() if runs}
    points = [point for runs in curves.values() for run in runs for point in run["curve"]]
    scores = [point["dev"] for point in points if point["dev"] is not None]
    starts = [run["curve"][0]["loss"] or 0.0 for runs in curves.values() for run in runs]
    # A run on its way to NaN would flatten all the others.
    losses = [min(point["loss"], 2 * max(starts)) for point in points if point["loss"] is not None]
    drawn = {}
    for place, (delta, runs) in enumerate(curves.items()):
        with canvas(266, 236) as figure:
            above = figure.add_axes((0.155, 0.50, 0.825, 0.47))
            below = figure.add_axes((0.155, 0.125, 0.825, 0.30), sharex=above)
            for other, behind in curves.items():
                if other != delta:
                    _curve(above, below, behind[:1], MUTED, scale, behind=True)
            colour = FIRST if delta == first else SECOND if delta == second else INK
            _curve(above, below, runs, colour, scale)
            above.tick_params(labelbottom=False)
            for axes, name in ((above, f"dev {scale.label}"), (below, "loss")):
                axes.locator_params(axis="y", nbins=4)
                axes.text(0.99, 0.04 if axes is above else 0.94, name, transform=axes.transAxes, color=MUTED,
                          ha="right", va="bottom" if axes is above else "top", fontsize=10.5)  # fmt: skip
            below.locator_params(axis="x", nbins=5, integer=True)
            above.set_ylim(*_frame([score * scale.factor for score in scores]))
            below.set_ylim(*_frame([0.0, *losses]))
            figure.text(0.98, 0.005, "step", color=MUTED, ha="right", va="bottom", fontsize=10.5)
            drawn[delta] = to_svg(
                figure, f"curve{place}", f"Learning curves of {delta}: {_curve_in_words(runs, scale)}"
            )
    return drawn


def _colour(row: SummaryRow, first: str, second: str | None) -> str:
    return FIRST if row["delta"] == first else SECOND if row["delta"] == second else MUTED


def _span(row: SummaryRow, split: Split, scale: Scale) -> tuple[float, float, float]:
    """Return mean, low and high as drawn."""
    interval = measured(row, split) or row["dev"]
    mean = interval["mean"] or 0.0
    low, high = interval["low"], interval["high"]
    return tuple(scale.factor * (mean if end is None else end) for end in (mean, low, high))  # type: ignore[return-value]


def _point(axes: Axes, row: SummaryRow, scale: Scale, split: Split, first: str, second: str | None, gid: str) -> str:
    from matplotlib.transforms import ScaledTranslation

    mean, low, high = _span(row, split, scale)
    colour = _colour(row, first, second)
    test = gid.startswith("test")
    hollow = row["baseline"] or test
    marker = "D" if test else "s" if row["delta"] == second else "o"
    beside = axes.transData + ScaledTranslation(BESIDE / 72 if test else 0, 0, axes.figure.dpi_scale_trans)
    drawn = axes.errorbar(
        [row["trainable"]], [mean], yerr=[[mean - low], [high - mean]], fmt=marker, color=colour, capsize=3,
        markersize=9 if row["delta"] == first and not test else 7, markerfacecolor=GROUND if hollow else colour,
        elinewidth=1.4, transform=beside, zorder=4 if row["delta"] in (first, second) else 3,
    )  # fmt: skip
    drawn.lines[0].set_gid(gid)
    interval = measured(row, split) or row["dev"]
    score = scale.interval(interval["mean"], interval["low"], interval["high"])
    return f"{row['delta']}: {split} {score}, {count(row['trainable'])} parameters"


def _limits(axes: Axes, result: Result, rows: Sequence[SummaryRow], scale: Scale) -> None:
    """Frame the points and their intervals; a baseline far below would flatten them and is written at the edge."""
    splits: list[Split] = ["dev", "test"] if shown_split(result) == "dev" else ["test"]
    ends = [end for row in rows for split in splits if measured(row, split) for end in _span(row, split, scale)]
    low, high = min(ends), max(ends)
    pad = max(0.08 * (high - low), 0.02 * abs(high), 1e-3)
    low, high = low - pad, high + pad
    if scale.percent and min(ends) >= 0:
        low, high = max(low, 0.0), min(high, 101.0)
    axes.set_ylim(low, high)
    sizes = [row["trainable"] for row in rows]
    axes.set_xlim(min(sizes) / 2.5, max(sizes) * 2.5)


def _baselines(axes: Axes, result: Result, scale: Scale) -> list[Any]:
    """Draw a line for each baseline without parameters, or say that it lies outside."""
    low, high = axes.get_ylim()
    texts: list[Any] = []
    outside = []
    for name, value in baseline_scores(result, shown_split(result)):
        drawn = value * scale.factor
        if low <= drawn <= high:
            axes.axhline(drawn, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            texts.append(axes.annotate(f"{name} {scale.score(value)}", (1, drawn), (-2, 3), ("axes fraction", "data"),
                                       "offset points", color=MUTED, ha="right", va="bottom"))  # fmt: skip
        else:
            outside.append(f"{name} {scale.score(value)} ({'below' if drawn < low else 'above'} this frame)")
    if outside:
        texts.append(axes.text(0.99, 0.02, ", ".join(outside), transform=axes.transAxes, color=MUTED, ha="right"))
    return texts


def _worth_a_label(rows: Sequence[SummaryRow], first: str, second: str | None) -> list[SummaryRow]:
    """Return the rows to name: the first two, the baselines, then the best; the table names the rest."""
    rank = {first: 0, second: 1}
    return sorted(rows, key=lambda row: rank.get(row["delta"], 2 if row["baseline"] else 3))[:MOST_LABELS]


def _frame(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    pad = 0.05 * (high - low) or 0.5
    return low - pad * (low != 0), high + pad


def _curve(above: Axes, below: Axes, runs: Sequence[Run], colour: str, scale: Scale, behind: bool = False) -> None:
    for run in runs:
        curve = run.get("curve") or []
        scores = [(point["step"], point["dev"] * scale.factor) for point in curve if point["dev"] is not None]
        losses = [(point["step"], point["loss"]) for point in curve if point["loss"] is not None]
        layer, width, alpha = (2, 0.8, 0.4) if behind else (3, 1.4, 0.9)
        for axes, points in ((above, scores), (below, losses)):
            if points:
                points = points[:: -(-len(points) // MOST_POINTS)] + points[-1:]
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=width, zorder=layer, alpha=alpha)
                if run["state"] == "nan" and not behind:
                    axes.plot(*points[-1], marker="x", color=colour, markersize=8, markeredgewidth=2, zorder=layer)


def _curve_in_words(runs: Sequence[Run], scale: Scale) -> str:
    words = []
    for run in runs:
        curve = run.get("curve") or []
        scores = [point["dev"] for point in curve if point["dev"] is not None]
        end = f"dev {scale.name} {scale.score(scores[0])} to {scale.score(scores[-1])}" if scores else "no dev score"
        words.append(f"seed {run['seed']}: {end} in {curve[-1]['step'] if curve else 0} steps, {run['state']}")
    return "; ".join(words)
