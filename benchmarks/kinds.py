"""Train a delta on real rows of each kind of task, beside what needs no delta, at three learning rates.

Run as: .venv/bin/python benchmarks/kinds.py [--data FOLDER] [--kinds span choice ...] [--delta lora]

A third of the delta's default rate, the default and three times it; beside them the best constant and the head alone, and
for pairs with a value the cosine of the frozen backbone's vectors. The rate is chosen on dev; test rows give the intervals.
Each training is a row that is kept, so a stopped run goes on. `--data` is a folder of the tasks that KINDS names, each a
folder of train, dev and test files: the STS benchmark, SNLI's entailed pairs with a contradiction as the negative, what is
said in War and Peace with what stands around it, XQuAD (English) with the answer's sentence for a context, CoNLL-2004's
sentences with the types of their entities, Social IQa's dev part cut anew, which order of adjectives is right (BIG-Bench); for
smollm2 Self-Instruct's user tasks as conversations, preferences for DPO, and sentences to negate.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import TASKS, Row, Rows, parser, publish, table
from torch import nn

from deltatune.backbone.load import Backbone, load
from deltatune.compose.expression import parse
from deltatune.data.intervals import Interval, bootstrap_interval
from deltatune.data.load import load_task
from deltatune.data.metrics import constant, majority, references, score
from deltatune.data.task import SPLITS, Kind, Task
from deltatune.heads.base import tokenise
from deltatune.heads.pooled import mean_of
from deltatune.training.fit import fit_plans
from deltatune.training.job import Plan
from deltatune.training.settings import Settings
from deltatune.training.states import states

NAME = "kinds"
FACTORS = {"a third": 1 / 3, "default": 1.0, "three times": 3.0}
FREE = ("constant", "cosine", "head")


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is trained for a kind: its data and their columns, how many rows of train, dev and test, how long, on what."""

    data: str
    kind: Kind
    limits: tuple[int, int, int]
    settings: Settings
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    backbone: str = "minilm"


KINDS = {
    "regression": Measured(
        "stsb_en", "pair_regression", (1000, 200, 1000), Settings(epochs=3, evaluations=3), {"value": "label"}
    ),
    "embedding": Measured("pairs_snli", "embedding", (300, 100, 386), Settings(epochs=2, evaluations=2)),
    "retrieval": Measured(
        "quote_literary_en", "embedding", (300, 100, 500), Settings(epochs=2, evaluations=2, max_length=64)
    ),
    "span": Measured("xquad_en", "extractive_span", (500, 100, 295), Settings(epochs=3, evaluations=2)),
    "multi_label": Measured("conll04_ner", "multi_label", (300, 100, 288), Settings(epochs=3, evaluations=2)),
    "choice": Measured("social_iqa_dev_resplit", "multiple_choice", (300, 100, 390), Settings(epochs=1, evaluations=2)),
    "order": Measured("bbh_hyperbaton", "multiple_choice", (150, 50, 50), Settings(epochs=12, evaluations=4)),
    "chat": Measured(
        "chat_self_instruct_user", "chat", (120, 30, 50), Settings(epochs=1, evaluations=1, max_length=192),
        backbone="smollm2",
    ),
    "preference": Measured(
        "pref_dpo_en", "preference", (60, 20, 59), Settings(epochs=1, evaluations=1, max_length=192), backbone="smollm2"
    ),
    "generation": Measured(
        "ii_negation", "generation", (200, 30, 60), Settings(epochs=1, evaluations=1, max_length=48), backbone="smollm2"
    ),
}  # fmt: skip


def task_of(measured: Measured, folder: Path) -> Task:
    """Load a kind's task: of a paragraph the sentence of the answer, of tags the types of the entities named."""
    if measured.data == "quote_literary_en":
        return said(folder / measured.data, measured).limited(*measured.limits)
    made = load_task(
        folder / measured.data,
        kind="token_classification" if measured.kind == "multi_label" else measured.kind,
        columns=measured.columns,
    )
    if measured.kind == "extractive_span":
        made = dataclasses.replace(made, **{split: [*map(sentence, getattr(made, split))] for split in SPLITS})
    if measured.kind == "multi_label":
        splits = {split: [*map(named, getattr(made, split))] for split in SPLITS}
        labels = tuple(sorted({label for row in splits["train"] for label in row["labels"]}))
        made = Task(measured.data, "multi_label", "macro_f1", **splits, labels=labels, source=made.source)
    return made.limited(*measured.limits)


