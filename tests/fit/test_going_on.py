"""A saved delta is trained on from where it is."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.fit.tiny import QUICK, backbone, furthest, plan, same_bits, task

import deltatune as dt
from deltatune.delta.delta import Delta
from deltatune.errors import BackboneMismatch
from deltatune.studies.verbs import plans_of
from deltatune.training.checkpoint import identity
from deltatune.training.fit import fit_plans
from deltatune.training.job import make_jobs

SPEC = "lora(r=2) | bitfit"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "first"
    (trained,) = fit_plans(backbone(), [plan(SPEC)])
    trained.delta.save(folder)
    return str(folder)


def test_a_job_begins_with_the_saved_tensors(saved):
    on, delta = backbone(), Delta.load(saved)
    (again,) = plans_of(saved, task(), [0], QUICK)
    (job,) = make_jobs([again], on, on)
    assert same_bits(job.delta.state_dict(), delta.state_dict())  # the head, too: it answers the same question
    (fresh,) = make_jobs([plan(SPEC)], on, on)
    assert not same_bits(job.delta.state_dict(), fresh.delta.state_dict())


def test_a_head_of_other_labels_is_made_anew(saved):
    on, delta = backbone(), Delta.load(saved)
    other = dataclasses.replace(task("pair_classification"), name="other")
    (again,) = plans_of(delta, other, [0], QUICK)
    (job,) = make_jobs([again], on, on)
    assert same_bits(job.delta.layers.state_dict(), delta.layers.state_dict())
    assert job.head.arguments != delta.head.arguments
    assert again.label == f"{SPEC} from {delta.name}"


def test_labels_that_came_later_are_added_to_the_head(saved):
    on, delta = backbone(), Delta.load(saved)
    more = [*task().train, {"text": "w1 w2 w3", "label": "awful"}]
    wider = dataclasses.replace(task(), name="wider", train=more, labels=("awful", *task().labels))
    (again,) = plans_of(delta, wider, [0], QUICK)
    (job,) = make_jobs([again], on, on)
    assert job.delta.head is job.head and job.head.labels == ("bad", "fine", "good", "awful")
    assert torch.equal(job.head.linear.weight[:3], delta.head.linear.weight)
    assert {e.target for e in job.train} == {0, 1, 2, 3} and job.train[-1].target == 3
    assert delta.head.labels == ("bad", "fine", "good")


def test_training_goes_on_from_there(saved):
    start = Delta.load(saved)
    runs = dt.fit(
        backbone(), saved, task(), steps=8, batch=4, evaluations=1, precision="float32", lr=1e-6, head_lr=1e-6
    )
    # At a rate of next to nothing it stays where it began, which is not where a fresh one is.
    assert furthest(dict(runs.delta.state_dict()), dict(start.state_dict())) < 1e-4
    assert runs.results[0]["runs"][0]["delta"] == saved


def test_a_checkpoint_knows_where_a_training_began(saved):
    on = backbone()
    (fresh,), (again,) = [plan(SPEC)], plans_of(saved, task(), [0], QUICK)
    moved = Delta.load(saved)
    next(moved.layers.parameters()).data.add_(1e-3)
    (other,) = plans_of(moved, task(), [0], QUICK)
    same = [dataclasses.replace(one, label="it") for one in (fresh, again, other)]
    assert len({identity([one], on) for one in same}) == 3


def test_on_another_backbone_it_is_refused(saved):
    with pytest.raises(BackboneMismatch):
        dt.fit(backbone("roberta"), saved, task(), steps=2)
