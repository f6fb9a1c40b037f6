"""Checkpointing that is switched on at the network itself, before or after it is adapted; the laws have the rest."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tests.engine.subjects import SPECS, adapted, subject
from torch import Tensor

from deltatune.laws.subject import gradients, score


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("text", SPECS)
def test_switched_on_at_the_backbone(text: str, family: str) -> None:
    held = subject(text, family)
    rows, route = held.rows(4), ["one", "two", None, "one"]

    def run(when: str) -> tuple[dict[str, Tensor | None], int]:
        on, starts = held.fresh(), 0

        def switch() -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # it has a newer name, too
                module: Any = on.module
                module.gradient_checkpointing_enable()

        def count(*_: Any) -> None:
            nonlocal starts
            starts += 1

        if when == "before":
            switch()
        model = adapted(text, on, "one", "two")
        if when == "after":
            switch()
        model.train()
        inside = next(site.exit for site in on.anatomy.sites if site.name == "attn.q" and site.block == 1)
        on.module.get_submodule(inside).register_forward_pre_hook(count)
        with model.using(route):
            outputs = held.cut(model(**held.batch(rows)), rows)
        with torch.no_grad():
            held.run(model, rows, "two")
        score(outputs, rows).backward()
        return gradients(model.bank), starts

    wanted, once = run("never")
    for when in ("before", "after"):
        found, twice = run(when)
        assert twice == once + 1  # recomputed
        for name, gradient in wanted.items():
            assert (found[name] is None) == (gradient is None), name
            if gradient is not None:
                torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)
