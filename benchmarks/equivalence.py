"""Compare test scores of our LoRA with those of a plain PEFT loop, over paired seeds.

Run as: .venv/bin/python benchmarks/equivalence.py [--seeds 5] [--sides ours peft peft_own_start peft_dropout]

A seed fixes the rows of each batch, their order, the head's start and, on the side `peft`, the start of the LoRA. Both
sides have the same rates, schedule, clip, steps and choice of the best step on dev; test is scored once. `peft_own_start`
lets PEFT draw its LoRA, `peft_dropout` leaves the model's own dropout on as well. Ours trains all seeds in one bank. A row
is kept per (task, seed, side), so a stopped run goes on.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from common import Row, Rows, parser, publish, table, tasks
from torch import Tensor, nn

from deltatune.backbone.embedded import locate
from deltatune.backbone.load import Backbone, load
from deltatune.data.intervals import paired_interval
from deltatune.data.metrics import references, score
from deltatune.data.task import Task
from deltatune.heads.base import Batch, Example, collate
from deltatune.methods.reparameterization.lora import LoRA
from deltatune.training.fit import fit_plans
from deltatune.training.groups import HEAD_LR
from deltatune.training.job import Job, Plan, make_jobs
from deltatune.training.settings import Settings, rate

NAME = "equivalence"
REAL = ("sst2", "mrpc", "snips_intent", "wikigold")
EMBEDDED = ("stdlib_package", "stdlib_pair", "stdlib_kind", "stdlib_tags")
MARGIN = 0.7  # points
RIVALS = {
    "peft": "PEFT, same start",
    "peft_own_start": "PEFT, its own start",
    "peft_dropout": "PEFT, its own start, the model's dropout on",
}


class PeftLoop:
    """One training with PEFT, written out: its model, a linear head, AdamW and the loop."""

    def __init__(self, job: Job, backbone: Backbone, side: str) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModel

        self.job, self.backbone = job, backbone
        options = {} if side == "peft_dropout" else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        torch.manual_seed(job.plan.seed)
        base = AutoModel.from_pretrained(locate("minilm"), **options)
        self.model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]))
        self.head: nn.Linear = copy.deepcopy(job.head.linear)  # type: ignore[arg-type]
        if side == "peft":
            for site, layer in job.delta.at_sites():
                module = self.model.get_submodule(f"base_model.model.{site.exit}")
                module.lora_A["default"].weight.data.copy_(layer.get_parameter("A").data)
        self.trained = [p for p in self.model.parameters() if p.requires_grad] + list(self.head.parameters())
        lora = self.trained[: -len(list(self.head.parameters()))]
        groups = [{"params": lora, "lr": job.plan.lr}, {"params": list(self.head.parameters()), "lr": HEAD_LR}]
        self.optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
        warmup = job.plan.settings.warmup
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, lambda step: rate(step, job.steps, warmup))

    def run(self) -> tuple[float, float]:
        """Train, keep the best on dev, and return its dev and test scores."""
        task, best, kept = self.job.plan.task, -1.0, None
        every = -(-self.job.steps // self.job.plan.settings.evaluations)
        for step in range(self.job.steps):
            self._step(self.job.logical_batch(step))
            if (step + 1) % every == 0 or step + 1 == self.job.steps:
                dev = self._score(task, "dev")
                if dev > best:
                    best, kept = dev, [p.detach().clone() for p in self.trained]
        for parameter, value in zip(self.trained, kept or [], strict=True):
            parameter.data.copy_(value)
        return best, self._score(task, "test")

    def _step(self, examples: Sequence[Example]) -> None:
        self.model.train()
        targets = torch.tensor(_padded_targets(examples))
        scores = self._scores(collate(examples, self.backbone))
        loss = nn.functional.cross_entropy(scores.flatten(0, -2), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, self.job.plan.settings.clip)
        self.optimiser.step()
        self.schedule.step()
        self.optimiser.zero_grad()

    def _scores(self, batch: Batch) -> Tensor:
        """Scores [rows, labels] of the mean over tokens, or [rows, tokens, tags]."""
        hidden = self.model(**batch.inputs).last_hidden_state
        if self.job.plan.task.kind != "token_classification":
            mask = batch.inputs["attention_mask"][:, :, None]
            hidden = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        scores: Tensor = self.head(hidden)
        return scores

    @torch.inference_mode()
    def _score(self, task: Task, split: str) -> float:
        self.model.eval()
        rows = getattr(task, split)
        examples = self.job.head.encode(rows, self.backbone, self.job.plan.settings.max_length)
        found: list[Any] = []
        for start in range(0, len(rows), 64):
            chunk = examples[start : start + 64]
            best = self._scores(collate(chunk, self.backbone)).argmax(dim=-1)
            if task.kind == "token_classification":
                for example, tags in zip(chunk, best.tolist(), strict=True):
                    found.append([task.labels[tags[at]] if at >= 0 else "O" for at in example.words])
            else:
                found += [task.labels[i] for i in best.tolist()]
        return score(task.metric, found, references(task.kind, rows), task.labels)


def _padded_targets(examples: Sequence[Example]) -> list[Any]:
    if isinstance(examples[0].target, int):
        return [e.target for e in examples]
    length = max(len(e.ids) for e in examples)
    return [[*e.target, *[-100] * (length - len(e.target))] for e in examples]


def run_ours(plans: Sequence[Plan], backbone: Backbone) -> list[Row]:
    """Train all seeds of one task in one bank."""
    started = time.perf_counter()
    trained = fit_plans(backbone, plans)
    spent = (time.perf_counter() - started) / len(plans)
    return [
        {"seed": t.plan.seed, "dev": t.dev_score, "test": t.metrics["test"][t.plan.task.metric], "seconds": spent}
        for t in trained
    ]


def run_peft(plan: Plan, backbone: Backbone, side: str) -> Row:
    """Train one seed with PEFT."""
    job = make_jobs([plan], backbone, backbone)[0]
    started = time.perf_counter()
    dev, test = PeftLoop(job, backbone, side).run()
    return {"seed": plan.seed, "dev": dev, "test": test, "seconds": time.perf_counter() - started}


def measure(loaded: Sequence[Task], options: Any, rows: Rows, key: Row) -> None:
    """Train what is not stored yet."""
    backbone = load("minilm")
    settings = Settings(
        epochs=options.epochs,
        batch=16,
        max_length=64,
        probe=False,
        precision="float32",
        evaluations=options.evaluations,
    )
    for task in loaded:
        for side in options.sides:
            done = {row["seed"] for row in rows.matching(task=task.name, side=side, **key)}
            plans = [Plan(LoRA(), task, seed, settings, "lora") for seed in range(options.seeds) if seed not in done]
            made = [run_ours(plans, backbone)] if side == "ours" and plans else []
            for found in made or ([run_peft(plan, backbone, side)] for plan in plans):
                for row in found:
                    rows.add({"task": task.name, "side": side, **key, **row})
                    print(f"{task.name}, {side}, seed {row['seed']}: test {100 * row['test']:.2f}", flush=True)


def compare(loaded: Sequence[Task], options: Any, rows: Rows, key: Row) -> dict[str, dict[str, Any]]:
    """Return, for each PEFT side and task, the paired difference in points and whether it lies within the margin."""
    found: dict[str, dict[str, Any]] = {}
    for side in (side for side in options.sides if side != "ours"):
        found[side] = {}
        for task in loaded:
            tests = {
                who: [
                    100 * rows.matching(task=task.name, side=who, seed=s, **key)[0]["test"]
                    for s in range(options.seeds)
                ]
                for who in ("ours", side)
            }
            gap = paired_interval(tests["ours"], tests[side])
            inside = gap.low is not None and gap.high is not None and gap.low >= -MARGIN and gap.high <= MARGIN
            means = {who: sum(values) / len(values) for who, values in tests.items()}
            found[side][task.name] = {
                "ours": means["ours"], "peft": means[side], "difference": gap._asdict(), "within": inside, "metric": task.metric
            }  # fmt: skip
    return found


def told(found: dict[str, dict[str, Any]], options: Any, key: Row) -> str:
    """Say the comparison as one table."""
    lines = []
    for side, by_task in found.items():
        for name, one in by_task.items():
            gap = one["difference"]
            interval = "–" if gap["low"] is None else f"{gap['low']:+.2f} to {gap['high']:+.2f}"
            verdict = "yes" if one["within"] else "no"
            lines.append(
                (f"{name} ({one['metric']}), {RIVALS[side]}", f"{one['ours']:.2f}", f"{one['peft']:.2f}", f"{gap['mean']:+.2f}", interval, verdict)
            )  # fmt: skip
    header = ("task", "ours", "PEFT", "difference", "95 % interval", f"within ± {MARGIN}")
    return (
        f"### LoRA on both sides, {options.seeds} paired seeds\n\nmax {key['rows']:,} training rows, {key['epochs']:g} epochs, "
        f"batch 16, 64 tokens, float32; points of the test score, Student's t over seeds.\n\n{table(header, lines)}"
    )


def main() -> None:
    """Train what is lacking and publish the comparison."""
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--tasks", type=int, default=4, help="the first so many tasks")
    options.add_argument("--rows", type=int, default=2000)
    options.add_argument("--test", type=int, help="at most so many test rows")
    options.add_argument("--epochs", type=float, default=2.0)
    options.add_argument("--evaluations", type=int, default=5)
    options.add_argument("--sides", nargs="*", choices=["ours", *RIVALS], default=["ours", "peft"])
    chosen = options.parse_args()
    rows = Rows(NAME, chosen)
    key = {"rows": chosen.rows, "test_rows": chosen.test, "epochs": chosen.epochs, "evaluations": chosen.evaluations}
    loaded = [t.limited(chosen.rows, 500, chosen.test) for t in tasks(REAL[: chosen.tasks], EMBEDDED[: chosen.tasks])]
    measure(loaded, chosen, rows, key)
    found = compare(loaded, chosen, rows, key)
    gate = {"passed": all(one["within"] for by_task in found.values() for one in by_task.values()), "margin": MARGIN}
    none = {"over_default": None, "over_tuned": None, "over_limit": None, "factors": {}}
    publish(NAME, told(found, chosen, key), {"gate": gate, **none, "sides": found}, chosen)


if __name__ == "__main__":
    main()
