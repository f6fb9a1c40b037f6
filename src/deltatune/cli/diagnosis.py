"""What can be wrong with a saved delta that seems to do nothing: each check looks at one thing and says the fix."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deltatune.errors import BackboneError, BackboneMismatch, SiteError

if TYPE_CHECKING:
    from torch import Tensor

    from deltatune.backbone.load import Backbone
    from deltatune.backbone.sites import Site
    from deltatune.delta.adapted import Adapted
    from deltatune.delta.delta import Delta
    from deltatune.delta.layer import Layer

SENTENCES = (
    "Arrived broken, and nobody answered my letters.",
    "The best thing that I have bought this year!",
    "It opens on Mondays at nine.",
    "Which of the two is cheaper, the red one or the blue one?",
)
TINY = 1e-3  # change of the hidden states over their norm, below which no head notices
HUGE = 100.0  # change at one site over the norm of what it changes
UNEVEN = 100.0  # norm at one site over the median of its kind


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: a fixed code, what was found, what to do."""

    code: str
    what: str
    fix: str


@dataclass
class Diagnosis:
    """All findings, and what the delta does to the hidden states of a few sentences.

    `largest` is the largest difference of one value, `relative` the norm of all differences over that of the hidden
    states, `at_sites` the same ratio at each site; None and empty where there was no backbone to try it on.
    """

    findings: list[Finding] = field(default_factory=list)
    largest: float | None = None
    relative: float | None = None
    at_sites: dict[str, float] = field(default_factory=dict)

    def add(self, code: str, what: str, fix: str) -> None:
        """Note a finding."""
        self.findings.append(Finding(code, what, fix))

    def has(self, *codes: str) -> bool:
        """Whether one of these was found."""
        return any(one.code in codes for one in self.findings)


def diagnose(delta: Delta, backbone: str | None) -> Diagnosis:
    """Look at a delta by itself, then on a backbone: the one of this name, or (None) the one that the delta names.

    BackboneError if the backbone that was asked for cannot be loaded.
    """
    found = Diagnosis()
    found.findings += [*_head(delta), *_numbers(delta)]
    if not delta.layers:
        found.add(
            "no-layers",
            "the delta has no layer at any site: it is a head on frozen features",
            "that is all there is to the baseline `head`; fit a delta with layers, such as --delta lora",
        )
        return found
    if not found.has("not-a-number"):
        found.findings += [*_at_rest(delta), *_uneven(delta)]
    loaded = _loaded(delta, backbone, found)
    if loaded is not None and _fits(delta, loaded, found) and not found.has("not-a-number"):
        _try(delta, loaded, found)
    return found


def _head(delta: Delta) -> Iterator[Finding]:
    if delta.head is None:
        yield Finding(
            "no-head",
            "the delta has no head, so it predicts nothing by itself",
            "make it with `deltatune fit`, or use it with a head of yours through dt.adapt",
        )


def _numbers(delta: Delta) -> Iterator[Finding]:
    bad = [name for name, value in delta.tensors().items() if not bool(value.isfinite().all())]
    if bad:
        more = f" and {len(bad) - 1} more tensors hold" if len(bad) > 1 else " holds"
        yield Finding(
            "not-a-number",
            f"{bad[0]}{more} values that are no numbers: the training diverged",
            "fit it again with a lower --lr, or with --precision float32",
        )


def _at_rest(delta: Delta) -> Iterator[Finding]:
    """A layer that changes nothing on a random input stands where it started."""
    acting = [(site, layer) for site, layer in delta.at_sites() if layer.port in ("input", "output")]
    resting = [site.key for site, layer in acting if change(layer, site) == 0.0]
    if resting and len(resting) == len(acting):
        yield Finding(
            "at-identity",
            f"each of its {len(acting)} layers changes nothing: a factor is zero, such as B of a LoRA",
            "it was saved untrained, or its rate was 0: fit it again with more --steps or a higher --lr",
        )
    elif resting:
        yield Finding(
            "partly-at-identity",
            f"{len(resting)} of its {len(acting)} layers change nothing, the first at {resting[0]}",
            "no gradient reached them: leave those sites out with at= or those blocks with blocks=",
        )


def change(layer: Layer, site: Site) -> float:
    """Return the largest change that an activation layer makes to a random input, or to any token of a table."""
    import torch

    from deltatune.delta.layer import Params

    tensors = {name: layer.get_parameter(name).detach().float()[None] for name in layer.names()}
    params = Params({name: t[:, None] if t.ndim == 2 else t for name, t in tensors.items()})
    draw = torch.Generator().manual_seed(0)
    entries = [torch.randn(1, 5, site.d_in, generator=draw)]
    if layer.reads_ids:
        entries = list(torch.arange(site.words)[None, :, None].split(4096, dim=1))
    found = 0.0
    for x in entries:
        h = x if layer.port == "input" else torch.randn(1, x.shape[1], site.d_out, generator=draw)
        with torch.no_grad():
            found = max(found, float((layer(params, x if layer.reads_input else None, h) - h).abs().max()))
    return found


