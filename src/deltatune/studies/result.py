"""From trained deltas to one result: plain data for `--json`, the table and the report."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from typing import Any

import torch

from deltatune.backbone.load import Backbone
from deltatune.data.answers import hit, inputs_written, written
from deltatune.data.intervals import bootstrap_paired, interval
from deltatune.data.metrics import references
from deltatune.data.scores import score_interval
from deltatune.data.task import Row, Task
from deltatune.studies.schema import HEAD_ONLY, SCHEMA, check_result
from deltatune.training.fit import Trained, majority_scores, versions
from deltatune.training.job import Plan
from deltatune.training.tune import Tuned

BASELINES = {"head": HEAD_ONLY, "full": "full tuning"}
EXAMPLES_KEPT = 2000


def build_result(
    backbone: Backbone,
    task: Task,
    trained: Sequence[Trained],
    *,
    command: str,
    saved: dict[str, str] | None = None,
    tuned: Tuned | None = None,
) -> dict[str, Any]:
    """Return the result of one task as `schema.Result`.

    `saved` maps a plan's name to the folder of its delta. The chosen delta is tune's, or the best mean on dev.
    """
    opened = any("test" in t.metrics for t in trained)
    baselines = [{"name": "majority", "metrics": majority_scores(task, open_test=opened)}]
    split = "test" if opened else "dev"
    metric = task.metric
    head = _mean([t.metrics[split][metric] for t in trained if label_of(t) == HEAD_ONLY and split in t.metrics])
    reference = {"majority": baselines[0]["metrics"][split][metric], HEAD_ONLY: head}  # type: ignore[index]
    summary = [_summary_row(label, [t for t in trained if label_of(t) == label], metric) for label in _labels(trained)]
    rivals = sorted(
        (row for row in summary if not row["baseline"] and row["dev"]["mean"] is not None),
        key=lambda row: (-row["dev"]["mean"], row["trainable"]),
    )
    chosen = tuned.chosen if tuned else (rivals[0]["delta"] if rivals else None)
    second = tuned.second if tuned else (rivals[1]["delta"] if len(rivals) > 1 else None)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "sentence": "",
        "command": command,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "task": {
            "name": task.name,
            "kind": task.kind,
            "metric": metric,
            "labels": list(task.labels),
            "rows": {"train": len(task.train), "dev": len(task.dev), "test": len(task.test)},
            "source": task.source,
        },
        "backbone": {
            "name": backbone.name,
            "parameters": backbone.parameters,
            "dtype": str(trained[0].delta.record.get("precision", "")) if trained else "",
            "fingerprint": backbone.fingerprint()["exact"],
        },
        "runs": [_run(t, backbone, reference, (saved or {}).get(t.plan.name)) for t in trained],
        "baselines": baselines,
        "summary": summary,
        "chosen": chosen,
        "examples": _examples(task, trained, [label for label in (chosen, second) if label]),
    }
    if tuned:
        result["candidates"] = [
            {
                "delta": c.label,
                "settings": {"lr": c.lr},
                "trainable": c.trainable,
                "rung": c.rung,
                "steps": c.steps,
                "dev": c.dev,
                "state": c.state,
            }
            for c in tuned.candidates
        ]
    result["sentence"] = sentence(result, trained)
    return dict(check_result(result))


def label_of(trained: Trained) -> str:
    """What people call a delta: the expression as asked for; baselines by their plain names."""
    return planned_label(trained.plan)


def planned_label(plan: Plan) -> str:
    """What people call the delta of a plan."""
    label = plan.label or str(plan.spec)
    return BASELINES.get(label, label)


def _labels(trained: Sequence[Trained]) -> list[str]:
    return list(dict.fromkeys(label_of(t) for t in trained))


def _mean(values: Sequence[float]) -> float | None:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else None


def _interval(values: Sequence[float]) -> dict[str, float | None]:
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return {"mean": None, "low": None, "high": None}
    return dict(interval(finite)._asdict())


def _bytes(trained: Trained) -> int:
    return sum(value.numel() * value.element_size() for value in trained.delta.tensors().values())


def _summary_row(label: str, runs: Sequence[Trained], metric: str) -> dict[str, Any]:
    tests = [t.metrics["test"][metric] for t in runs if "test" in t.metrics]
    return {
        "delta": label,
        "trainable": runs[0].delta.trainable(),
        "seeds": len(runs),
        "dev": _interval([t.dev_score for t in runs]),
        "test": _interval(tests) if tests else None,
        "seconds": sum(t.seconds for t in runs) / len(runs),
        "bytes": _bytes(runs[0]),
        "baseline": label in BASELINES.values(),
    }


def _run(trained: Trained, backbone: Backbone, baseline: dict[str, float | None], saved: str | None) -> dict[str, Any]:
    plan = trained.plan
    return {
        "task": plan.task.name,
        "delta": label_of(trained),
        "seed": plan.seed,
        "settings": {**plan.settings.record(), "lr": plan.lr, "steps": trained.steps},
        "trainable": trained.delta.trainable(),
        "backbone": backbone.name,
        "metrics": {"dev": trained.metrics.get("dev", {}), "test": trained.metrics.get("test")},
        "baseline": baseline,
        "seconds": trained.seconds,
        "saved": saved,
        "curve": [{"step": p.step, "loss": p.loss, "dev": p.dev, "lr": p.lr} for p in trained.curve],
        "norms": trained.delta.norms() if plan.spec != "full" and trained.delta.trainable() < 5_000_000 else {},
        "bytes": _bytes(trained),
        "state": trained.state if trained.state in ("done", "stopped", "nan") else "done",
    }


def _gold(gold: Any, predicted: Sequence[Any], task: Task, row: Row) -> str:
    """The reference; of several accepted answers the one that was given, if any was."""
    if task.kind == "generation":
        return next((str(p) for p in predicted if p in gold), str(gold[0]))
    if task.kind == "extractive_span":
        return next((a for a in gold for p in predicted if hit(task.kind, p, [a])), str(gold[0]))
    return written(task.kind, gold, row)


def _examples(task: Task, trained: Sequence[Trained], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Test rows with what the first seed of each named delta made of them."""
    shown = {}
    for label in labels:
        found = next((t for t in trained if label_of(t) == label and t.test is not None), None)
        if found:
            shown[label] = found.test
    if not shown or task.kind == "chat":  # how likely an answer is, is neither right nor wrong
        return []
    gold = references(task.kind, task.test)
    return [
        {
            "row": i,
            "input": " ‖ ".join(inputs_written(task.kind, row)),
            "gold": _gold(gold[i], [p.values[i] for p in shown.values() if p], task, row),
            "predictions": {label: written(task.kind, p.values[i], row) for label, p in shown.items() if p},
            "confidence": {label: p.confidence[i] for label, p in shown.items() if p},
        }
        for i, row in enumerate(task.test[:EXAMPLES_KEPT])
    ]


