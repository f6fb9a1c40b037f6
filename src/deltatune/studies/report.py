"""The report: one HTML file that needs nothing else, the decision first."""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltatune.errors import OutputError
from deltatune.studies import comparison, failures, figures, formatting
from deltatune.studies.comparison import Split, measured
from deltatune.studies.formatting import Scale, cut, plural
from deltatune.studies.norms import NormGrid, norm_grids
from deltatune.studies.schema import HEAD_ONLY, Candidate, Example, Result, check_result

MOST_PANELS = 12
OPEN_PANELS = 6
MOST_ROWS = 100
OPEN_ROWS = 8
MOST_CHARACTERS = 1500


def write_report(result: Mapping[str, Any], path: Path) -> Path:
    """Write the report of a result to `path`, whole or not at all, and return it.

    A report that is there is replaced. Raises UserError when `result` does not fit the schema, OutputError when the
    file cannot be written.
    """
    path = Path(path)
    page = render(result)
    if path.is_dir():
        raise OutputError(f"cannot write the report: {path} is a folder; give a file, such as {path / 'report.html'}")
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".part", delete=False) as file:
            temporary = Path(file.name)
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        # A temporary file is private; a report is read like any other file.
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise OutputError(f"cannot write the report {path}: {error.strerror or error}") from None
    return path


