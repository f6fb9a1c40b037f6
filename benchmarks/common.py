"""What the benchmarks share: tasks, interleaved timing, intervals, stored rows, and where results are written."""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from deltatune.data.load import load_task
from deltatune.data.task import Task
from deltatune.studies.verbs import write_json
from deltatune.training.fit import versions

ROOT = Path(__file__).parents[1]
# A folder with a folder of splits for each task, and TASKS.tsv, which states name and metric.
TASKS = Path(os.environ.get("DELTATUNE_TASKS", ROOT / "benchmarks" / "tasks"))
# Says only "f1" of one whose paper says of which label.
METRICS = {"tweet_irony": "f1_irony"}

Row = dict[str, Any]


class Ratio(NamedTuple):
    """A ratio of times with its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio(slow: Sequence[float], fast: Sequence[float], resamples: int = 10_000) -> Ratio:
    """Return the median over rounds of slow / fast and its percentile bootstrap interval (seed 0)."""
    quotients = np.asarray(slow, dtype=float) / np.asarray(fast, dtype=float)
    drawn = np.random.default_rng(0).choice(quotients, (resamples, len(quotients)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return Ratio(float(np.median(quotients)), float(low), float(high))


def plain(value: Any) -> Any:
    """Return ratios as plain data."""
    if isinstance(value, Ratio):
        return value._asdict()
    return {name: plain(one) for name, one in value.items()} if isinstance(value, dict) else value


def interleave(
    variants: Mapping[str, Callable[[int], object]], rounds: int, rows: Rows, key: Row
) -> dict[str, list[float]]:
    """Time the variants in turn, round after round, and return the seconds of each by round.

    A variant is called with the number of the round. Rounds that are stored already are not run again; before the first
    new one every variant runs once unmeasured.
    """
    done = {row["round"]: row["seconds"] for row in rows.matching(**key)}
    lacking = [number for number in range(rounds) if set(done.get(number, ())) != set(variants)]
    for run in variants.values() if lacking else ():
        run(rounds)
    for number in lacking:
        done[number] = {name: timed(run, number) for name, run in variants.items()}
        rows.add({**key, "round": number, "seconds": done[number]})
    return {name: [done[number][name] for number in range(rounds)] for name in variants}


def timed(run: Callable[[int], object], number: int) -> float:
    """Return the seconds of one run."""
    started = time.perf_counter()
    run(number)
    return time.perf_counter() - started


class Rows:
    """Measurements kept one JSON object a line, so that a stopped benchmark goes on.

    Rows of another machine, or of other versions, are not seen.
    """

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.file = options.results / f"{name}.rows.jsonl"
        if options.fresh:
            self.file.unlink(missing_ok=True)
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.machine = machine()
        self.rows = [row for row in map(json.loads, lines) if row["machine"] == self.machine]

    def matching(self, **key: Any) -> list[Row]:
        """Return the rows that have these values."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in key.items())]

    def add(self, row: Row) -> None:
        """Store a row at once."""
        self.rows.append(row)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as stream:
            stream.write(json.dumps({**row, "machine": self.machine}) + "\n")


def machine() -> dict[str, Any]:
    """Return what decides a speed: processor, cores, threads and versions."""
    import peft

    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "processor": model or platform.processor() or platform.machine(),
        "bfloat16": bool(torch.cpu._is_avx512_bf16_supported()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {**versions(), "peft": peft.__version__},
    }


def real_tasks() -> bool:
    """Whether the folder of real tasks is there."""
    return (TASKS / "TASKS.tsv").is_file()


def real_task(name: str) -> Task:
    """Load a real task with the metric that its table states."""
    with (TASKS / "TASKS.tsv").open(newline="") as stream:
        stated = {row["name"]: row["metric"] for row in csv.DictReader(stream, delimiter="\t")}
    return load_task(TASKS / name, metric=METRICS.get(name, stated[name]), unseen="drop")


def tasks(real: Sequence[str], embedded: Sequence[str]) -> list[Task]:
    """Load the real tasks, or where their folder is absent the embedded ones."""
    return [real_task(name) for name in real] if real_tasks() else [load_task(name) for name in embedded]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    made.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    made.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md", help="page with the tables")
    made.add_argument("--fresh", action="store_true", help="forget the stored rows and measure again")
    return made


def publish(name: str, text: str, result: Row, options: argparse.Namespace) -> None:
    """Print a benchmark's tables, put them into its block of the page, and write its result as JSON."""
    told = f"{text}\n\n{_where(machine())}"
    print(told)
    write_json(options.results / f"{name}.json", {"name": name, **result, "machine": machine()})
    begin, end = f"<!-- {name}: written by benchmarks/{name}.py -->", f"<!-- {name}: end -->"
    page = options.page.read_text() if options.page.exists() else ""
    if begin not in page:
        page = f"{page.rstrip()}\n\n{begin}\n{end}\n".lstrip()
    before, _, rest = page.partition(begin)
    after = rest.partition(end)[2]
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(f"{before}{begin}\n{told}\n{end}{after}")


def _where(found: Mapping[str, Any]) -> str:
    said = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    bfloat16 = "with" if found["bfloat16"] else "without"
    return (
        f"Measured on {found['processor']} ({bfloat16} bfloat16 instructions), {found['cores']} cores, "
        f"{found['threads']} threads; {said}."
    )


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; all columns but the first are right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def milliseconds(seconds: Sequence[float], parts: int = 1) -> str:
    """Say the median of some times, each of `parts` parts, in ms a part."""
    value = 1000 * statistics.median(seconds) / parts
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"