def _uneven(delta: Delta) -> Iterator[Finding]:
    kinds: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for site, layer in delta.at_sites():
        norm = sum(float(p.detach().cpu().double().square().sum()) for p in layer.parameters()) ** 0.5
        kinds.setdefault((type(layer).__name__, site.name), []).append((site.key, norm))
    for found in kinds.values():
        middle = statistics.median(norm for _, norm in found)
        far = [(key, norm) for key, norm in found if norm > UNEVEN * middle or norm * UNEVEN < middle]
        if len(found) >= 3 and far:
            yield Finding(
                "uneven-norms",
                f"the norm at {far[0][0]} is {far[0][1]:.3g}, at sites of its kind {middle:.3g}",
                "the training was not stable: fit it again with a lower --lr",
            )


def _loaded(delta: Delta, name: str | None, found: Diagnosis) -> Backbone | None:
    from deltatune.backbone.load import load

    try:
        return load(name or delta.backbone_name)
    except BackboneError as error:
        if name is not None:
            raise
        found.add("no-backbone", f"it names a backbone that is not here: {error}", "name it with --backbone")
        return None


def _fits(delta: Delta, backbone: Backbone, found: Diagnosis) -> bool:
    """Check weights, sites and head against the backbone; say whether the delta can be tried on it."""
    from deltatune.backbone.fingerprint import compare
    from deltatune.delta.attach import check_fits

    if delta.fingerprint and compare(delta.fingerprint, backbone.fingerprint()) == "different":
        found.add(
            "other-backbone",
            f"it was trained on other weights than {backbone.name} has (it names {delta.backbone_name})",
            "use the very backbone that it was trained on; what it does on another one means nothing",
        )
    width = getattr(delta.head, "width", backbone.width)
    if width != backbone.width:
        found.add(
            "head-width",
            f"its head reads states of width {width}, {backbone.name} has {backbone.width}",
            "use the backbone that it was trained on",
        )
    try:
        check_fits(delta, backbone, verify=False)
    except (BackboneMismatch, SiteError) as error:
        found.add("sites", str(error), f"`deltatune sites {backbone.name}` lists what this backbone has")
        return False
    return True


def _try(delta: Delta, backbone: Backbone, found: Diagnosis) -> None:
    """Run a few sentences with and without the delta, and watch each layer."""
    import torch

    from deltatune.delta.adapted import Adapted

    ran: dict[str, float] = {}
    watched = [(site, layer) for site, layer in delta.at_sites() if layer.port in ("input", "output")]
    hooks = [
        layer.register_forward_hook(
            lambda _, inputs, output, key=site.key: ran.update({key: max(ran.get(key, 0.0), _ratio(output, inputs[2]))})
        )
        for site, layer in watched
    ]
    try:
        with Adapted(backbone, [delta], verify=False) as adapted, torch.inference_mode():
            without, with_it = (_states(adapted, route) for route in (None, delta.name))
    finally:
        for hook in hooks:
            hook.remove()
    found.at_sites = ran
    found.largest, found.relative = float((with_it - without).abs().max()), _ratio(with_it, without)
    _judge(found, [site.key for site, _ in watched])


def _ratio(after: Tensor, before: Tensor) -> float:
    return float((after - before).float().norm() / before.float().norm().clamp(min=1e-12))


def _states(adapted: Adapted, route: str | None) -> Tensor:
    """What a head reads of the sentences, or of images of noise; without a head, what the backbone gives."""
    from deltatune.heads.pixels import noise

    source = adapted.source
    inputs: dict[str, Any]
    if source.reads == "images":
        inputs = {"pixel_values": noise(len(SENTENCES), source)}
    else:
        inputs = dict(source.processor(list(SENTENCES), return_tensors="pt", padding=True))
    inputs = {name: value.to(source.device) for name, value in inputs.items()}
    delta = adapted.bank[adapted.bank.names[0]]
    if delta.head is not None:
        return adapted.encode(inputs, deltas=route)
    if source.kind == "encoder-decoder":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    output = adapted(deltas=route, **inputs)
    states: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return states


def _judge(found: Diagnosis, watched: list[str]) -> None:
    assert found.largest is not None and found.relative is not None
    idle = [key for key in watched if key not in found.at_sites]
    if idle:
        found.add(
            "never-routed",
            f"{len(idle)} of its {len(watched)} layers never ran, the first at {idle[0]}: behind what the head reads",
            "choose sites before the last hidden states; on an encoder-decoder, in the encoder",
        )
    if not math.isfinite(found.largest):
        found.add("overflow", "hidden states under it are no numbers", "fit it again with a lower --lr")
    elif found.largest == 0.0 and not found.has("at-identity"):
        found.add(
            "no-effect", f"it changes no hidden state of {len(SENTENCES)} inputs", "fit it again, elsewhere (at=)"
        )
    elif 0.0 < found.relative < TINY:
        found.add(
            "tiny-effect",
            f"it changes the hidden states by {found.relative:.1e} of their norm",
            "fit it with more --steps or a higher --lr; `deltatune methods` lists the measured rates",
        )
    large = [(key, ratio) for key, ratio in found.at_sites.items() if ratio > HUGE]
    if large:
        found.add(
            "huge-effect",
            f"at {large[0][0]} it adds {large[0][1]:.3g} times the norm of what is there ({len(large)} such sites)",
            "fit it again with a lower --lr",
        )
