"""The demonstration: a real backbone, a real task, six deltas and two baselines in one pass, and a language model."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltatune.backbone.load import Backbone, load
from deltatune.compose.expression import parse
from deltatune.data.load import load_task
from deltatune.data.task import INPUTS, Task
from deltatune.studies.result import label_of
from deltatune.studies.verbs import Announce, Runs, run_plans
from deltatune.training.engine import Engine, Listener, working_copy
from deltatune.training.evaluate import predict
from deltatune.training.job import Plan, make_jobs
from deltatune.training.settings import Settings, resolve_precision

TASK, STORY = "stdlib_pair", "stdlib_summary"
DELTAS = ("lora", "adapter", "parallel_adapter", "prefix", "bitfit", "ia3")
BASELINES = ("head", "full")
SEEDS = (0, 1, 2)
SETTINGS = Settings(steps=80, batch=16, evaluations=3, max_length=32, dev_rows=150)
STORY_SETTINGS = Settings(steps=40, batch=4, evaluations=1, max_length=96, dev_rows=4)


@dataclass(frozen=True)
class Told:
    """What the language model wrote for a prompt, before and after its delta was trained."""

    prompt: str
    wanted: str
    before: str
    after: str
    seconds: float


def demo(
    task: Task | None,
    out: Path,
    *,
    backbone: str = "minilm",
    listener: Listener | None = None,
    announce: Announce | None = None,
    command: str = "deltatune demo",
) -> tuple[Runs, list[dict[str, Any]]]:
    """Train six deltas and two baselines from three seeds in one pass; return the runs and three test predictions.

    A visitor's own task is fitted with the same plan, its texts cut at 64 tokens.
    """
    settings = SETTINGS if task is None else dataclasses.replace(SETTINGS, max_length=64)
    task = (load_task(TASK) if task is None else task).limited(2000, 300, 500)
    plans = [Plan(parse(text), task, seed, settings, text) for text in (*DELTAS, *BASELINES) for seed in SEEDS]
    runs = run_plans(load(backbone), plans, out=out, listener=listener, announce=announce, command=command)
    return runs, _predictions(runs, task)


def _predictions(runs: Runs, task: Task) -> list[dict[str, Any]]:
    """Three test rows with what the best delta says of them."""
    best = runs.best
    assert best.test is not None
    return [
        {
            "input": " ".join(str(row[field]) for field in INPUTS[task.kind]),
            "gold": row.get("label", row.get("tags", row.get("target"))),
            "predicted": best.test.values[i],
            "confidence": best.test.confidence[i],
            "delta": label_of(best),
        }
        for i, row in enumerate(task.test[:3])
    ]


def story(progress: Callable[[str], None] | None = None) -> Told:
    """Train a LoRA on a small language model for some steps, and let it write before and after."""
    started = time.perf_counter()
    backbone: Backbone = load("smollm2")
    task = load_task(STORY).limited(400, 8, 8)
    working = working_copy(backbone, resolve_precision("auto", backbone))
    plan = Plan(parse("lora"), task, 0, STORY_SETTINGS, "lora")
    jobs = make_jobs([plan], working, backbone)
    engine = Engine(jobs, working)
    row, head = task.test[:1], jobs[0].head
    limit = STORY_SETTINGS.max_length
    try:
        before = predict(engine.adapted, None, head, row, limit).values[0]
        while jobs[0].step < jobs[0].steps:
            engine.step(jobs)
            if progress:
                progress(f"smollm2 with LoRA: step {jobs[0].step}/{jobs[0].steps}, loss {jobs[0].losses[-1]:.2f}")
        after = predict(engine.adapted, jobs[0].delta, head, row, limit).values[0]
    finally:
        engine.close()
    wanted = row[0]["target"]
    return Told(row[0]["source"], wanted, before, after, time.perf_counter() - started)
