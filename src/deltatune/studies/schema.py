"""The result of `deltatune tune` and `deltatune fit` on one task, as plain JSON: what the report and the table read.

Scores are as the metric gives them (accuracy 0.93, not 93). `delta` is the same string everywhere: the expression
as it was asked for, which is the key of `summary`, `runs`, `candidates`, `examples` and `chosen`. A baseline that
is trained (head-only, full tuning) is a run and a summary row with `baseline: true`; one that is not (majority
class) stands in `baselines`. The test split is looked at once, for the chosen: elsewhere `test` is absent or null.
A score or loss that is not a number is null: JSON has no NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NotRequired

# pydantic cannot check typing.TypedDict before Python 3.12.
from typing_extensions import TypedDict

from deltatune.data.task import Kind
from deltatune.errors import UserError

SCHEMA = "deltatune.result/1"
HEAD_ONLY = "head-only"

Metrics = dict[str, float | None]


class Splits(TypedDict):
    """Metrics by split; `test` only where the test split was opened."""

    dev: Metrics
    test: NotRequired[Metrics | None]


class Rows(TypedDict):
    """Rows of each split."""

    train: int
    dev: int
    test: int


class TaskInfo(TypedDict):
    """The task; `metric` is the one that chooses, `labels` is empty for generation, `source` a file or a name."""

    name: str
    kind: Kind
    metric: str
    labels: list[str]
    rows: Rows
    source: str


class BackboneInfo(TypedDict):
    """The frozen network."""

    name: str
    parameters: int
    dtype: str
    fingerprint: str


class CurvePoint(TypedDict):
    """One logged step; `dev` where the dev split was evaluated."""

    step: int
    loss: float | None
    dev: float | None
    lr: float


class Run(TypedDict):
    """One training: one delta, one seed; `baseline` maps a baseline's name to its test score (dev if unopened)."""

    task: str
    delta: str
    seed: int
    settings: dict[str, object]
    trainable: int
    backbone: str
    metrics: Splits
    baseline: dict[str, float | None]
    seconds: float
    saved: str | None
    curve: list[CurvePoint]
    norms: dict[str, float | None]
    bytes: int
    state: Literal["done", "stopped", "nan"]


class Baseline(TypedDict):
    """A score that needs no training, such as always the most frequent label."""

    name: str
    metrics: Splits


class Interval(TypedDict):
    """A mean over the seeds that did not diverge, with its 95 % interval; no `low` and `high` for one seed."""

    mean: float | None
    low: float | None
    high: float | None


class SummaryRow(TypedDict):
    """One delta over its seeds; `seconds` is the mean of one training, `bytes` the size of the saved delta."""

    delta: str
    trainable: int
    seeds: int
    dev: Interval
    test: NotRequired[Interval | None]
    seconds: float
    bytes: int
    baseline: bool


class Candidate(TypedDict):
    """One candidate of `tune`; `rung` is the last rung of successive halving that it reached."""

    delta: str
    settings: dict[str, object]
    trainable: int
    rung: int
    steps: int
    dev: float | None
    state: Literal["chosen", "finished", "stopped", "failed"]


class Example(TypedDict):
    """One test row with what the chosen and the second delta made of it.

    `predictions` and `confidence` map a delta to its label and to that label's probability (token classification:
    tags separated by spaces, one per word of `input`; generation: the text).
    """

    row: int
    input: str
    gold: str
    predictions: dict[str, str]
    confidence: NotRequired[dict[str, float]]


class Result(TypedDict):
    """All of it; `command` made it and can be pasted into a shell, `created` is an ISO 8601 time."""

    schema: str
    sentence: str
    command: str
    created: str
    versions: dict[str, str]
    threads: int
    task: TaskInfo
    backbone: BackboneInfo
    runs: list[Run]
    baselines: list[Baseline]
    summary: list[SummaryRow]
    candidates: NotRequired[list[Candidate]]
    chosen: str | None
    examples: list[Example]


def check_result(result: Mapping[str, Any]) -> Result:
    """Return `result` checked against this schema, unknown keys dropped and NaN made null.

    Raises UserError with the first place that does not fit.
    """
    from pydantic import TypeAdapter, ValidationError

    found = result.get("schema") if isinstance(result, Mapping) else type(result).__name__
    if found != SCHEMA:
        raise UserError(f"not a result: got schema {found!r}, expected {SCHEMA!r}; make it again with this version")
    try:
        return TypeAdapter(Result).validate_python(_without_nan(dict(result)))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"not a result: at {place}: {first['msg']}; got {str(first['input'])[:60]!r}") from None


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value
