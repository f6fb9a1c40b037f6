"""Run as `python -m tests.fit.killed FOLDER SEED WHAT=ATTEMPTS...`: work done once whole and once killed, many times.

Everything is imported once; each attempt is a fork of this process, which never computes by itself. The last line
printed is a JSON record of the kills. What came out is in FOLDER/<what>/whole and FOLDER/<what>/killed: found.json,
found.safetensors, and the folder `out` that was written to.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tests.fit.tiny import QUICK, backbone, plan, task

from deltatune.studies.verbs import run_plans
from deltatune.training import checkpoint
from deltatune.training.budget import Budget
from deltatune.training.fit import Trained, fit_plans
from deltatune.training.tune import tune

ONE, OTHER = task(name="one", rows=30), task("pair_classification", name="other", rows=30, longest=12)
LONG = dataclasses.replace(QUICK, steps=30, evaluations=15)
PLANS = [
    plan("lora(dropout=0.3)", ONE, 0, LONG),
    plan("lora(dropout=0.3)", ONE, 1, LONG),
    plan("adapter | prompt(n=2)", OTHER, 0, LONG, weight_decay=0.1),
    plan("prefix(n=2)", OTHER, 1, LONG, patience=3),
    plan("bitfit", ONE, 2, LONG, lr=1e30, head_lr=1e30, clip=1e30),  # diverges
    plan("full", ONE, 3, LONG, lr=1e-3, steps=17),
]


def found_of(trained: list[Trained]) -> dict[str, Any]:
    """Everything of the result that has to be the same."""
    return {
        t.plan.name: [t.metrics, [dataclasses.asdict(p) for p in t.curve], t.state, t.steps, t.tokens, t.best_step,
                      t.dev and [t.dev.values, t.dev.confidence], t.test and [t.test.values, t.test.confidence]]
        for t in trained
    }  # fmt: skip


def write(place: Path, trained: list[Trained], more: Any = None) -> None:
    tensors = {f"{t.plan.name}:{name}": value for t in trained for name, value in t.delta.tensors().items()}
    safetensors.torch.save_file({name: value.clone() for name, value in tensors.items()}, place / "found.safetensors")
    (place / "found.json").write_text(json.dumps([found_of(trained), more]))


def fitted(place: Path) -> None:
    write(place, fit_plans(backbone(), PLANS, folder=place / "out"))


def verb(place: Path) -> None:
    write(place, run_plans(backbone(), PLANS[:2], out=place / "out").trained)


def tuned(place: Path) -> None:
    settings = dataclasses.replace(QUICK, steps=None, lr=None)
    made = tune(backbone(), ONE, Budget(steps=450), settings=settings, seeds=2, folder=place / "out")
    facts = [[c.label, c.lr, c.rung, c.steps, c.dev, c.state] for c in made.candidates]
    write(place, made.trained, [facts, made.chosen, made.second])


WORK: dict[str, Callable[[Path], None]] = {"fit": fitted, "verb": verb, "tune": tuned}


def fork(work: Callable[[Path], None], place: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Start an attempt and return its process id; it ends with status 0 when the work is done."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        prepare()
        work(place)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(pid: int, *, block: bool = False) -> int | None:
    """The exit status of an attempt, minus the signal if it was killed; None while it runs."""
    done, status = os.waitpid(pid, 0 if block else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_while_writing(number: int, instant: str) -> Callable[[], None]:
    """Die in the `number`-th write of a checkpoint: half-way through the file, before the rename, or after it."""

    def prepare() -> None:
        save, replace, count = safetensors.torch.save_file, os.replace, [0]

        def saving(tensors: Any, file: Any, metadata: Any = None) -> None:
            save(tensors, file, metadata)
            count[0] += 1
            if count[0] == number and instant == "half":
                os.truncate(file, Path(file).stat().st_size // 2)
                die()

        def replacing(source: Any, target: Any) -> None:
            if count[0] == number and instant == "before":
                die()
            replace(source, target)
            if count[0] == number and instant == "after":
                die()

        safetensors.torch.save_file, os.replace = saving, replacing

    return prepare


def written(place: Path) -> int:
    """When a checkpoint was written last."""
    return max((file.stat().st_mtime_ns for file in (place / "out").rglob("*.safetensors")), default=0)


def killed_often(work: Callable[[Path], None], folder: Path, rng: random.Random, attempts: int) -> list[str]:
    """Do the work whole and killed, and say how it was killed."""
    whole, killed = folder / "whole", folder / "killed"
    whole.mkdir(parents=True)
    killed.mkdir()
    started = time.monotonic()
    assert ended(fork(work, whole), block=True) == 0
    took = time.monotonic() - started
    kills: list[str] = []
    for number, instant in ((1, "half"), (1, "before"), (2, "after"), (2, "before"), (3, "half")):
        assert ended(fork(work, killed, dies_while_writing(number, instant)), block=True) == -signal.SIGKILL
        kills.append(f"{instant} the end of write {number}")
    attempt = 0
    while attempt < attempts:
        pid, before = fork(work, killed), written(killed)
        if attempt % 2:  # some at any time, some once it has come further than the last
            while written(killed) == before and ended(pid) is None:
                time.sleep(0.002)
            time.sleep(rng.random() * took / 40)
        else:
            time.sleep(rng.random() * took / 4)
        if not kill(pid):
            # It ended before its time, as on a machine that has become faster since: once more from the start.
            same(whole, killed)
            shutil.rmtree(killed)
            killed.mkdir()
            continue
        kills.append(f"attempt {attempt}, {'further' if written(killed) > before else 'no further'} than before")
        attempt += 1
    assert ended(fork(work, killed), block=True) == 0
    return kills


def kill(pid: int) -> bool:
    """Kill an attempt; say whether it was still at work."""
    try:
        os.kill(pid, signal.SIGKILL)
        return ended(pid, block=True) == -signal.SIGKILL
    except (ProcessLookupError, ChildProcessError):
        return False


def same(whole: Path, killed: Path) -> None:
    """Assert that killed work ended as the whole one."""
    assert (killed / "found.json").read_text() == (whole / "found.json").read_text()
    assert (killed / "found.safetensors").read_bytes() == (whole / "found.safetensors").read_bytes()


def main(folder: Path, seed: int, wanted: list[str]) -> None:
    torch.set_num_threads(1)
    for name in ("sklearn.linear_model", "sklearn.metrics", "matplotlib.pyplot"):
        importlib.import_module(name)  # once, not in every fork
    backbone()  # imports the rest
    checkpoint.EVERY = 0.0
    rng = random.Random(seed)
    parts = (one.split("=") for one in wanted)
    kills = {what: killed_often(WORK[what], folder / what, rng, int(number)) for what, number in parts}
    print(json.dumps(kills))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
