"""What a fit is asked to do, and the static rules that fill in what was left open."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch

from deltatune.backbone.load import Backbone
from deltatune.errors import UnknownName, UserError
from deltatune.training.weights import ClassWeights

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Settings:
    """Settings of one training.

    lr             learning rate; None: the method's measured default
    steps          optimiser steps; None: `epochs` times the training rows
    batch          examples in a logical batch
    warmup         share of the steps over which the rate rises; it then falls linearly to zero
    clip           largest gradient norm of a delta and its head
    patience       evaluations without a better dev score before a training stops; None: never
    evaluations    dev evaluations over the whole training
    max_length     longest input in tokens
    dev_rows       dev rows looked at during training (all of them once at the end)
    probe          whether the head starts from a logistic regression on the frozen features, or at random
    precision      of the backbone: deltas and heads are float32 always
    tokens         most tokens of one physical batch
    class_weights  what each label weighs in the loss, 1 where not named: {label: weight}, or "balanced"; None: all the
                   same. Rows weigh by themselves where the task has a field `weight`
    """

    lr: float | None = None
    head_lr: float | None = None
    steps: int | None = None
    epochs: float = 3.0
    batch: int = 16
    warmup: float = 0.06
    weight_decay: float = 0.0
    clip: float = 1.0
    patience: int | None = None
    evaluations: int = 6
    max_length: int = 128
    dev_rows: int = 500
    probe: bool = True
    precision: Precision = "auto"
    tokens: int = 4096
    class_weights: ClassWeights | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "evaluations", "max_length", "tokens", "dev_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected 1 or more")
        for name in ("steps", "patience"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected 1 or more")
        for name in ("lr", "head_lr", "epochs", "clip"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)}: expected a number above 0")
        if not 0 <= self.warmup <= 1:
            raise UserError(f"warmup={self.warmup}: expected a share of the steps, 0 to 1")
        if not self.weight_decay >= 0:
            raise UserError(f"weight_decay={self.weight_decay}: expected 0 or more")
        if self.precision not in get_args(Precision):
            raise UnknownName("precision", self.precision, get_args(Precision))

        if isinstance(self.class_weights, str) and self.class_weights != "balanced":
            raise UnknownName("class_weights", self.class_weights, ["balanced"], "or give a weight for each label")
        if isinstance(self.class_weights, Mapping):
            for label, weight in self.class_weights.items():
                if not (weight >= 0 and math.isfinite(weight)):
                    raise UserError(f"class_weights: {label!r} has {weight}; expected 0 or more")

    def total_steps(self, rows: int) -> int:
        """Number of optimiser steps for so many training rows."""
        return self.steps or max(1, round(self.epochs * rows / self.batch))

    def record(self) -> dict[str, Any]:
        """The settings as plain data."""
        return asdict(self)


def resolve_precision(precision: Precision, backbone: Backbone) -> torch.dtype:
    """Return the dtype of the working backbone.

    Static rule: bfloat16 where the processor or the GPU multiplies it natively, else float32.
    """
    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    if backbone.device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = backbone.device.type == "cpu" and _cpu_has_bfloat16()
    return torch.bfloat16 if native and backbone.dtype == torch.float32 else backbone.dtype


def _cpu_has_bfloat16() -> bool:
    # mkldnn also says yes where it only emulates: ask for the instructions themselves.
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe()) if probe is not None else False


def rate(step: int, steps: int, warmup: float) -> float:
    """Multiplier of the learning rate at `step` (from 0): a linear rise, then a linear fall to zero."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return max(0.0, (steps - step) / max(1, steps - rise))
