"""Which column holds which field, and what to propose where that cannot be told."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from deltatune.data.formats import Table
from deltatune.data.images import INLINE, SUFFIXES
from deltatune.data.task import FIELDS, NUMBERS, OPTIONAL, PAIRS, Kind
from deltatune.errors import TaskError, UnknownName, nearest

OTHER_NAMES = {"source": "table", "targets": "refs"}
"""What published data sets call a field; taken without being asked for."""

LIKELY: Mapping[str, str] = {
    "text": "text sentence review content body comment message tweet post utterance question description headline "
    "title document abstract query sms premise sentence1 text1 text_a",
    "text_b": "text_b sentence2 text2 hypothesis question2 answer passage response document aspect",
    "label": "label class category sentiment stars rating intent topic polarity emotion type gold y target score",
    "labels": "labels tags topics genres categories emotions",
    "value": "value score similarity rating stars y target",
    "choices": "choices options endings alternatives candidates",
    "context": "context passage paragraph article document",
    "question": "question query",
    "answers": "answers answer",
    "tokens": "tokens words",
    "tags": "tags ner_tags labels slots bio pos_tags ner",
    "source": "source input article document question prompt src instruction code",
    "image": "image img picture photo file filename path",
    "target": "target output summary answer response completion translation tgt headline reply",
    "anchor": "anchor query question sentence1 premise",
    "positive": "positive answer document passage sentence2 entailment",
    "prompt": "prompt question instruction input",
    "chosen": "chosen preferred better",
    "rejected": "rejected dispreferred worse",
    "messages": "messages conversation conversations dialogue chat",
}
PROPOSED: tuple[Kind, ...] = (
    "classification", "pair_classification", "token_classification", "generation", "image_classification"
)  # fmt: skip
LONGEST_LABEL = 5  # words in a cell on average, above which a column is no label
MOST_DISTINCT = 0.5  # share of distinct values, above which a column hardly is one
WORDY = 1.2  # words in a cell on average, above which a column is text and not a name or a number
MORE: tuple[tuple[Kind, Kind], ...] = (
    ("pair_classification", "classification"),
    ("pair_regression", "regression"),
    ("multiple_choice", "classification"),
)  # the first of each has a field more, which is there to be read
TOGETHER = (("premise", "hypothesis"), ("query", "passage"), ("query", "document"), ("question", "sentence"))


def resolve(table: Table, columns: Mapping[str, str] | None, kind: Kind | None) -> tuple[Kind, dict[str, str]]:
    """Return the kind of a table and the column of each of its fields.

    Raises UnknownName for a kind, and TaskError for columns that are not there or do not make a task; the message
    proposes the `--columns` to give.
    """
    if kind is not None and kind not in FIELDS:
        raise UnknownName("kind", kind, FIELDS)
    given = _given(table, columns or {})
    # A column called weight may be of anything, and is not taken without being asked for.
    fields = ({*FIELDS_ALL} & set(table.columns)) - {"weight"}
    mapping = {field: field for field in fields} | given
    for field, other in OTHER_NAMES.items():
        if field not in mapping and other in table.columns:
            mapping[field] = other
    fitting: list[Kind] = [k for k in get_args(Kind) if set(FIELDS[k]) <= mapping.keys() and (kind or k) == k]
    # Fields that were named say which kind is meant, whatever else stands in the file.
    fitting = [k for k in fitting if given.keys() <= _allowed(k)]
    for more, less in MORE:
        if more in fitting and less in fitting:
            fitting.remove(less)
    if len(fitting) > 1:
        raise TaskError(f"{table.name} fits {' and '.join(fitting)}; say which one with kind={fitting[0]!r}")
    if not fitting:
        raise TaskError(_mismatch(table, kind, given))
    return fitting[0], {field: column for field, column in mapping.items() if field in _allowed(fitting[0])}


def _allowed(kind: Kind) -> set[str]:
    return {*FIELDS[kind], *OPTIONAL[kind]}


def _given(table: Table, columns: Mapping[str, str]) -> dict[str, str]:
    for field, column in columns.items():
        if field not in FIELDS_ALL:
            raise TaskError(f"--columns {field}={column}: no field {field!r}{nearest(field, FIELDS_ALL)}")
        if column not in table.columns:
            raise TaskError(
                f"--columns {field}={column}: {table.name} has no column {column!r}{_nearest(column, table.columns)}"
            )
    return dict(columns)


def _nearest(column: str, columns: tuple[str, ...]) -> str:
    return nearest(column, columns) or f"; columns: {', '.join(columns[:12])}"


def _mismatch(table: Table, kind: Kind | None, given: Mapping[str, str]) -> str:
    expected = FIELDS[kind] if kind else FIELDS["classification"]
    also = "" if kind else " (or " + "; ".join(", ".join(FIELDS[k]) for k in list(FIELDS)[1:]) + ")"
    proposed = propose(table, kind, given)
    fix = f"; give {as_option(proposed)}" if proposed else "; name them with --columns FIELD=COLUMN,..."
    shown = ", ".join(table.columns[:20]) + (", ..." if len(table.columns) > 20 else "")
    return f"{table.name} has columns {shown}; expected {', '.join(expected)}{also}{fix}"


def as_option(columns: Mapping[str, str]) -> str:
    """Return the option to type, quoted for a shell where needed; in Python's form where a name has a comma."""
    if any("," in column for column in columns.values()):
        return f"columns={dict(columns)!r} in Python"
    return "--columns " + shlex.quote(",".join(f"{field}={column}" for field, column in columns.items()))


