"""What can be wrong with a saved delta that seems to do nothing: each check looks at one thing and says how to mend it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deltatune.errors import BackboneError, BackboneMismatch, SiteError

if TYPE_CHECKING:
    from torch import Tensor

    from deltatune.backbone.load import Backbone
    from deltatune.delta.delta import Delta
    from deltatune.delta.layer import Layer

SENTENCES = (
    "Arrived broken, and nobody answered my letters.",
    "The best thing that I have bought this year!",
    "It opens on Mondays at nine.",
    "Which of the two is cheaper, the red one or the blue one?",
)
TINY = 1e-3  # change of the hidden states, relative to their norm, below which no head notices
HUGE = 10.0
UNEVEN = 100.0  # times the median norm of the other sites of the same kind


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: a fixed code, what was found, what to do."""

    code: str
    what: str
    fix: str


@dataclass
class Diagnosis:
    """All findings, and the change of the hidden states that the delta makes on a few sentences.

    `largest` is the largest difference of a hidden value, `relative` the norm of all differences over that of the hidden
    states; both None if there was no backbone to try it on.
    """

    findings: list[Finding] = field(default_factory=list)
    largest: float | None = None
    relative: float | None = None

    @property
    def healthy(self) -> bool:
        """Whether nothing was found."""
        return not self.findings


def diagnose(delta: Delta, backbone: str) -> Diagnosis:
    """Look at a delta by itself, then on the backbone of that name."""
    found = Diagnosis([*_head(delta), *_numbers(delta)])
    if not delta.layers:
        found.findings.append(
            Finding("no-layers", "the delta has no layer at any site: it is a head on frozen features",
                    "fit one that has, such as --delta lora")
        )  # fmt: skip
        return found
    broken = any(one.code == "not-a-number" for one in found.findings)
    at_rest = [] if broken else list(_at_rest(delta))
    found.findings += [*at_rest, *_uneven(delta)]
    loaded = _loaded(delta, backbone, found.findings)
    if loaded is not None and not broken:
        _try(delta, loaded, found, quiet=any(one.code == "at-identity" for one in at_rest))
    return found


def _head(delta: Delta) -> Iterator[Finding]:
    if delta.head is None:
        yield Finding(
            "no-head", "the delta has no head, so it predicts nothing by itself",
            "make it with `deltatune fit`, or use it with your own head through dt.adapt",
        )  # fmt: skip


def _numbers(delta: Delta) -> Iterator[Finding]:
    bad = [name for name, value in delta.tensors().items() if not bool(value.isfinite().all())]
    if bad:
        more = f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        yield Finding(
            "not-a-number", f"{bad[0]}{more} hold values that are no numbers: the training diverged",
            "fit it again with a lower --lr, or with --precision float32",
        )  # fmt: skip


def _at_rest(delta: Delta) -> Iterator[Finding]:
    """A layer whose effect on a random input is nothing stands where it started."""
    acting = [(site.key, layer) for site, layer in delta.at_sites() if layer.port in ("input", "output")]
    resting = [key for key, layer in acting if effect(layer, delta.sites) == 0.0]
    if resting and len(resting) == len(acting):
        yield Finding(
            "at-identity", f"each of its {len(acting)} layers changes nothing (a factor of zero, such as B of a LoRA)",
            "it was saved before it was trained, or its rate was 0: fit it again, with more --steps or a higher --lr",
        )  # fmt: skip
    elif resting:
        yield Finding(
            "partly-at-identity", f"{len(resting)} of its {len(acting)} layers change nothing, the first at {resting[0]}",
            "no gradient reached them: leave those sites or blocks out with at= and blocks=",
        )  # fmt: skip


def effect(layer: Layer, _: Any = None) -> float:
    """Return the largest change that a layer makes to a random input."""
    import torch

    from deltatune.delta.layer import Params

    tensors = {name: layer.get_parameter(name).detach().double()[None] for name in layer.names()}
    params = Params({name: t[:, None] if t.ndim == 2 else t for name, t in tensors.items()})
    x, h = _inputs(layer)
    with torch.no_grad():
        return float((layer(params, x if layer.reads_input else None, h) - h).abs().max())


def _inputs(layer: Layer) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


def _uneven(delta: Delta) -> Iterator[Finding]:
    yield from ()


def _loaded(delta: Delta, name: str, findings: list[Finding]) -> Backbone | None:
    return None


def _try(delta: Delta, backbone: Backbone, found: Diagnosis, quiet: bool) -> None:
    return None