def sentence(row: Row) -> Row:
    """Return a row with the sentence of its first answer for a context, and the answers that stand there."""
    answer = row["answers"][0]
    ends = [0, *(found.end() for found in re.finditer(r"[.!?]\s+", row["context"])), len(row["context"])]
    first = max(end for end in ends[:-1] if end <= answer["start"])
    last = min(end for end in ends if end >= answer["start"] + len(answer["text"]))
    inside = [one for one in row["answers"] if first <= one["start"] and one["start"] + len(one["text"]) <= last]
    return {
        **row,
        "context": row["context"][first:last],
        "answers": [{**one, "start": one["start"] - first} for one in inside],
    }


def said(folder: Path, measured: Measured) -> Task:
    """Return what is said, to be found by what stands before and behind it."""
    splits: dict[str, list[Row]] = {}
    for split in SPLITS:
        with gzip.open(folder / f"{split}.jsonl.gz", "rt", encoding="utf-8") as stream:
            rows = [json.loads(line) for line in stream]
        around = [(f"{row['context_left']} {row['context_right']}".strip(), row["quote"]) for row in rows]
        splits[split] = [{"anchor": anchor, "positive": quote} for anchor, quote in around if anchor]
    return Task(measured.data, "embedding", "mrr_at_10", splits["train"], splits["dev"], splits["test"])


def named(row: Row) -> Row:
    """Return a sentence with the types of its entities for a row of tags."""
    return {"text": " ".join(row["tokens"]), "labels": sorted({tag[2:] for tag in row["tags"] if tag != "O"})}


def cosines(task: Task, backbone: Backbone) -> list[float]:
    """Return the cosine of the two texts of each test row, by the frozen backbone's mean vectors."""
    texts = [text for row in task.test for text in (row["text"], row["text_b"])]
    vectors: dict[int, torch.Tensor] = {}
    for numbers, batch, hidden in states(tokenise(backbone, texts, limit=128), backbone):
        pooled = nn.functional.normalize(mean_of(hidden, batch.inputs["attention_mask"]), dim=1)
        vectors.update(zip(numbers, pooled, strict=True))
    return [float(vectors[2 * i] @ vectors[2 * i + 1]) for i in range(len(task.test))]


def measure(what: str, delta: str, task: Task, measured: Measured, backbone: Backbone) -> Row:
    """Return the predictions on test of one of the sides, and what its training was."""
    if what == "constant":
        return {"found": constant(majority(task), task, task.test)}
    if what == "cosine":
        return {"found": cosines(task, backbone)}
    spec = parse("head" if what == "head" else delta)
    settings = measured.settings
    if what in FACTORS:
        settings = dataclasses.replace(settings, lr=spec.lr * FACTORS[what])
    (trained,) = fit_plans(backbone, [Plan(spec, task, 0, settings, what)])
    assert trained.test is not None
    return {
        "found": trained.test.values, "lr": trained.plan.lr, "dev": trained.dev_score, "steps": trained.steps,
        "best_step": trained.best_step, "curve": [dataclasses.astuple(point) for point in trained.curve],
    }  # fmt: skip


def compared(task: Task, found: Sequence[Any], against: Sequence[Any]) -> tuple[Interval, Interval]:
    """Return the score of predictions on test, and what they gain over others, with bootstrap intervals over rows."""

    def of(side: int) -> Callable[[Sequence[Any]], float]:
        return lambda rows: score(task.metric, [row[side] for row in rows], [row[-1] for row in rows], task.labels)

    rows = list(zip(found, against, references(task.kind, task.test), strict=True))
    own, other = of(0), of(1)
    gain = bootstrap_interval(rows, lambda drawn: own(drawn) - other(drawn), resamples=500)
    return bootstrap_interval(rows, own, resamples=500), gain


