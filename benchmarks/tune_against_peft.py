"""Compare what `tune` finds in two minutes with PEFT's recommended LoRA under Trainer in the same two minutes.

Run as: .venv/bin/python benchmarks/tune_against_peft.py [--seconds 120] [--repeats 3]

PEFT's side is its quick tour: LoRA with r=8, alpha 32, dropout 0.1, rate 1e-3, batch 32, weight decay 0.01, the best
evaluation on dev loaded at the end. Its epochs are as many as fit the time, so that its schedule ends where the time
does; how long a step takes is measured before its clock starts. Both clocks start with the loading of the model and end
with the predictions of the test rows. A row is kept per (task, repeat, side), so a stopped run goes on. The tasks were
named before the first run.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import Row, Rows, parser, publish, table, tasks
from rival import Cell, padded, peft_model

from deltatune.backbone.load import Backbone, load
from deltatune.data.intervals import bootstrap_interval
from deltatune.data.metrics import references, score
from deltatune.data.task import Task
from deltatune.heads.base import Example
from deltatune.heads.choose import head_for
from deltatune.studies.verbs import tune

NAME = "tune_against_peft"
REAL = ("sst2", "mrpc", "snips_intent", "wikigold", "tweet_emotion", "scicite")
EMBEDDED = ("stdlib_package", "stdlib_pair", "stdlib_tags", "stdlib_kind", "proc_tags_travel", "proc_topic_science")
LENGTH = 128
BATCH = 32
EVALUATIONS = 6
EPOCHS = 60  # more than any of these tasks gains from


class Answered(NamedTuple):
    """What a side says of the test rows, and what that cost."""

    predictions: list[Any]
    seconds: float
    told: str


def ours(task: Task, seconds: float, seed: int) -> Answered:
    """Take what `tune` saves."""
    started = time.perf_counter()
    runs = tune(load("minilm"), task, budget=f"{seconds:g}s", seed=seed, max_length=LENGTH)
    spent = time.perf_counter() - started
    best = runs.best
    assert best.test is not None
    horizon = max(t.steps for t in runs.trained)
    return Answered(best.test.values, spent, f"{best.plan.label}, {best.steps} of {horizon} steps")


class PeftSide:
    """PEFT and Trainer on one task."""

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.seed = task, seed
        self.tagging = task.kind == "token_classification"
        torch.manual_seed(seed)
        # The same tokens on both sides.
        backbone = load("minilm")
        self.rows = {name: self._encoded(getattr(task, name), backbone) for name in ("train", "dev", "test")}
        self.model = peft_model(task, Cell(), r=8, lora_alpha=32, lora_dropout=0.1)

    def _encoded(self, rows: Sequence[Any], backbone: Backbone) -> list[Example]:
        return head_for(self.task, backbone, self.seed).encode(rows, backbone, LENGTH)

    def trainer(self, steps: int, folder: str, callbacks: Sequence[Any] = ()) -> Any:
        """Make the Trainer of a run of some steps."""
        from transformers import Trainer, TrainingArguments

        every = max(1, steps // EVALUATIONS)
        options = TrainingArguments(
            output_dir=folder,
            learning_rate=1e-3,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            weight_decay=0.01,
            max_steps=steps,
            eval_strategy="steps",
            save_strategy="steps",
            eval_steps=every,
            save_steps=every,
            load_best_model_at_end=True,
            metric_for_best_model="score",
            save_total_limit=2,
            seed=self.seed,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        return Trainer(
            self.model,
            options,
            train_dataset=self.rows["train"],
            eval_dataset=self.rows["dev"],
            data_collator=lambda examples: padded(examples, self.tagging),
            compute_metrics=lambda found: {"score": self.score("dev", found.predictions)},
            callbacks=list(callbacks),
        )

    def values(self, split: str, logits: np.ndarray) -> list[Any]:
        """Turn logits [rows, labels] or [rows, tokens, tags] into labels."""
        best, labels = logits.argmax(axis=-1), self.task.labels
        if not self.tagging:
            return [labels[i] for i in best]
        examples = self.rows[split]
        return [
            [labels[tags[at]] if at >= 0 else "O" for at in example.words]
            for example, tags in zip(examples, best, strict=True)
        ]

    def score(self, split: str, logits: np.ndarray) -> float:
        """Score logits of a split."""
        gold = references(self.task.kind, getattr(self.task, split))
        return score(self.task.metric, self.values(split, logits), gold, self.task.labels)


def peft(task: Task, seconds: float, seed: int) -> Answered:
    """Train PEFT's LoRA for the time there is."""
    from transformers import TrainerCallback

    if task.name not in _known:
        with tempfile.TemporaryDirectory() as folder:
            _known[task.name] = _costs(task, folder)
    step, row, kept = _known[task.name]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        side = PeftSide(task, seed)
        last = row * len(task.test)
        left = seconds - (time.perf_counter() - started) - last - EVALUATIONS * (row * len(task.dev) + kept)
        steps = max(1, min(int(left / step), EPOCHS * math.ceil(len(task.train) / BATCH)))

        class Clock(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if time.perf_counter() - started > seconds - last:
                    control.should_training_stop = control.should_evaluate = control.should_save = True

        trainer = side.trainer(steps, folder, [Clock()])
        trainer.train()
        trainer.compute_metrics = None  # it scores dev
        found = trainer.predict(side.rows["test"])
    spent = time.perf_counter() - started
    told = f"{trainer.state.global_step} of {steps} steps of {BATCH}"
    return Answered(side.values("test", found.predictions), spent, told)


_known: dict[str, tuple[float, float, float]] = {}


def _costs(task: Task, folder: str) -> tuple[float, float, float]:
    """Measure the seconds of a step, of a row predicted, and of a checkpoint."""
    side = PeftSide(task, 0)
    runs = []
    for steps in (4, 24):
        trainer = side.trainer(steps, str(Path(folder) / str(steps)))
        trainer.args.eval_strategy = trainer.args.save_strategy = "no"
        trainer.args.load_best_model_at_end = False
        started = time.perf_counter()
        trainer.train()
        runs.append(time.perf_counter() - started)
    started = time.perf_counter()
    trainer.predict(side.rows["dev"])
    row = (time.perf_counter() - started) / len(task.dev)
    started = time.perf_counter()
    trainer.save_model(str(Path(folder) / "saved"))
    return (runs[1] - runs[0]) / 20, row, time.perf_counter() - started


SIDES = {"ours": ours, "PEFT": peft}


def measure(loaded: Sequence[Task], options: Any, rows: Rows, key: Row) -> None:
    """Run what is not stored yet; the sides take turns in who is first."""
    for repeat in range(options.repeats):
        for number, task in enumerate(loaded):
            for side in sorted(SIDES, reverse=bool((repeat + number) % 2)):
                where = {"task": task.name, "repeat": repeat, "side": side, **key}
                if rows.matching(**where):
                    continue
                answered = SIDES[side](task, options.seconds, repeat)
                gold = references(task.kind, task.test)
                value = score(task.metric, answered.predictions, gold, task.labels)
                rows.add({**where, "score": value, **answered._asdict()})
                print(
                    f"{task.name}, {repeat}, {side}: {100 * value:.1f} in {answered.seconds:.0f} s, {answered.told}",
                    flush=True,
                )


def compare(task: Task, options: Any, rows: Rows, key: Row) -> dict[str, Any]:
    """Return both means and the paired difference in points with its interval.

    The bootstrap draws test rows, the same for both sides, and repeats, as pairs.
    """
    found = {
        side: [
            rows.matching(task=task.name, repeat=n, side=side, **key)[0]["predictions"] for n in range(options.repeats)
        ]
        for side in SIDES
    }
    gold = references(task.kind, task.test)
    drawn = np.random.default_rng(0)

    def gap(examples: Sequence[int], repeats: Sequence[int]) -> float:
        chosen = [gold[i] for i in examples]
        return sum(
            sign * score(task.metric, [found[side][n][i] for i in examples], chosen, task.labels)
            for n in repeats
            for side, sign in (("ours", 100.0), ("PEFT", -100.0))
        ) / len(repeats)

    everything = list(range(len(gold)))
    whole = gap(everything, range(options.repeats))
    spread = bootstrap_interval(
        everything,
        lambda examples: gap(examples, drawn.integers(0, options.repeats, options.repeats).tolist()),
        resamples=options.resamples,
    )
    assert spread.low is not None and spread.high is not None
    means = {
        side: 100 * float(np.mean([score(task.metric, p, gold, task.labels) for p in found[side]])) for side in SIDES
    }
    verdict = "won" if spread.low > 0 else "lost" if spread.high < 0 else "tied"
    return {
        "metric": task.metric,
        **means,
        "difference": whole,
        "low": spread.low,
        "high": spread.high,
        "verdict": verdict,
    }


def told(found: dict[str, dict[str, Any]], options: Any, rows: Rows, key: Row) -> str:
    """Say the comparison as one table."""
    lines = []
    for name, one in found.items():
        taken = [rows.matching(task=name, repeat=n, side="ours", **key)[0]["told"] for n in range(options.repeats)]
        took = [rows.matching(task=name, repeat=n, side="PEFT", **key)[0]["told"] for n in range(options.repeats)]
        lines.append(
            (
                f"{name} ({one['metric']})", f"{one['ours']:.1f}", f"{one['PEFT']:.1f}", f"{one['difference']:+.1f}",
                f"{one['low']:+.1f} to {one['high']:+.1f}", one["verdict"], "; ".join(t.rpartition(", ")[0] for t in taken),
                "; ".join(t.partition(" of ")[0] for t in took),
            )
        )  # fmt: skip
    header = ("task", "ours", "PEFT", "difference", "95 % interval", "verdict", "ours took", "PEFT's steps")
    count = {verdict: sum(one["verdict"] == verdict for one in found.values()) for verdict in ("won", "tied", "lost")}
    longest = {side: max(row["seconds"] for row in rows.matching(side=side, **key)) for side in SIDES}
    return (
        f"### `tune` and PEFT's recommended LoRA, {options.seconds:g} seconds each\n\n"
        f"{', '.join(f'{n} {verdict}' for verdict, n in count.items())}; {options.repeats} repeats, at most "
        f"{options.rows:,} training rows, points of the test score, bootstrap over test rows and repeats. The longest run "
        f"of ours took {longest['ours']:.0f} s, of PEFT's {longest['PEFT']:.0f} s.\n\n{table(header, lines)}"
    )


def main() -> None:
    """Run what is lacking and publish the comparison."""
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=120)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--rows", type=int, default=2000)
    options.add_argument("--test", type=int, default=1000)
    options.add_argument("--resamples", type=int, default=1000)
    options.add_argument("--tasks", nargs="*", default=None, help="other tasks, to look around")
    chosen = options.parse_args()
    rows = Rows(NAME, chosen)
    key = {"limit": chosen.seconds, "rows": chosen.rows, "test_rows": chosen.test}
    loaded = [t.limited(chosen.rows, 500, chosen.test) for t in tasks(chosen.tasks or REAL, chosen.tasks or EMBEDDED)]
    measure(loaded, chosen, rows, key)
    found = {task.name: compare(task, chosen, rows, key) for task in loaded}
    count = {verdict: sum(one["verdict"] == verdict for one in found.values()) for verdict in ("won", "tied", "lost")}
    gate = {"passed": count["won"] >= 4 and not count["lost"], **count}
    none = {"over_default": None, "over_tuned": None, "over_limit": None, "factors": {}}
    publish(NAME, told(found, chosen, rows, key), {"gate": gate, **none, "tasks": found}, chosen)


if __name__ == "__main__":
    main()
