"""What makes rows a task that can be learnt and scored."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Mapping

from deltatune.data.rows import Placed
from deltatune.data.split import LEAST
from deltatune.data.task import FIELDS, INPUTS, SPLITS, Kind, Row
from deltatune.errors import TaskError, nearest

MOST_FRACTIONS = 10
MANY = 20


def labels_of(row: Row) -> list[str]:
    """Return the label of a row, or its labels."""
    return row["labels"] if "labels" in row else [row["label"]]


def check_sizes(name: str, splits: Mapping[str, list[Placed]]) -> None:
    """Raise TaskError for a split of fewer than 3 rows."""
    for split in SPLITS:
        if split in splits and len(splits[split]) < LEAST:
            raise TaskError(f"{name}: {split} has {len(splits[split])} rows; expected {LEAST} or more")


def check_classes(name: str, placed: list[Placed]) -> None:
    """Raise TaskError for labels that are one class only, numbers to be estimated, or texts to be written."""
    labels = [row["label"] for _, row in placed]
    values = set(labels)
    if len(values) == 1:
        raise TaskError(f"{name}: every label is {labels[0]!r}; expected two classes or more")
    numeric = all(_is_number(value) for value in values)
    if numeric and len(values) > len(labels) / 2:
        raise TaskError(
            f"{name}: the labels look like a regression: {len(values)} different numbers in {len(labels)} rows "
            f"({_some(values)}); expected classes: group the numbers, estimate them (--columns value=COLUMN), or name "
            f"another label column"
        )
    fractions = {value for value in values if numeric and not float(value).is_integer()}
    if len(fractions) > MOST_FRACTIONS:
        raise TaskError(
            f"{name}: the labels look like a regression: {len(fractions)} different fractions ({_some(fractions)}); "
            f"expected classes: round or group the numbers, estimate them (--columns value=COLUMN), or name "
            f"another label column"
        )
    if len(values) > len(labels) / 2 and len(labels) >= MANY:
        raise TaskError(
            f"{name}: {len(values)} different labels in {len(labels)} rows ({_some(values)}) are not classes; "
            f"name another label column, or have texts written: --columns source=...,target=..."
        )


def check_values(name: str, placed: list[Placed]) -> None:
    """Raise TaskError for numbers that are all the same."""
    values = {row["value"] for _, row in placed}
    if len(values) == 1:
        raise TaskError(f"{name}: every value is {values.pop():g}; expected two different numbers or more")


def check_label_sets(name: str, placed: list[Placed]) -> None:
    """Raise TaskError for sets of labels of which there is one only."""
    labels = {label for _, row in placed for label in row["labels"]}
    if len(labels) < 2:
        had = f"only {labels.pop()!r}" if labels else "none"
        raise TaskError(f"{name}: expected two different labels or more over all rows, got {had}; name another column")


def check_answered(name: str, placed: list[Placed]) -> None:
    """Raise TaskError for a conversation that does not end with an answer; says which row."""
    for where, row in placed:
        role = row["messages"][-1]["role"]
        if role != "assistant":
            raise TaskError(
                f"{where}: the last message is of the role {role!r}; expected the assistant's, which is what is learnt"
            )


CHECKS: Mapping[Kind, Callable[[str, list[Placed]], None]] = {
    "classification": check_classes,
    "pair_classification": check_classes,
    "image_classification": check_classes,
    "multi_label": check_label_sets,
    "regression": check_values,
    "pair_regression": check_values,
}
"""What the training rows of a kind have to be."""


def known_only(splits: Mapping[str, list[Placed]]) -> tuple[dict[str, list[Placed]], int]:
    """Return the splits without the rows whose label train lacks, and how many those were."""
    known = {label for _, row in splits["train"] for label in labels_of(row)}
    kept = {split: [one for one in rows if known.issuperset(labels_of(one[1]))] for split, rows in splits.items()}
    return kept, sum(len(splits[split]) - len(kept[split]) for split in splits)


def check_seen(splits: Mapping[str, list[Placed]]) -> None:
    """Raise TaskError for labels in dev or test that train lacks; says which, and in which row."""
    known = {label for _, row in splits["train"] for label in labels_of(row)}
    rows = [one for split in ("dev", "test") for one in splits[split] if not known.issuperset(labels_of(one[1]))]
    if rows:
        where, row = rows[0]
        more = f" and {len(rows) - 1} more rows" if len(rows) > 1 else ""
        label = next(label for label in labels_of(row) if label not in known)
        raise TaskError(
            f"{where}{more}: label {label!r} is not in train{nearest(label, known)}; correct it, give "
            f"train examples of it, or leave such rows out with unseen='drop'"
        )


def check_words(
    kind: Kind, labels: tuple[str, ...], template: str | None, verbalizer: Mapping[str, str] | None
) -> None:
    """Raise TaskError for a template without an input field, or a verbalizer that is not one wording a label."""
    if kind == "image_classification" and (template is not None or verbalizer is not None):
        raise TaskError("a template and a verbalizer word texts for a language model; a task of images takes neither")
    if template is not None:
        try:
            used = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
        except ValueError as error:
            raise TaskError(f"template {template!r}: {error}; write a brace that is meant as one twice") from error
        for field in sorted(used - {*INPUTS[kind]}):
            where = "the answer, not an input" if field in FIELDS[kind] else "no input"
            raise TaskError(f"template {template!r}: {{{field}}} is {where}{nearest(field, INPUTS[kind])}")
        if not used:
            raise TaskError(f"template {template!r} has no input; expected {{{INPUTS[kind][0]}}} in it")
    if verbalizer is not None:
        for label in verbalizer:
            if label not in labels:
                raise TaskError(f"verbalizer names {label!r}, which is no label{nearest(label, labels)}")
        for label in labels:
            if not verbalizer.get(label, "").strip():
                raise TaskError(f"verbalizer has no words for label {label!r}; expected words for each label")
        word, times = Counter(text.strip() for text in verbalizer.values()).most_common(1)[0]
        if times > 1:
            raise TaskError(f"verbalizer has {word!r} for {times} labels, which could not be told apart")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.strip().lower() not in ("nan", "inf", "-inf", "infinity")


def _some(values: set[str]) -> str:
    return ", ".join(sorted(values)[:4]) + (", ..." if len(values) > 4 else "")
