"""Numbers as a person reads them: one rule for the console table, the figures and the report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from deltatune.studies.schema import Result

LOWER_IS_BETTER = frozenset({"loss", "perplexity"})
UNKNOWN = "–"
MINUS = "−"


@dataclass(frozen=True)
class Scale:
    """How the scores of one metric are shown: fractions as percent, anything else as it is."""

    metric: str
    percent: bool

    @property
    def factor(self) -> float:
        """What a score is multiplied by to be drawn or printed."""
        return 100.0 if self.percent else 1.0

    @property
    def name(self) -> str:
        """The metric in words."""
        return self.metric.replace("_", " ")

    @property
    def label(self) -> str:
        """The metric with its unit, for an axis or a column."""
        return f"{self.name}, %" if self.percent else self.name

    @property
    def unit(self) -> str:
        """The unit of a difference of two scores."""
        return "points" if self.percent else self.name

    @property
    def descending(self) -> bool:
        """Whether the best score is the largest."""
        return self.metric not in LOWER_IS_BETTER

    def score(self, value: float | None) -> str:
        """Return a score: `93.1`."""
        return UNKNOWN if value is None else self._number(value * self.factor)

    def difference(self, value: float | None) -> str:
        """Return a difference with its sign: `+4.2`."""
        if value is None:
            return UNKNOWN
        text = self._number(value * self.factor)
        return text if text.startswith(MINUS) or not float(text) else f"+{text}"

    def interval(self, mean: float | None, low: float | None, high: float | None) -> str:
        """Return a score with half the width of its symmetric interval: `93.1 ± 0.6`."""
        if mean is None or low is None or high is None:
            return self.score(mean)
        return f"{self.score(mean)} ± {self._number((high - low) / 2 * self.factor)}"

    def _number(self, value: float) -> str:
        text = f"{value:.1f}" if self.percent or abs(value) >= 100 else f"{value:.3f}"
        return text.lstrip("-") if not float(text) else text.replace("-", MINUS)


def scale_of(result: Result) -> Scale:
    """Return the scale of the task's metric: percent if it is a fraction in everything that was measured."""
    metric = result["task"]["metric"]
    values = [value for value in _scores(result, metric) if value is not None]
    return Scale(metric, metric not in LOWER_IS_BETTER and all(-1 <= value <= 1 for value in values))


def _scores(result: Result, metric: str) -> Iterable[float | None]:
    for row in result["summary"]:
        yield row["dev"]["mean"]
    for measured in (*result["runs"], *result["baselines"]):
        yield measured["metrics"]["dev"].get(metric)
        yield (measured["metrics"].get("test") or {}).get(metric)


def count(number: int) -> str:
    """Return a count in three digits: `73.7 k`, `22.7 M`."""
    return _prefixed(number, ("", " k", " M", " G"))


def size(number: int) -> str:
    """Return a number of bytes: `295 kB`."""
    return _prefixed(number, (" B", " kB", " MB", " GB"))


def duration(seconds: float) -> str:
    """Return a duration: `0.4 s`, `41 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    minutes = round(whole / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"


def share(part: int, whole: int) -> str:
    """Return a share in percent with two digits that matter: `0.32 %`."""
    if whole <= 0:
        return UNKNOWN
    percent = 100 * part / whole
    return f"{percent:.0f} %" if percent >= 10 or not percent else f"{percent:.2g} %"


def plural(number: int, noun: str) -> str:
    """Return `1 row`, `1,234 rows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def magnitude(value: float | None) -> str:
    """Return a norm with about three digits: `0.57`, `12.3`, `0.0042`."""
    if value is None:
        return UNKNOWN
    if value == 0 or abs(value) >= 0.1:
        return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"
    return f"{value:.2g}"


def times(number: int) -> str:
    """Return `once`, `twice`, `3 times`."""
    return {1: "once", 2: "twice"}.get(number, f"{number:,} times")


def cut(text: str, most: int) -> str:
    """Return `text` without its end when it is longer than `most` characters."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _prefixed(number: float, units: tuple[str, ...]) -> str:
    for unit in units:
        # 999,600 is 1 M: three digits would round it to 1000 k.
        if abs(number) < 999.5 or unit == units[-1]:
            return f"{number:.3g}{unit}" if abs(number) < 999.5 else f"{number:.0f}{unit}"
        number /= 1000
    raise AssertionError("no unit")
