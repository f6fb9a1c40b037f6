"""Time 16 trainings on 16 tasks as one bank, beside PEFT one after the other.

Run as: .venv/bin/python benchmarks/r1_train_together.py [--rounds 9] [--steps 4]

Three methods (LoRA, adapter, BitFit) and heads of several kinds train together in ours. PEFT has neither adapters nor
BitFit, so its side trains a LoRA on every task; the mix "lora" compares LoRA with LoRA on both sides. PEFT runs at its
defaults (float32, fused attention kernel, the model's own dropout) and at the best cell of a scripted search, with
dropout off as in ours. A block is `--steps` optimiser steps of all 16 trainings; loading is not timed. The limit is
twice a bare bfloat16 forward of the same examples, without padding or in chunks of like length, whichever is faster.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from common import Rows, interleave, milliseconds, parser, plain, publish, ratio, table, tasks, timed
from rival import Cell, Training

from deltatune.backbone.load import Backbone, load
from deltatune.compose.expression import parse
from deltatune.data.task import Task
from deltatune.delta import attention, packing
from deltatune.heads.base import Example, collate
from deltatune.training.engine import Engine, working_copy
from deltatune.training.job import Job, Plan, batch_of, make_jobs
from deltatune.training.settings import Precision, Settings, resolve_precision

REAL = (
    "sst2", "mrpc", "wikigold", "snips_intent", "rte", "conll04_ner", "scicite", "snli_small",
    "btc_twitter", "tweet_emotion", "cola", "ag_news", "hate_davidson", "sst5", "mpqa", "tweet_hate",
)  # fmt: skip
EMBEDDED = (
    "stdlib_package", "stdlib_pair", "stdlib_tags", "stdlib_kind", "proc_where_after_three", "proc_tags_travel",
    "proc_topic_science", "proc_entail_quantifier", "proc_role_told_tags", "proc_sentiment_food_mixed",
    "proc_agreement_relative", "proc_count_fruit", "proc_order_month", "proc_speech_act", "proc_tense_irregular",
    "proc_sentiment_film_negation",
)  # fmt: skip
MIXES = {"three methods": ("lora", "adapter", "bitfit"), "lora": ("lora",)}
NAME = "r1_train_together"
STEPS = 100_000  # horizon of the schedules; a benchmark does a few


@dataclass(frozen=True)
class Setting:
    """What is trained: `batch` rows a step, with the methods of a mix in turn over the tasks."""

    batch: int
    mix: str
    length: int

    def plans(self, loaded: Sequence[Task], precision: Precision, seed: int = 0) -> list[Plan]:
        settings = Settings(
            steps=STEPS, batch=self.batch, max_length=self.length, probe=False, precision=precision, evaluations=1
        )
        methods = itertools.cycle(MIXES[self.mix])
        return [
            Plan(parse(method), task, seed, settings, method) for task, method in zip(loaded, methods, strict=False)
        ]


class Ours:
    """A bank of all trainings, or of some."""

    def __init__(self, plans: Sequence[Plan], backbone: Backbone) -> None:
        self.working = working_copy(backbone, resolve_precision(plans[0].settings.precision, backbone))
        self.jobs = make_jobs(plans, self.working, backbone)
        self.engine = Engine(self.jobs, self.working)

    def at(self, step: int) -> None:
        """Let the next step draw the batches of this one."""
        for job in self.jobs:
            job.step = step

    def block(
        self, steps: int, *, joined: bool = True, batched: bool = True, plain: bool = True, packed: bool = True
    ) -> Callable[[int], None]:
        """Return a run of some steps of all jobs, with one factor taken away if asked."""
        groups = [self.jobs] if joined else [[job] for job in self.jobs]

        def run(number: int) -> None:
            self.at(number * steps)
            self.engine.adapted.batched = batched
            with attention_by_products(plain), padding_left_out(self.engine, packed):
                for group in groups:
                    for _ in range(steps):
                        self.engine.step(group)

        return run

    def forward(self, steps: int, rows: int | None) -> Callable[[int], None]:
        """Return a bare forward of the same examples: without padding, or in padded chunks of `rows` by length."""

        def run(number: int) -> None:
            for step in range(number * steps, (number + 1) * steps):
                self.at(step)
                for chunk in self._chunks(rows):
                    inputs = collate(chunk, self.working).inputs
                    with torch.inference_mode():
                        if rows is None:
                            self.engine.adapted.encode(inputs, deltas=None)
                        else:
                            self.working.trunk(**inputs)

        return run

    def _chunks(self, rows: int | None) -> list[Sequence[Example]]:
        if rows is None:
            return [[e for j in group for e in j.logical_batch(j.step)] for group in self.engine.groups(self.jobs)]
        examples = sorted((e for j in self.jobs for e in j.logical_batch(j.step)), key=lambda e: len(e.ids))
        return [examples[i : i + rows] for i in range(0, len(examples), rows)]


@contextmanager
def attention_by_products(wanted: bool) -> Iterator[None]:
    """Train with plain products for short rows, or always with the fused kernel."""
    own = attention.PLAIN_LENGTH
    attention.PLAIN_LENGTH = own if wanted else 0
    try:
        yield
    finally:
        attention.PLAIN_LENGTH = own


@contextmanager
def padding_left_out(engine: Engine, wanted: bool) -> Iterator[None]:
    """Train on tokens without padding, or on padded rows grouped by length."""
    own = packing.WASTE, engine.packs
    if not wanted:
        packing.WASTE, engine.packs = 2.0, False
    try:
        yield
    finally:
        packing.WASTE, engine.packs = own


class Peft:
    """All trainings as models of their own, trained one after the other."""

    def __init__(self, jobs: Sequence[Job], cell: Cell, blocks: int, steps: int) -> None:
        self.cell, self.steps = cell, steps
        self.trainings = [Training(job.plan.task, cell, job.plan.lr, STEPS) for job in jobs]
        self.batches = [[job.logical_batch(step) for step in range(blocks * steps)] for job in jobs]
        self.grouped = [by_length(batches) for batches in self.batches]

    def block(self, cell: Cell) -> Callable[[int], None]:
        """Return a run of some steps of each training; `cell` may differ from the models' own in grouping and threads."""
        batches = self.grouped if cell.grouped else self.batches

        def run(number: int) -> None:
            threads = torch.get_num_threads()
            torch.set_num_threads(cell.threads or threads)
            try:
                for training, own in zip(self.trainings, batches, strict=True):
                    for batch in own[number * self.steps : (number + 1) * self.steps]:
                        training.step(batch)
            finally:
                torch.set_num_threads(threads)

        return run


