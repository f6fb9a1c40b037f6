"""The public surface, pinned: a change of it is a decision, not an accident."""

from __future__ import annotations

import deltatune as dt

SURFACE = [
    "Adapted",
    "Adapter",
    "Backbone",
    "BitFit",
    "Delta",
    "DeltatuneError",
    "DoRA",
    "Full",
    "Head",
    "IA3",
    "LNTuning",
    "LoRA",
    "OFT",
    "PTuning",
    "ParallelAdapter",
    "Prefix",
    "Prompt",
    "Task",
    "TrainableTokens",
    "UserError",
    "VeRA",
    "__version__",
    "adapt",
    "blend",
    "fit",
    "fit_many",
    "lerp",
    "load",
    "merge",
    "optimizer_groups",
    "parse",
    "soup",
    "task",
    "to_lora",
    "tune",
]


def test_names_are_these_and_all_load() -> None:
    assert sorted(dt.__all__) == SURFACE
    for name in SURFACE:
        assert getattr(dt, name) is not None, name


def test_every_public_thing_says_what_it_is() -> None:
    for name in SURFACE:
        if name != "__version__":
            assert (getattr(dt, name).__doc__ or "").strip(), f"{name} has no docstring"
            assert callable(getattr(dt, name)), f"{name} is hidden by a package of that name"
