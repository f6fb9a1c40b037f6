"""Checkpoints: whole or not at all, of this fit or refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import os

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from tests.fit.tiny import backbone, jobs_of, plan, same_bits, task, tensors

from deltatune.errors import OutputError
from deltatune.training import checkpoint
from deltatune.training.budget import Budget, Means, settled
from deltatune.training.engine import Engine, train
from deltatune.training.fit import fit_plans

PLANS = [plan("lora(dropout=0.2)"), plan("adapter", seed=1, patience=1), plan("head")]


def part_way(plans, on, steps):
    jobs = jobs_of(plans, on)
    engine = Engine(jobs, on)
    train(engine, lambda _: steps)
    engine.close()
    return jobs


def optimiser_of(job):
    return {f"{i}/{name}": torch.as_tensor(value) for i, entry in job.optimiser.state_dict()["state"].items()
            for name, value in entry.items()}  # fmt: skip


def state_of(job):
    fields = {field.name for field in dataclasses.fields(job)}
    return {name: getattr(job, name) for name in fields - {"plan", "delta", "head", "train", "optimiser", "best"}}


def test_all_state_comes_back(tmp_path):
    on = backbone()
    jobs = part_way(PLANS, on, 7)
    checkpoint.write(tmp_path, jobs, "me", {"finished": True})
    fresh = jobs_of(PLANS, on)
    assert checkpoint.read(tmp_path, fresh, "me") == {"finished": True}
    for job, again in zip(jobs, fresh, strict=True):
        assert job.step == 7 and job.best and job.curve and optimiser_of(job)
        assert state_of(again) == state_of(job)
        for part in (tensors, optimiser_of, lambda one: one.best):
            assert same_bits(part(again), part(job))


def test_without_a_checkpoint_nothing_is_read(tmp_path):
    (job,) = jobs_of(PLANS[:1], backbone())
    before = tensors(job)
    assert checkpoint.read(tmp_path, [job], "me") is None and checkpoint.read(tmp_path / "no", [job], "me") is None
    (tmp_path / ".state.safetensors.tmp").write_bytes(b"half of a fi")  # what a kill in the first write leaves
    assert checkpoint.read(tmp_path, [job], "me") is None
    assert same_bits(tensors(job), before)


class Killed(BaseException):
    """What nothing catches."""


def test_a_write_that_is_cut_off_leaves_the_one_before(tmp_path, monkeypatch):
    on = backbone()
    jobs = part_way(PLANS, on, 4)
    checkpoint.write(tmp_path, jobs, "me")
    old = (tmp_path / checkpoint.STATE).read_bytes()
    later = part_way(PLANS, on, 8)
    save = safetensors.torch.save_file

    def half(tensors, file, metadata=None):
        save(tensors, file, metadata)
        os.truncate(file, file.stat().st_size // 2)
        raise Killed

    def stop(*_):
        raise Killed

    for place, name, fault in ((safetensors.torch, "save_file", half), (os, "fsync", stop), (os, "replace", stop)):
        with monkeypatch.context() as patched:
            patched.setattr(place, name, fault)
            with pytest.raises(Killed):
                checkpoint.write(tmp_path, later, "me")
        assert (tmp_path / checkpoint.STATE).read_bytes() == old
        fresh = jobs_of(PLANS, on)
        assert checkpoint.read(tmp_path, fresh, "me") == {} and [job.step for job in fresh] == [4, 4, 4]
    checkpoint.write(tmp_path, later, "me")  # what is left over is in no one's way
    assert os.listdir(tmp_path) == [checkpoint.STATE]


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O: disk full")])
def test_a_full_disk_is_said_in_one_line_and_the_old_checkpoint_stays(fault, tmp_path, monkeypatch):
    jobs = part_way(PLANS[:1], backbone(), 2)
    checkpoint.write(tmp_path, jobs, "me")

    def full(tensors, file, metadata=None):
        file.write_bytes(b"part")
        raise fault

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(
        OutputError, match=r"cannot write .*state.safetensors: (No space left on device|I/O: disk full)$"
    ):
        checkpoint.write(tmp_path, jobs, "me")
    assert os.listdir(tmp_path) == [checkpoint.STATE]


def test_a_place_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        checkpoint.write(tmp_path / "file" / "in", jobs_of(PLANS[:1], backbone()), "me")


@pytest.mark.parametrize("harm", ["cut", "bytes", "empty"])
def test_a_damaged_checkpoint_is_refused(harm, tmp_path):
    jobs = part_way(PLANS[:1], backbone(), 2)
    checkpoint.write(tmp_path, jobs, "me")
    file = tmp_path / checkpoint.STATE
    data = file.read_bytes()
    file.write_bytes({"cut": data[:-9], "bytes": b"\xff" * 64 + data[64:], "empty": b""}[harm])
    with pytest.raises(OutputError, match="is damaged .*; remove .* to begin again"):
        checkpoint.read(tmp_path, jobs, "me")


def unfinished(folder, monkeypatch):
    """Leave a fit of PLANS unfinished in a folder."""
    monkeypatch.setattr(checkpoint, "EVERY", 0.0)

    def stop(jobs, event):
        if jobs[0].step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_plans(backbone(), PLANS, folder=folder, listener=stop)
    assert (folder / ".checkpoint" / checkpoint.STATE).is_file()


OTHERS = {
    "another delta": [plan("lora(r=4, dropout=0.2)"), *PLANS[1:]],
    "another label": [dataclasses.replace(PLANS[0], label="mine"), *PLANS[1:]],
    "another seed": [PLANS[0], plan("adapter", seed=2, patience=1), PLANS[2]],
    "another setting": [PLANS[0], plan("adapter", seed=1, patience=2), PLANS[2]],
    "another order": PLANS[::-1],
    "fewer": PLANS[:2],
    "more": [*PLANS, plan("bitfit")],
    "other data": [plan("lora(dropout=0.2)", task(seed=7)), *PLANS[1:]],
    "another template": [
        dataclasses.replace(PLANS[0], task=dataclasses.replace(task(), template="{text} ?")),
        *PLANS[1:],
    ],
    "another metric": [dataclasses.replace(PLANS[0], task=dataclasses.replace(task(), metric="macro_f1")), *PLANS[1:]],
}


def test_a_fit_that_was_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
    unfinished(tmp_path, monkeypatch)
    steps = []
    trained = fit_plans(backbone(), PLANS, folder=tmp_path, listener=lambda jobs, _: steps.append(jobs[0].step))
    assert steps == [9, 10, 11, 12]  # the checkpoint was of step 8
    straight = fit_plans(backbone(), PLANS)
    assert all(same_bits(a.delta.tensors(), b.delta.tensors()) for a, b in zip(trained, straight, strict=True))
    again = fit_plans(backbone(), PLANS, folder=tmp_path, listener=lambda *_: pytest.fail("nothing is left to train"))
    assert all(same_bits(a.delta.tensors(), b.delta.tensors()) for a, b in zip(again, straight, strict=True))
    assert [t.metrics for t in again] == [t.metrics for t in straight]


@pytest.mark.parametrize("other", OTHERS)
def test_the_checkpoint_of_another_fit_is_refused(other, tmp_path, monkeypatch):
    unfinished(tmp_path, monkeypatch)
    before = (tmp_path / ".checkpoint" / checkpoint.STATE).read_bytes()
    with pytest.raises(OutputError, match=r"holds an unfinished fit of other deltas, .*; finish that one .* --out"):
        fit_plans(backbone(), OTHERS[other], folder=tmp_path)
    assert (tmp_path / ".checkpoint" / checkpoint.STATE).read_bytes() == before


def test_another_backbone_or_number_of_threads_is_refused(tmp_path, monkeypatch):
    unfinished(tmp_path, monkeypatch)
    moved = backbone()
    with torch.no_grad():
        next(moved.module.parameters())[0, 0] += 1e-3
    with pytest.raises(OutputError, match="unfinished fit"):
        fit_plans(moved, PLANS, folder=tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    with pytest.raises(OutputError, match="unfinished fit"):
        fit_plans(backbone(), PLANS, folder=tmp_path)


def test_a_search_by_the_clock_is_resumed_with_what_it_measured_first(tmp_path):
    first, other = Means(60.0, 55.5, 0.25, 1.5, 2.0), Means(60.0, 50.0)
    measured = iter([first, other])
    assert settled(tmp_path, Budget(seconds=60), lambda: next(measured)) == first
    assert settled(tmp_path, Budget(seconds=60), lambda: next(measured)) == first
    with pytest.raises(OutputError, match="holds an unfinished search of 60 s"):
        settled(tmp_path, Budget(seconds=90), lambda: next(measured))
    assert json.loads((tmp_path / "budget.json").read_text())["left"] == 55.5
    assert settled(None, Budget(seconds=60), lambda: next(measured)) == other