def by_length(batches: Sequence[Sequence[Example]]) -> list[list[Example]]:
    """Cut the same examples into batches of like length, in a shuffled order."""
    examples = sorted((e for batch in batches for e in batch), key=lambda e: len(e.ids))
    size = len(batches[0])
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0)).tolist()
    return [examples[i * size : (i + 1) * size] for i in order]


def search(jobs: Sequence[Job], setting: Setting, rows: Rows, cells: int | None) -> Cell:
    """Return the fastest cell of PEFT's settings on these trainings: each is run three times, the median counts."""
    threads = sorted({1, torch.get_num_threads()})
    models = list(itertools.product(("float32", "bfloat16"), ("sdpa", "eager"), (False, True)))[:cells]
    found: dict[Cell, float] = {}
    for dtype, form, fused in models:
        inner = [Cell(dtype, form, fused, g, t, dropout=False) for g, t in itertools.product((False, True), threads)]
        stored = {cell: rows.matching(search=asdict(cell), batch=setting.batch) for cell in inner}
        if not all(stored.values()):
            peft = Peft(jobs, inner[0], 4, 1)
            for cell in inner:
                run = peft.block(cell)
                run(3)
                rows.add({"search": asdict(cell), "batch": setting.batch, "times": [timed(run, n) for n in range(3)]})
        for cell in inner:
            times = rows.matching(search=asdict(cell), batch=setting.batch)[0]["times"]
            found[cell] = sorted(times)[1]
            print(f"batch {setting.batch}: {1000 * found[cell]:7.0f} ms a step of all: {cell}", flush=True)
    return min(found, key=found.__getitem__)


