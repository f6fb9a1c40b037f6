"""Checkpoints: all state of a fit, written whole or not at all, so that a killed fit ends as an unkilled one would.

What a job draws depends on (task, seed, step) alone, so there is no state of a random generator to keep.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from deltatune.backbone.load import Backbone
from deltatune.delta.files import spec_record, whole_folder
from deltatune.errors import OutputError
from deltatune.fit.job import Job, Plan, Point

STATE, TENSORS = "state.json", "state.safetensors"


def identity(plans: Sequence[Plan], backbone: Backbone) -> str:
    """Digest of everything that decides the result: plans, data, backbone."""
    said = {
        "backbone": backbone.fingerprint(),
        "threads": torch.get_num_threads(),
        "plans": [
            [spec_record(p.spec), p.task.fingerprint, p.task.metric, p.seed, p.settings.record(), p.label]
            for p in plans
        ],
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


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
                "step": job.step, "state": job.state, "curve": [asdict(point) for point in job.curve],
                "best_dev": job.best_dev, "best_step": job.best_step, "seconds": job.seconds, "tokens": job.tokens,
                "worse": job.worse, "losses": job.losses, "metrics": job.metrics,
            }
        )  # fmt: skip
    with whole_folder(folder) as work:
        save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, work / TENSORS)
        (work / STATE).write_text(json.dumps({"identity": identity, "jobs": records, "extra": extra or {}}))


def read(folder: Path, jobs: Sequence[Job], identity: str) -> dict[str, Any] | None:
    """Put a checkpoint's state into fresh jobs and return its `extra`; None if there is no checkpoint.

    OutputError if it belongs to another fit (other deltas, data, settings, backbone or number of threads).
    """
    from safetensors.torch import load_file

    if not (folder / STATE).is_file():
        return None
    state = json.loads((folder / STATE).read_text())
    if state["identity"] != identity:
        raise OutputError(
            f"{folder.parent} holds an unfinished fit of other deltas, data, settings, backbone or threads; "
            f"finish that one with its own command, or choose another --out"
        )
    tensors = load_file(folder / TENSORS)
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
        _restore(job.optimiser, parts.get(f"{number}/optimiser", {}))
    return dict(state["extra"])


def _restore(optimiser: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    state = optimiser.state_dict()
    for name, value in tensors.items():
        index, field = name.split("/", 1)
        state["state"].setdefault(int(index), {})[field] = value
    optimiser.load_state_dict(state)
