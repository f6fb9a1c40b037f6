"""What a case of the silent dozen is, and how its two sides are measured."""

from __future__ import annotations

import logging
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltatune.backbone.load import Backbone
from deltatune.delta.delta import Delta
from deltatune.errors import DeltatuneError
from deltatune.laws.families import inputs, tiny

EXACT = 1e-4  # float32 on tiny models: rounding is a hundredth of it, a fault several thousand times as large

Verdict = Literal["right", "refused", "warned", "wrong"]


@dataclass(frozen=True)
class Measured:
    """What a call gave.

    `off` is the greatest distance of its output from the right one, which is computed another way; `scale` what the
    delta moves the right output by. `warned` counts warnings, `refused` is the error's line; an error has no `off`.
    """

    off: float = 0.0
    scale: float = 0.0
    warned: int = 0
    refused: str = ""

    @property
    def verdict(self) -> Verdict:
        """Whether the caller got what was asked for, or was told."""
        if self.refused:
            return "refused"
        return "right" if self.off <= EXACT else "warned" if self.warned else "wrong"


@dataclass(frozen=True)
class Case:
    """An ordinary call of another library, what its caller takes for granted, and the same asked of deltatune."""

    name: str
    library: str
    call: str
    expected: str
    right: str
    note: str
    ours: Callable[[], Measured]
    theirs: Callable[[], Measured] | None = None


def distance(one: Tensor, other: Tensor) -> float:
    """The greatest difference of two outputs."""
    return float((one - other).abs().max())


def first(module: Any, family: str = "bert", **more: Any) -> Tensor:
    """The first output on the family's batch of four rows."""
    with torch.no_grad():
        found: Tensor = module(**inputs(family), **more)[0]
    return found


def bare(family: str = "bert") -> Tensor:
    """The output of the backbone alone."""
    return first(tiny(family), family)


def stirred(model: nn.Module, word: str, seed: int) -> None:
    """Move the parameters whose names have a word away from their start, as training would."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if word in name:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=draw))


class _Heard(logging.Handler):
    """Keeps what a library logs to its user; the same record comes here by several loggers."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record not in self.records:
            self.records.append(record)


def counted(call: Callable[[], Any]) -> tuple[Any, int]:
    """The result of a call, and how many warnings there were, logged or raised; deprecations are for developers."""
    heard = _Heard()
    logs = [logging.getLogger(), logging.getLogger("peft"), logging.getLogger("transformers")]
    for log in logs:
        log.addHandler(heard)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = call()
    finally:
        for log in logs:
            log.removeHandler(heard)
    said = [one for one in caught if not issubclass(one.category, DeprecationWarning | FutureWarning)]
    return found, len(said) + len(heard.records)


def attempted(call: Callable[[], Measured]) -> Measured:
    """What a call of ours measures, or the line with which it is refused."""
    try:
        return call()
    except DeltatuneError as error:
        return Measured(refused=re.sub(rf"{re.escape(tempfile.gettempdir())}/\w+", "FOLDER", str(error)))


def with_changes(family: str, changes: dict[str, Tensor]) -> Tensor:
    """The output of the backbone with these changes added to its weights: LoRA by hand."""
    module = tiny(family)
    with torch.no_grad():
        for name, change in changes.items():
            module.get_parameter(name).add_(change)
    return first(module, family)


def read(folder: str, backbone: Backbone, name: str) -> Delta:
    """A PEFT folder as a delta of ours, under a name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the backbone cannot be verified
        delta = Delta.load(folder, backbone)
    delta.name = name
    return delta