def measure(setting: Setting, loaded: Sequence[Task], backbone: Backbone, rows: Rows, options: Any) -> dict[str, Any]:
    """Time one setting in interleaved rounds; return the seconds by variant, the best cell and the token counts."""
    key = {"batch": setting.batch, "mix": setting.mix, "length": setting.length, "tasks": len(loaded)}
    ours, wide = (Ours(setting.plans(loaded, p), backbone) for p in ("auto", "float32"))
    best = search(ours.jobs, setting, rows, options.cells)
    blocks = options.rounds + 1
    default = Cell()
    variants = {
        "ours": ours.block(options.steps),
        "PEFT, defaults": Peft(ours.jobs, default, blocks, options.steps).block(default),
        "PEFT, best": Peft(ours.jobs, best, blocks, options.steps).block(best),
        "forward, packed": ours.forward(options.steps, None),
        "forward, by length": ours.forward(options.steps, 2 * setting.batch),
        "ours, float32": wide.block(options.steps),
        "ours, fused attention": ours.block(options.steps, plain=False),
        "ours, padded": ours.block(options.steps, packed=False),
        "ours, loop over deltas": ours.block(options.steps, batched=False),
        "ours, one after the other": ours.block(options.steps, joined=False),
    }
    seconds = interleave(variants, options.rounds, rows, {**key, "steps": options.steps, "best": asdict(best)})
    counts = padding(ours, options.rounds * options.steps)
    ours.engine.close()
    wide.engine.close()
    return {"seconds": seconds, "best": best, "tokens": counts}


def padding(ours: Ours, steps: int) -> dict[str, float]:
    """Count the tokens of a step of all: bare, padded job by job, and padded all together."""
    bare = own = together = 0
    for step in range(steps):
        ours.at(step)
        batches = {job.name: batch_of(job, ours.working) for job in ours.jobs}
        bare += sum(len(e.ids) for batch in batches.values() for e in batch.examples)
        own += sum(batch.length * len(batch.examples) for batch in batches.values())
        for group in ours.engine.groups(ours.jobs):
            members = [batches[job.name] for job in group]
            together += max(b.length for b in members) * sum(len(b.examples) for b in members)
    return {"bare": bare / steps, "padded alone": own / steps, "padded together": together / steps}


def gate(setting: Setting, loaded: Sequence[Task], backbone: Backbone, rows: Rows, steps: int) -> dict[str, Any]:
    """Compare training together with training alone, in float32 and in the dtype that is timed.

    float32: the largest difference of any loss. The other: the mean change of the dev loss after the last step, beside
    what another seed changes it by.
    """
    key = {"gate": steps, "batch": setting.batch, "tasks": len(loaded)}
    stored = rows.matching(**key)
    if stored:
        found: dict[str, Any] = stored[0]["found"]
        return found
    together, alone = (losses(setting.plans(loaded, "float32"), backbone, steps, joined) for joined in (True, False))
    largest = max(
        abs(a - b) for x, y in zip(together["train"], alone["train"], strict=True) for a, b in zip(x, y, strict=True)
    )
    plans, other = setting.plans(loaded, "auto"), setting.plans(loaded, "auto", seed=1)
    joint, single, reseeded = (
        losses(p, backbone, steps, joined)["dev"] for p, joined in ((plans, True), (plans, False), (other, False))
    )
    apart, spread = (_mean_gap(joint, single), _mean_gap(reseeded, single))
    found = {
        "passed": largest <= 1e-4 and apart <= spread,
        "float32: largest difference of a loss": largest,
        "as timed: mean difference of the dev loss": apart,
        "as timed: the same between two seeds": spread,
    }
    rows.add({**key, "found": found})
    return found


def losses(plans: Sequence[Plan], backbone: Backbone, steps: int, joined: bool) -> dict[str, list[Any]]:
    """Train from the start, all in one bank or each in its own, and return losses by job: of each step, and on dev."""
    found: dict[str, list[Any]] = {"train": [], "dev": []}
    for members in [plans] if joined else [[plan] for plan in plans]:
        ours = Ours(members, backbone)
        for _ in range(steps):
            ours.engine.step(ours.jobs)
        for job in ours.jobs:
            found["train"].append(list(job.losses))
            held = collate(
                job.head.encode(job.plan.task.dev[:32], ours.working, job.plan.settings.max_length), ours.working
            )
            with torch.no_grad():
                found["dev"].append(float(ours.engine.losses([job], [held])[0]))
        ours.engine.close()
    return found


