"""Checkpoints: all state of a fit, written whole or not at all, so that a killed fit ends as an unkilled one would.

One file, replaced by a rename: there is no instant without a whole checkpoint, the old one or the new one. What a job
draws depends on (task, seed, step) alone, so there is no state of a random generator to keep.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from deltatune.backbone.load import Backbone
from deltatune.data.task import Task
from deltatune.delta.files import spec_record
from deltatune.errors import OutputError
from deltatune.training.job import Job, Plan, Point

STATE = "state.safetensors"
EVERY = 20.0  # seconds; when it is written changes nothing in the result


def identity(plans: Sequence[Plan], backbone: Backbone) -> str:
    """Digest of everything that decides the result: plans, data, backbone."""
    said = {
        # A sketch is a sum in floating point, and its last bit may differ from one run to the next.
        "backbone": {name: value for name, value in backbone.fingerprint().items() if name != "sketch"},
        "threads": torch.get_num_threads(),
        "plans": [
            [spec_record(p.spec), p.task.fingerprint, *_worded(p.task), p.seed, p.settings.record(), p.label, _begun(p)]
            for p in plans
        ],
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _worded(task: Task) -> tuple[Any, ...]:
    """What decides the result and is not in a task's fingerprint."""
    return task.metric, task.template, dict(task.verbalizer) if task.verbalizer else None


def _begun(plan: Plan) -> str | None:
    """Digest of the tensors that a training goes on from."""
    if plan.start is None:
        return None
    digest = hashlib.sha256()
    for name, value in plan.start.tensors().items():
        digest.update(name.encode() + value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write(folder: Path, jobs: Sequence[Job], identity: str, extra: dict[str, Any] | None = None) -> None:
    """Replace the checkpoint in `folder` by the present state. OutputError if it cannot be written."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    records = []
    for number, job in enumerate(jobs):
        for name, value in job.delta.state_dict().items():
            tensors[f"{number}/now/{name}"] = value
        for name, value in job.best.items():
            tensors[f"{number}/best/{name}"] = value
        optimiser = job.optimiser.state_dict()
        for index, entry in optimiser["state"].items():
            for name, value in entry.items():
                tensors[f"{number}/optimiser/{index}/{name}"] = torch.as_tensor(value)
        records.append(
            {
                "step": job.step, "steps": job.steps, "state": job.state,
                "curve": [asdict(point) for point in job.curve],
                "best_dev": job.best_dev, "best_step": job.best_step, "seconds": job.seconds, "tokens": job.tokens,
                "worse": job.worse, "losses": job.losses, "metrics": job.metrics,
            }
        )  # fmt: skip
    known = {key: value for job in jobs for key, value in job.references.known.items()}
    state = json.dumps({"identity": identity, "jobs": records, "references": known, "extra": extra or {}})
    copied = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with whole_file(folder / STATE) as work:
        save_file(copied, work, metadata={"state": state})


def keeper(folder: Path | None, jobs: Sequence[Job], identity: str) -> Callable[[], None]:
    """Return what writes the checkpoint when it is called, at most once every `EVERY` seconds; without a folder never.

    Called, it raises OutputError if the checkpoint cannot be written.
    """
    last = time.monotonic()

    def keep() -> None:
        nonlocal last
        if folder and time.monotonic() - last >= EVERY:
            write(folder, jobs, identity)
            last = time.monotonic()

    return keep


def read(folder: Path, jobs: Sequence[Job], identity: str) -> dict[str, Any] | None:
    """Put a checkpoint's state into fresh jobs and return its `extra`; None if there is no checkpoint.

    OutputError if it is damaged, or of another fit (other deltas, data, settings, backbone or number of threads).
    """
    from safetensors import SafetensorError, safe_open

    if not (folder / STATE).is_file():
        return None
    try:
        with safe_open(folder / STATE, "pt") as file:
            state = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise OutputError(f"{folder / STATE} is damaged ({error}); remove {folder} to begin again") from error
    if state["identity"] != identity:
        raise OutputError(
            f"{folder.parent} holds an unfinished fit of other deltas, data, settings, backbone or threads; "
            f"finish that one with its own command, or choose another --out"
        )
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        number, kind, rest = name.split("/", 2)
        parts.setdefault(f"{number}/{kind}", {})[rest] = value
    for number, (job, record) in enumerate(zip(jobs, state["jobs"], strict=True)):
        job.delta.load_state_dict(parts.get(f"{number}/now", {}))
        job.best = parts.get(f"{number}/best", {})
        job.curve = [Point(**point) for point in record.pop("curve")]
        for name, value in record.items():
            setattr(job, name, value)
        job.references.known.update(state["references"])
        _restore(job.optimiser, parts.get(f"{number}/optimiser", {}))
    return dict(state["extra"])


def _restore(optimiser: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    state = optimiser.state_dict()
    for name, value in tensors.items():
        index, field = name.split("/", 1)
        state["state"].setdefault(int(index), {})[field] = value
    optimiser.load_state_dict(state)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yield a file to write that becomes `target` when the block ends well. OutputError if it cannot be written."""
    from safetensors import SafetensorError

    work = target.with_name(f".{target.name}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield work
        with work.open("r+b") as stream:  # Windows flushes only what is open for writing
            os.fsync(stream.fileno())
        os.replace(work, target)
    except (OSError, SafetensorError) as error:  # the latter: its message for a full disk
        with suppress(OSError):
            work.unlink()
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {target}: {reason}") from error
