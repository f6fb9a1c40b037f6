"""What the engine is run under everything with: the methods of each port, and a composition of three."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.compose.expression import parse
from deltatune.delta.adapted import Adapted
from deltatune.laws.families import tiny
from deltatune.laws.subject import Row, Subject, gradients, made, score

SPECS = (
    "lora(r=2)", "adapter(m=3)", "prefix(n=3)", "prompt(n=3)", "ia3", "bitfit", "dora(r=2)", "oft(b=8)",
    "lora(r=2, at='embed')", "lora(r=2) | prefix(n=2) | ia3",
)  # fmt: skip


def subject(text: str, family: str = "bert") -> Subject:
    """A method on a tiny random backbone."""
    return Subject(parse(text), Backbone(tiny(family), name=family))


def adapted(text: str, on: Backbone, *names: str, **options: Any) -> Adapted:
    """A backbone with deltas of one kind (one that is called `one` if no names are given), moved off their start."""
    spec = parse(text)
    return Adapted(on, [made(spec, on, name, seed=seed) for seed, name in enumerate(names or ("one",))], **options)


def backward(model: Adapted, outputs: Sequence[Tensor], rows: Sequence[Row]) -> dict[str, Tensor | None]:
    """Gradients of the bank for a fixed loss of these outputs; none are left from before."""
    model.bank.zero_grad()
    score(outputs, rows).backward()
    return gradients(model.bank)


def close(got: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float = 1e-9) -> None:
    """Assert that rows agree one by one, relative to the larger of 1 and the greatest value."""
    for one, other in zip(got, wanted, strict=True):
        scale = max(1.0, float(other.detach().abs().max()))
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale)