def _mean_gap(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


def ratios(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return the ratios of one setting: over PEFT, over the limit, and what each factor gives."""
    mine = seconds["ours"]
    limit = [2 * min(pair) for pair in zip(seconds["forward, packed"], seconds["forward, by length"], strict=True)]
    factors = {
        "dtype": "ours, float32",
        "attention": "ours, fused attention",
        "packing": "ours, padded",
        "batching": "ours, loop over deltas",
        "joining": "ours, one after the other",
    }
    return {
        "over_default": ratio(seconds["PEFT, defaults"], mine),
        "over_tuned": ratio(seconds["PEFT, best"], mine),
        "over_limit": ratio(mine, limit),
        "factors": {name: ratio(seconds[variant], mine) for name, variant in factors.items()},
    }


def told(setting: Setting, measured: dict[str, Any], found: dict[str, Any], number: int, steps: int) -> str:
    """Say one setting as a table."""
    seconds = measured["seconds"]
    lines = [
        ("ours, all together", milliseconds(seconds["ours"], steps), "1"),
        ("PEFT, defaults, one after the other", milliseconds(seconds["PEFT, defaults"], steps), found["over_default"]),
        (f"PEFT, best cell: {measured['best']}", milliseconds(seconds["PEFT, best"], steps), found["over_tuned"]),
    ]
    lines += [
        (f"ours without {name}: {what}", milliseconds(seconds[variant], steps), found["factors"][name])
        for name, what, variant in (
            ("dtype", "float32", "ours, float32"),
            ("attention", "the fused kernel", "ours, fused attention"),
            ("packing", "rows padded", "ours, padded"),
            ("batching", "a loop over deltas", "ours, loop over deltas"),
            ("joining", "one training after the other", "ours, one after the other"),
        )
    ]
    bare, own, together = (round(measured["tokens"][k]) for k in ("bare", "padded alone", "padded together"))
    limit = found["over_limit"]
    return (
        f"### {number} trainings, batch {setting.batch}, {setting.mix}, at most {setting.length} tokens a row\n\n"
        + table(("one optimiser step of all", "ms", "times ours"), lines)
        + f"\n\nOurs takes {limit} times the limit (twice a bare bfloat16 forward of the same examples). A step has "
        f"{bare:,} tokens, {own:,} padded job by job, {together:,} padded all together."
    )


def main() -> None:
    """Measure what is lacking and publish the tables."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--steps", type=int, default=4, help="optimiser steps of each training in a block")
    options.add_argument("--tasks", type=int, default=16)
    options.add_argument("--length", type=int, default=128, help="longest row in tokens")
    options.add_argument("--gate-steps", type=int, default=10)
    options.add_argument("--cells", type=int, help="at most so many models in the search")
    options.add_argument("--settings", nargs="*", default=["4,three methods", "8,three methods", "4,lora"])
    chosen = options.parse_args()
    backbone, rows = load("minilm"), Rows(NAME, chosen)
    loaded = [task.limited(400, 64, 8) for task in tasks(REAL[: chosen.tasks], EMBEDDED[: chosen.tasks])]
    settings = [Setting(int(text.partition(",")[0]), text.partition(",")[2], chosen.length) for text in chosen.settings]
    checked = gate(settings[0], loaded, backbone, rows, chosen.gate_steps)
    texts, made = [], {}
    for setting in settings:
        measured = measure(setting, loaded, backbone, rows, chosen)
        found = ratios(measured["seconds"])
        texts.append(told(setting, measured, found, len(loaded), chosen.steps))
        made[f"batch {setting.batch}, {setting.mix}"] = {**found, "best": str(measured["best"]), **measured["tokens"]}
    first = next(iter(made.values()))
    publish(
        NAME,
        "\n\n".join([_gate_told(checked), *texts]),
        {"gate": checked, **plain(first), "settings": plain(made)},
        chosen,
    )


def _gate_told(checked: dict[str, Any]) -> str:
    figures = "; ".join(f"{name} {value:.1e}" for name, value in checked.items() if name != "passed")
    return f"Gate {'passed' if checked['passed'] else 'FAILED'}: {figures}."


if __name__ == "__main__":
    main()