def rivals_of(result: dict[str, Any], trained: Sequence[Trained]) -> tuple[list[str], list[str]]:
    """Return what per-example dev scores do not tell apart from the chosen at 95 %, and the baselines that are better.

    Scores of an example are averaged over seeds; metrics that are no mean over examples are compared by exact match of
    whole rows, of numbers by their distance. By that a candidate may come out ahead of the chosen, which the metric put
    first: not told apart.
    """
    if result["chosen"] is None:
        return [], []
    correct: dict[str, list[float]] = {}
    for label in _labels(trained):
        runs = [t for t in trained if label_of(t) == label and t.dev is not None]
        if not runs:
            continue
        kind = runs[0].plan.task.kind
        gold = references(kind, runs[0].plan.task.dev)
        hits = [[hit(kind, p, g) for p, g in zip(t.dev.values, gold, strict=True)] for t in runs if t.dev]
        correct[label] = [sum(column) / len(hits) for column in zip(*hits, strict=True)]
    mine = correct.pop(result["chosen"], None)
    if mine is None:
        return [], []
    gaps = {label: bootstrap_paired(mine, other) for label, other in correct.items()}
    ahead = [label for label, gap in gaps.items() if gap.excludes_zero and gap.mean < 0]
    better = [label for label in ahead if label in BASELINES.values()]
    return [label for label, gap in gaps.items() if not gap.excludes_zero or label in {*ahead} - {*better}], better


def sentence(result: dict[str, Any], trained: Sequence[Trained]) -> str:
    """Say what was chosen, what it scores and costs, and what it could not be told apart from."""
    row = next((r for r in result["summary"] if r["delta"] == result["chosen"]), None)
    task, metric = result["task"]["name"], result["task"]["metric"].replace("_", " ")
    if row is None:
        return f"No delta was fitted on {task}: every training diverged or none was asked for."
    split = "test" if row["test"] else "dev"
    score = row[split]
    spread = _spread(row, split, [t for t in trained if label_of(t) == row["delta"]])
    share = row["trainable"] / result["backbone"]["parameters"]
    beside = [
        f"{r['delta']} {_points(r[split]['mean'])}"
        for r in result["summary"]
        if r["baseline"] and r[split] and r[split]["mean"] is not None
    ]
    constant = result["baselines"][0]["metrics"][split][result["task"]["metric"]]
    beside.append(f"always the same answer {_points(constant)}")
    tied, better = rivals_of(result, trained)
    if tied:
        apart = f" On dev it could not be told apart from {', '.join(tied)}."
    else:
        others = any(r["dev"]["mean"] is not None for r in result["summary"] if r is not row)
        apart = " On dev it is told apart from all." if others else ""
    if better:
        apart += f" Better on dev, and no candidate of the choice: {', '.join(better)}."
    return (
        f"Take {row['delta']}: {_points(score['mean'])} % {metric} on {split}{spread}, with {row['trainable']:,} "
        f"trained parameters ({share:.2%} of {result['backbone']['name']}) in {row['bytes'] / 1e6:.2g} MB; "
        f"beside it, {', '.join(beside)}.{apart}"
    )


def _spread(row: dict[str, Any], split: str, runs: Sequence[Trained]) -> str:
    """Say the interval over seeds, or with one seed over the rows of the split."""
    low, high = row[split]["low"], row[split]["high"]
    if low is not None:
        return f" (95 % interval {_points(low)} to {_points(high)} over {row['seeds']} seeds)"
    task, made = runs[0].plan.task, getattr(runs[0], split)
    if made is None:
        return " (one seed, no interval)"
    gold = references(task.kind, getattr(task, split))
    _, low, high = score_interval(task.metric, made.values, gold, task.labels)
    if low is None or high is None:
        return " (one seed and one row, no interval)"
    return f" (95 % interval {_points(low)} to {_points(high)} over {len(gold):,} {split} rows; one seed)"


def _points(value: float) -> str:
    return f"{100 * value:.1f}"