@dataclass(frozen=True)
class _Column:
    name: str
    words: float
    distinct: float
    listed: bool
    number: bool = False
    pictures: bool = False


def propose(table: Table, kind: Kind | None, given: Mapping[str, str]) -> dict[str, str]:
    """Return the columns to give, guessed by names and content; {} where there is no good guess."""
    measured = (_measure(name, table) for name in table.columns if name not in given.values())
    free = [column for column in measured if column is not None]
    # Numbers and sets of labels are proposed to those who ask for them: a column of stars is a label otherwise.
    asked: dict[str, tuple[Kind, ...]] = {
        "value": NUMBERS, "labels": ("multi_label",), "choices": ("multiple_choice",),
        "answers": ("extractive_span",), "context": ("extractive_span", "multiple_choice"), "messages": ("chat",),
        **dict.fromkeys(("anchor", "positive"), ("embedding",)),
        **dict.fromkeys(("prompt", "chosen", "rejected"), ("preference",)),
    }  # fmt: skip
    named: tuple[Kind, ...] = next((kinds for field, kinds in asked.items() if field in given), PROPOSED)
    kinds: tuple[Kind, ...] = (kind,) if kind else named
    good = [one for k in kinds if given.keys() <= _allowed(k) and (one := _guess(k, free, given))[1]]
    if not good:
        return {}
    best = max(good, key=lambda one: one[0])[1]
    return {field: column for field, column in best.items() if field != column}


def _measure(name: str, table: Table) -> _Column | None:
    cells = [row[name] for row in table.rows[:500] if row.get(name) not in (None, "", [])]
    if not cells:
        return None
    if isinstance(cells[0], list) or (isinstance(cells[0], str) and re.match(r"\[\s*[\"']", cells[0])):
        return _Column(name, 0.0, 1.0, True)
    texts = [str(cell) for cell in cells]
    numeric = all(re.fullmatch(r"\s*[-+]?\d*\.?\d+(e[-+]?\d+)?\s*", text.lower()) for text in texts)
    pictures = all(text.strip().lower().endswith(SUFFIXES) or text.startswith(INLINE) for text in texts)
    words = sum(len(text.split()) for text in texts) / len(texts)
    return _Column(name, words, len(set(texts)) / len(texts), False, numeric, pictures)


def _guess(kind: Kind, free: list[_Column], given: Mapping[str, str]) -> tuple[float, dict[str, str]]:
    """Return how good the best choice of columns for a kind is (0 to 2 for each field), and the choice."""
    taken, total = dict(given), 0.0
    if kind in PAIRS and not given.keys() & {"text", "text_b"}:
        pair = _pair([column.name for column in free if column.words > WORDY])
        if pair is None:
            return 0.0, {}
        taken |= {"text": pair[0], "text_b": pair[1]}
        total += 4.0
    # The label first: what has few distinct values is told apart more surely than what is a text.
    for field in sorted(FIELDS[kind], key=lambda name: name != "label"):
        if field in taken:
            continue
        left = [c for c in free if c.name not in taken.values()]
        scores = [(_likeness(field, c) + _content(field, c, free), c.name) for c in left]
        if kind == "token_classification":
            scores = [(score, name) for score, name in scores if score >= 1.5]
        fitting = [(score, name) for score, name in scores if score > 0.1]
        if not fitting:
            return 0.0, {}
        score, taken[field] = max(fitting, key=lambda one: one[0])
        total += score
    return total / len(FIELDS[kind]), {field: taken[field] for field in FIELDS[kind]}


def _likeness(field: str, column: _Column) -> float:
    name, likely = column.name.lower().strip(), LIKELY[field].split()
    if name in likely:
        return 1.0
    if set(re.split(r"[\W_]+", name)) & set(likely):
        return 0.8
    return 0.6 if difflib.get_close_matches(name, likely, n=1, cutoff=0.8) else 0.0


def _content(field: str, column: _Column, columns: list[_Column]) -> float:
    longest = max((other.words for other in columns), default=0.0)
    if field in ("tokens", "tags", "messages"):
        return 1.0 if column.listed else 0.0
    if field == "labels":
        return 1.0 if column.listed else 0.5 - column.distinct
    if field in ("choices", "answers"):
        return 1.0 if column.listed else 0.0
    if column.listed:
        return -2.0
    if field == "value":
        return 1.0 if column.number else -2.0
    if field == "image":
        return 1.0 if column.pictures else -2.0
    if field == "label":
        if column.words > LONGEST_LABEL:
            return -2.0
        # Many values tell against a label, but in a file of a few rows its name may outweigh that.
        return 1.0 - column.distinct if column.distinct <= MOST_DISTINCT else -0.5
    return column.words / longest if column.words > WORDY else -2.0


def _pair(names: list[str]) -> tuple[str, str] | None:
    """Return two columns whose names say that they belong together: sentence1 and sentence2, premise and hypothesis."""
    lower = {name.lower(): name for name in names}
    for first, second in TOGETHER:
        if first in lower and second in lower:
            return lower[first], lower[second]
    for low, name in lower.items():
        for end, other in (("1", "2"), ("_a", "_b"), ("a", "b")):
            if low.endswith(end) and (partner := low.removesuffix(end) + other) in lower:
                return name, lower[partner]
    return None


FIELDS_ALL = tuple(dict.fromkeys(field for by in (FIELDS, OPTIONAL) for fields in by.values() for field in fields))