def told(value: Interval) -> str:
    """Say an interval in points."""
    if value.low is None or value.high is None:
        return f"{100 * value.mean:.1f}"
    return f"{100 * value.mean:.1f} ({100 * value.low:.1f} to {100 * value.high:.1f})"


def main() -> None:
    """Measure what is lacking and tell all of it."""
    made = parser(__doc__)
    made.add_argument("--data", type=Path, default=TASKS, help="folder of the tasks")
    made.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    made.add_argument("--delta", default="lora")
    made.add_argument("--rates", nargs="*", default=list(FACTORS), choices=list(FACTORS), help="of the default rate")
    made.add_argument("--stored", action="store_true", help="measure nothing, tell what is stored")
    made.add_argument("--limits", nargs=3, type=int, help="most rows of train, dev and test")
    options = made.parse_args()
    rows = Rows(NAME, options)
    backbones = {name: load(name) for name in {KINDS[kind].backbone for kind in options.kinds}}
    lines: list[list[str]] = []
    result: dict[str, Any] = {}
    for name in options.kinds:
        if not (options.data / KINDS[name].data).is_dir():
            print(f"{name}: left out, since {options.data} has no folder {KINDS[name].data}; give --data")
            continue
        lines += of_kind(name, rows, backbones[KINDS[name].backbone], options, result)
    header = ["kind", "metric", "what", "rate", "dev", "test", "gain over the best that needs no delta"]
    if not lines:
        return
    title = f"### {options.delta} on each kind of task, at three rates"
    note = (
        "One seed, bootstrap over test rows. Bold: chosen on dev. A rate that is not there was not measured. Of chats, "
        "preferences and generation the head alone is smollm2 as it is."
    )
    publish(NAME, f"{title}\n\n{table(header, lines)}\n\n{note}", {"kinds": result}, options)


def of_kind(
    name: str, rows: Rows, backbone: Backbone, options: argparse.Namespace, result: dict[str, Any]
) -> list[list[str]]:
    """Measure what is lacking of a kind, add it to the result, and return its lines of the table."""
    measured = KINDS[name]
    task = task_of(measured, options.data).limited(*(options.limits or (None, None, None)))
    sides = [one for one in FREE if one != "cosine" or task.kind == "pair_regression"] + options.rates
    found: dict[str, Row] = {}
    for what in sides:
        key = {
            "kind": name, "what": what, "delta": options.delta, "task": task.fingerprint,
            "settings": measured.settings.record(),
        }  # fmt: skip
        if not rows.matching(**key) and options.stored:
            continue
        if not rows.matching(**key):
            rows.add({**key, **measure(what, options.delta, task, measured, backbone)})
            print(name, what, rows.rows[-1].get("curve"), flush=True)
        found[what] = rows.matching(**key)[-1]
    rates = [what for what in FACTORS if what in found]
    if not rates:
        return []
    gold = references(task.kind, task.test)
    tests = {what: score(task.metric, found[what]["found"], gold, task.labels) for what in found}
    rival = max((what for what in found if what not in FACTORS), key=lambda what: tests[what])
    chosen = max(rates, key=lambda what: found[what]["dev"])
    lines = []
    result[name] = {"task": measured.data, "metric": task.metric, "rival": rival, "chosen": chosen, "sides": {}}
    for what in found:
        own, gain = compared(task, found[what]["found"], found[rival]["found"])
        dev = found[what].get("dev")
        result[name]["sides"][what] = {"dev": dev, "test": own._asdict(), "gain": gain._asdict()}
        said = f"{options.delta}, {what}" if what in FACTORS else {"head": "head alone"}.get(what, what)
        lines.append(
            [
                f"{name}: {measured.data}, {len(task.train)} rows", task.metric, f"**{said}**" if what == chosen else said,
                f"{found[what]['lr']:.2g}" if "lr" in found[what] else "",
                "" if dev is None else f"{100 * dev:.1f}", told(own), told(gain) if what in FACTORS else "",
            ]
        )  # fmt: skip
    return lines


if __name__ == "__main__":
    main()
