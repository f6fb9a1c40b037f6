"""Measure the default learning rate of every method, and write docs/learning_rates.tsv.

Run as: .venv/bin/python benchmarks/learning_rates.py [--tasks ...] [--steps 150]

All methods at all rates train in one bank, task by task; a row is kept per (task, method, rate), so a stopped run goes
on. A method is an expression, for one whose fields ask for a rate of their own. A method's default is the lowest rate whose mean dev score over tasks and seeds is within two points of its best.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from pathlib import Path

from deltatune.backbone.load import load
from deltatune.compose.expression import parse
from deltatune.data.load import load_task
from deltatune.training.fit import fit_plans
from deltatune.training.job import Plan
from deltatune.training.settings import Settings

OUT = Path(__file__).parents[1] / "docs" / "learning_rates.tsv"
FIELDS = ("task", "method", "lr", "seed", "dev", "state")
RATES = {
    "adapter": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "bitfit": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "dora": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "full": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
    "head": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "ia3": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "lntuning": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "lora": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "oft": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "parallel_adapter": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "prefix": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "ptuning": (3e-4, 1e-3, 3e-3),
    "prompt": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    'prompt(at="embed block")': (1e-2, 3e-2, 1e-1, 3e-1),
    "trainabletokens": (3e-4, 1e-3, 3e-3),
    "vera": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
}


def measured() -> list[dict[str, str]]:
    """Return the rows measured so far."""
    if not OUT.exists():
        return []
    with OUT.open() as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def best_rates(rows: list[dict[str, str]]) -> dict[str, float]:
    """Return each method's default rate by the rule above; a training that diverged scores 0."""
    scores: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        value = float(row["dev"])
        scores[row["method"]][float(row["lr"])].append(0.0 if math.isnan(value) else value)
    means = {m: {lr: sum(v) / len(v) for lr, v in by_rate.items()} for m, by_rate in scores.items()}
    return {
        m: min(lr for lr, v in by_rate.items() if v >= max(by_rate.values()) - 0.02) for m, by_rate in means.items()
    }


def main() -> None:
    """Measure what is lacking and print the best rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", nargs="*", default=["stdlib_pair", "stdlib_tags", "stdlib_package"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    backbone = load("minilm")
    for name in arguments.tasks:
        task = load_task(name).limited(800, 300, 3)
        for seed in range(arguments.seeds):
            done = {(r["task"], r["method"], float(r["lr"]), int(r["seed"])) for r in measured()}
            plans = [
                Plan(
                    parse(method),
                    task,
                    seed,
                    Settings(lr=lr, steps=arguments.steps, evaluations=4, max_length=32),
                    f"{method} {lr:g}",
                )
                for method, rates in RATES.items()
                for lr in rates
                if (name, method, lr, seed) not in done
            ]
            if not plans:
                continue
            trained = fit_plans(backbone, plans, open_test=False)
            new = not OUT.exists()
            with OUT.open("a", newline="") as stream:
                writer = csv.DictWriter(stream, FIELDS, delimiter="\t", lineterminator="\n")
                if new:
                    writer.writeheader()
                for result in trained:
                    method, lr = result.plan.label.rsplit(maxsplit=1)
                    writer.writerow(
                        {"task": name, "method": method, "lr": lr, "seed": seed, "dev": f"{result.dev_score:.4f}",
                         "state": result.state}
                    )  # fmt: skip
            print(f"{name}, seed {seed}: {len(trained)} trainings", flush=True)
    for method, lr in sorted(best_rates(measured()).items()):
        print(f"{method:20} {lr:g}")


if __name__ == "__main__":
    main()