def render(result: Mapping[str, Any]) -> str:
    """Return the report as HTML. Raises UserError when `result` does not fit the schema."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("deltatune.studies"),
        # Texts, labels and names come from users' files: all of it is escaped.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    assert environment.loader
    script = environment.loader.get_source(environment, "report.js")[0]
    page = _Page(check_result(result))
    return environment.get_template("report.html.j2").render(
        page=page,
        result=page.result,
        scale=page.scale,
        script=Markup(script),
        # Only this script may run, so a text that slipped through could still do nothing.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **{
            name: _unbroken(getattr(formatting, name))
            for name in ("count", "size", "duration", "share", "plural", "times", "magnitude")
        },
        UNKNOWN=formatting.UNKNOWN,
        measured=measured,
        HEAD_ONLY=HEAD_ONLY,
    )


def _unbroken(write: Callable[..., str]) -> Callable[..., str]:
    """Return `write` with spaces that no line ends at: a number stays with its unit."""
    return lambda *values: write(*values).replace(" ", "\N{NO-BREAK SPACE}")


@dataclass(frozen=True)
class Tile:
    """One figure of the decision: what it is, the figure, what stands behind it."""

    name: str
    value: str
    note: str


class _Page:
    """What the template asks for, computed once from a checked result."""

    def __init__(self, result: Result) -> None:
        self.result = result
        self.scale: Scale = formatting.scale_of(result)
        self.split: Split = comparison.shown_split(result)
        self.rows = comparison.ordered(result)
        self.leader = comparison.leader(result)
        self.diverged = comparison.diverged(result)
        two = failures.first_two(result)
        self.first = two[0] if two else ""
        self.second = two[1] if len(two) > 1 else None
        self.kind = result["task"]["kind"]
        self.near, self.right = failures.tolerance(result), failures.judge(result)
        self.has_confusion = self.kind in failures.CONFUSED
        self.baselines = {
            baseline["name"]: {
                split: dict(comparison.baseline_scores(result, split)).get(baseline["name"])
                for split in ("dev", "test")
            }
            for baseline in result["baselines"]
        }

    # decision

    def tiles(self) -> list[Tile]:
        row, result, scale = self.leader, self.result, self.scale
        if row is None:
            return []
        split: Split = "test" if measured(row, "test") else "dev"
        interval = measured(row, split)
        assert interval
        more = comparison.gain(result, row["delta"], split=self.split)
        seeds = plural(row["seeds"], "seed")
        if more is None or row["delta"] == HEAD_ONLY:
            gained = Tile(f"over {HEAD_ONLY}", formatting.UNKNOWN, f"{HEAD_ONLY} was not trained beside it")
        elif more.low is None:
            gained = Tile(f"over {HEAD_ONLY}", scale.difference(more.mean), f"{scale.unit}, {self.split}, no interval")
        else:
            ends = f"{scale.difference(more.low)} to {scale.difference(more.high)}"
            gained = Tile(f"over {HEAD_ONLY}", scale.difference(more.mean), f"{scale.unit}, {self.split}; 95 %: {ends}")
        looked = "looked at once" if split == "test" else "test was not opened"
        whole = result["backbone"]["parameters"]
        share = f"{formatting.share(row['trainable'], whole)} of {formatting.count(whole)}"
        return [
            Tile(f"{split} {scale.label}", scale.interval(**interval), f"{seeds}, {looked}"),
            gained,
            Tile("trained parameters", formatting.count(row["trainable"]), share),
            Tile("one training", formatting.duration(row["seconds"]), plural(result["threads"], "thread")),
            Tile("saved", formatting.size(row["bytes"]), "beside the backbone"),
        ]

    # score against parameters

    def scatter(self, narrow: bool) -> Any:
        return figures.score_against_parameters(self.result, self.first, self.second, narrow)

    def others(self) -> list[str]:
        """Deltas that are neither the first two nor baselines."""
        return [
            row["delta"] for row in self.rows if not row["baseline"] and row["delta"] not in (self.first, self.second)
        ]

    def unseen(self) -> list[str]:
        """Deltas that the drawing cannot show: no score."""
        return [row["delta"] for row in self.rows if not measured(row, self.split)]

    def seeds_phrase(self) -> str:
        return comparison.seeds_phrase(self.result)

    def gain(self, delta: str) -> str:
        more = comparison.gain(self.result, delta, split=self.split) if delta != HEAD_ONLY else None
        return self.scale.difference(more.mean if more else None)

    def dev(self, delta: str) -> str:
        return next(self.scale.interval(**row["dev"]) for row in self.rows if row["delta"] == delta)

    def points(self, difference: float | None) -> str:
        return Scale("", percent=True).difference(difference)

    # curves

    def curves(self) -> dict[str, Any]:
        return figures.learning_curves(
            self.result, [row["delta"] for row in self.rows][:MOST_PANELS], self.first, self.second
        )

    def without_curve(self) -> list[str]:
        return [
            row["delta"]
            for row in self.rows
            if not any(run.get("curve") for run in comparison.runs_of(self.result, row["delta"]))
        ]

    # cost

    def full_copy(self) -> int:
        """Bytes of a whole copy of the backbone in its own number type."""
        return self.result["backbone"]["parameters"] * (2 if "16" in self.result["backbone"]["dtype"] else 4)

    def candidates(self) -> list[Candidate]:
        worst = float("inf")
        sign = -1 if self.scale.descending else 1
        states = ("chosen", "finished", "stopped", "failed")
        return sorted(
            self.result.get("candidates") or [],
            key=lambda one: (
                states.index(one["state"]),
                -one["rung"],
                worst if one["dev"] is None else sign * one["dev"],
            ),
        )

    def settings(self, varied: bool) -> list[str]:
        """Names of the settings that differ between candidates, or of those that do not."""
        every = [one["settings"] for one in self.result.get("candidates") or []]
        names = dict.fromkeys(name for settings in every for name in settings)
        return [name for name in names if varied == (len({repr(settings.get(name)) for settings in every}) > 1)]

    # failures

    def predicted(self) -> int:
        return len(failures.predicted_by(self.result, self.first))

    def confusion(self) -> failures.Confusion | None:
        return failures.confusion(self.result, self.first)

    def errors(self) -> list[Example]:
        return failures.errors(self.result, self.first)

    def has_confidence(self, rows: Sequence[Example]) -> bool:
        return any(self.first in row.get("confidence", {}) for row in rows)

    def disagreement(self) -> failures.Disagreement | None:
        return failures.disagreement(self.result, self.first, self.second) if self.second else None

    def lead(self, differ: failures.Disagreement) -> str:
        """Say how many more or fewer rows the first has right than the second."""
        rows = differ.only_first - differ.only_second
        if rows == 0:
            return "as many rows as"
        return f"{abs(rows)} {'more' if rows > 0 else 'fewer'} row{'s' if abs(rows) > 1 else ''} than"

    def words(self, example: Example, deltas: Sequence[str]) -> list[failures.Word] | None:
        return failures.words(example, deltas) if self.kind == "token_classification" else None

    def text(self, text: str) -> str:
        return cut(text, MOST_CHARACTERS)

    def several_wrong(self, word: failures.Word) -> list[tuple[str, str]]:
        """Return the tags of a word with the class of the delta that gave each."""
        return list(zip(word.predicted, ("first", "second"), strict=False))

    open_rows, most_rows, open_panels = OPEN_ROWS, MOST_ROWS, OPEN_PANELS

    # norms

    def norms(self) -> dict[str, list[NormGrid]]:
        """Norms per site of each delta that has them, the first delta first; means over its seeds."""
        found = {}
        for row in self.rows:
            runs = [run["norms"] for run in comparison.runs_of(self.result, row["delta"]) if run.get("norms")]
            grids = norm_grids(runs)
            if grids:
                found[row["delta"]] = grids
        return found
