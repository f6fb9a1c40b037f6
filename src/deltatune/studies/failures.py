"""Where a delta fails: confusion, errors from the surest to the least sure, rows on which two deltas disagree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from deltatune.data.answers import within
from deltatune.data.intervals import Interval, bootstrap_paired
from deltatune.data.spans import squad_match
from deltatune.data.task import LABELLED, NUMBERS
from deltatune.studies.comparison import leader, ordered
from deltatune.studies.schema import Example, Result

MOST_LABELS = 12
CONFUSED = tuple(kind for kind in LABELLED if kind != "multi_label")
"""Kinds with one label a row or a word, of which gold and predicted make a matrix."""


@dataclass(frozen=True)
class Confusion:
    """Counts of gold (rows) by predicted (columns) over `labels`; `hidden` labels are left out."""

    labels: list[str]
    counts: list[list[int]]
    hidden: int
    errors: int
    shown_errors: int
    worst: list[tuple[str, str, int]]


@dataclass(frozen=True)
class Word:
    """One word with the tag it should get and the tags that each delta gave it."""

    text: str
    gold: str
    predicted: tuple[str, ...]

    @property
    def right(self) -> bool:
        """Whether every delta gave the gold tag."""
        return all(tag == self.gold for tag in self.predicted)


@dataclass(frozen=True)
class Disagreement:
    """How two deltas differ over the same rows: counts, the difference of their scores, the rows from the worst."""

    both: int
    only_first: int
    only_second: int
    neither: int
    difference: Interval
    rows: list[Example]


def first_two(result: Result) -> list[str]:
    """Return the one or two deltas that the report is about: the chosen (or best), then the next with predictions.

    Without examples these are the first two of the summary; empty when nothing has a score.
    """
    best = leader(result)
    names = [row["delta"] for row in ordered(result)]
    predicted = {delta for example in result["examples"] for delta in example["predictions"]}
    rest = [name for name in (*names, *sorted(predicted)) if best is None or name != best["delta"]]
    second = [name for name in rest if not predicted or name in predicted]
    second = second or [row["delta"] for row in ordered(result)[1:] if not row["baseline"]]
    return ([best["delta"]] if best else []) + second[:1]


def predicted_by(result: Result, delta: str) -> list[Example]:
    """Return the examples for which `delta` has a prediction."""
    return [example for example in result["examples"] if delta in example["predictions"]]


def tolerance(result: Result) -> float | None:
    """Return up to which distance a number is right; None for other kinds."""
    kind = result["task"]["kind"]
    return within(kind, [float(e["gold"]) for e in result["examples"]] or [0.0]) if kind in NUMBERS else None


def judge(result: Result) -> Callable[[Example, str], bool]:
    """Return what says whether a delta's prediction on a row is right: label, all tags or the whole text, spaces apart.

    A span is right when SQuAD's script calls it the same, a number when it is no farther away than the tolerance.
    """
    near = tolerance(result)
    spans = result["task"]["kind"] == "extractive_span"

    def right(example: Example, delta: str) -> bool:
        predicted, gold = example["predictions"][delta], example["gold"]
        if near is not None:
            return _distance(example, delta) <= near
        return bool(squad_match(predicted, gold)) if spans else predicted.split() == gold.split()

    return right


def _distance(example: Example, delta: str) -> float:
    return abs(float(example["predictions"][delta]) - float(example["gold"]))


def errors(result: Result, delta: str) -> list[Example]:
    """Return the rows that `delta` gets wrong: those it was surest of, or numbers farthest off, first, then by row."""
    right = judge(result)
    wrong = [example for example in predicted_by(result, delta) if not right(example, delta)]
    if result["task"]["kind"] in NUMBERS:
        return sorted(wrong, key=lambda example: (-_distance(example, delta), example["row"]))
    return sorted(wrong, key=lambda example: (-example.get("confidence", {}).get(delta, 0.0), example["row"]))


def disagreement(result: Result, first: str, second: str) -> Disagreement | None:
    """Return where two deltas give different answers, None where no row has both."""
    rows = [example for example in predicted_by(result, first) if second in example["predictions"]]
    if not rows:
        return None
    right = judge(result)
    ours, theirs = ([right(row, delta) for row in rows] for delta in (first, second))
    cells = Counter(zip(ours, theirs, strict=True))
    differ = [row for row in rows if row["predictions"][first].split() != row["predictions"][second].split()]
    differ.sort(key=lambda row: (right(row, first), not right(row, second), row["row"]))
    return Disagreement(
        both=cells[True, True],
        only_first=cells[True, False],
        only_second=cells[False, True],
        neither=cells[False, False],
        difference=bootstrap_paired(ours, theirs),
        rows=differ,
    )


def confusion(result: Result, delta: str) -> Confusion | None:
    """Return gold against predicted label (or tag, per word), None without predictions or one label a row.

    With more than 12 labels only 12 that are most confused with each other are kept, in the order of the task.
    """
    if result["task"]["kind"] not in CONFUSED:
        return None
    cells: Counter[tuple[str, str]] = Counter()
    for example in predicted_by(result, delta):
        cells.update(_pairs(result, example, delta))
    if not cells:
        return None
    seen = dict.fromkeys([*result["task"]["labels"], *sorted({label for pair in cells for label in pair})])
    kept = set(seen) if len(seen) <= MOST_LABELS else _most_confused(list(seen), cells)
    labels = [label for label in seen if label in kept]
    wrong = sorted(((g, p, n) for (g, p), n in cells.items() if g != p), key=lambda cell: (-cell[2], cell))
    return Confusion(
        labels=labels,
        counts=[[cells[gold, predicted] for predicted in labels] for gold in labels],
        hidden=len(seen) - len(labels),
        errors=sum(n for _, _, n in wrong),
        shown_errors=sum(n for gold, predicted, n in wrong if gold in kept and predicted in kept),
        worst=wrong[:3],
    )


def words(example: Example, deltas: Sequence[str]) -> list[Word] | None:
    """Return the words of a token classification row with their tags, None when their numbers differ."""
    texts, gold = example["input"].split(), example["gold"].split()
    predicted = [example["predictions"][delta].split() for delta in deltas]
    if len({len(part) for part in (texts, gold, *predicted)}) != 1:
        return None
    return [Word(text, tag, tags) for text, tag, tags in zip(texts, gold, zip(*predicted, strict=True), strict=True)]


def _most_confused(labels: list[str], cells: Counter[tuple[str, str]]) -> set[str]:
    """Grow a set of labels by the pair or the label that brings the most errors into it."""
    confused: Counter[frozenset[str]] = Counter()
    for (gold, predicted), n in cells.items():
        if gold != predicted:
            confused[frozenset((gold, predicted))] += n
    kept: set[str] = set()
    while confused and len(kept) < MOST_LABELS:
        gains: Counter[frozenset[str]] = Counter()
        for pair, n in confused.items():
            gains[pair - kept] += n
        # Per label added, so that a pair does not win over two single labels.
        new = max(
            (one for one in gains if len(kept | one) <= MOST_LABELS),
            key=lambda one: gains[one] / len(one),
            default=None,
        )
        if new is None:
            break
        kept |= new
        confused = Counter({pair: n for pair, n in confused.items() if not pair <= kept})
    return kept | set([label for label in labels if label not in kept][: MOST_LABELS - len(kept)])


def _pairs(result: Result, example: Example, delta: str) -> Iterator[tuple[str, str]]:
    predicted = example["predictions"][delta]
    if result["task"]["kind"] == "token_classification":
        # A tag sequence of another length has no alignment; it counts as an error of the row, not of a tag.
        tags, found = example["gold"].split(), predicted.split()
        return zip(tags, found, strict=True) if len(tags) == len(found) else iter(())
    return iter([(example["gold"], predicted)])
