"""Which precision the backbone computes in: a static rule."""

from __future__ import annotations

import pytest
import torch
from tests.fit.tiny import backbone, jobs_of, plan, task

from deltatune.errors import UserError
from deltatune.training.engine import working_copy
from deltatune.training.fit import fit_plans
from deltatune.training.settings import Settings, resolve_precision


@pytest.mark.parametrize(
    ("asked", "native", "held", "expected"),
    [
        ("auto", True, torch.float32, torch.bfloat16),
        ("auto", False, torch.float32, torch.float32),
        ("auto", True, torch.float64, torch.float64),
        ("auto", False, torch.bfloat16, torch.bfloat16),
        ("float32", True, torch.float32, torch.float32),
        ("float32", False, torch.bfloat16, torch.float32),
        ("bfloat16", False, torch.float32, torch.bfloat16),
    ],
)
def test_the_rule(asked, native, held, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert resolve_precision(asked, backbone(dtype=held)) == expected


def test_a_processor_that_only_emulates_bfloat16_is_not_asked_to(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert resolve_precision("auto", backbone()) == torch.float32


def test_the_working_copy_leaves_the_original_alone():
    on = backbone()
    assert working_copy(on, torch.float32) is on
    copy = working_copy(on, torch.bfloat16)
    assert {p.dtype for p in copy.module.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in on.module.parameters()} == {torch.float32}
    assert not {p.data_ptr() for p in copy.module.parameters()} & {p.data_ptr() for p in on.module.parameters()}


@pytest.mark.parametrize("method", ["lora", "adapter", "prefix(n=2)", "prompt(n=2)", "full"])
def test_deltas_and_heads_stay_float32_on_a_bfloat16_backbone(method):
    on = backbone()
    (trained,) = fit_plans(on, [plan(method, task(), 0, precision="bfloat16", lr=1e-3)])
    assert {value.dtype for value in trained.delta.tensors().values()} == {torch.float32}
    assert trained.delta.record["precision"] == "bfloat16" and trained.state == "done"
    # The delta carries the fingerprint of the backbone that was given, not of the copy.
    assert trained.delta.fingerprint == on.fingerprint()
    start = dict(jobs_of([plan(method)], on)[0].delta.state_dict().items())
    assert any(not torch.equal(start[name], value) for name, value in trained.delta.tensors().items())


def test_bfloat16_learns_what_float32_learns():
    data = task(name="many", rows=90)
    plans = [plan("adapter", data, seed, lr=1e-2, steps=60) for seed in (0, 1)]
    exact = fit_plans(backbone(), plans)
    rounded = fit_plans(
        backbone(), [plan("adapter", data, seed, lr=1e-2, steps=60, precision="bfloat16") for seed in (0, 1)]
    )
    for one, other in zip(exact, rounded, strict=True):
        assert other.curve[-1].loss == pytest.approx(one.curve[-1].loss, abs=0.1)
        assert other.dev_score == pytest.approx(one.dev_score, abs=0.26)


def test_one_fit_has_one_precision():
    with pytest.raises(UserError, match="give them the same precision"):
        fit_plans(backbone(), [plan("lora"), plan("adapter", precision="bfloat16")])


def test_an_unknown_precision_is_named():
    with pytest.raises(UserError, match="nearest: bfloat16"):
        Settings(precision="bfloat")  # type: ignore[arg-type]
