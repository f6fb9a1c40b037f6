"""Laws about one delta: what it changes, what it trains, where it may stand, how it is scaled and merged."""

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.backbone.blocks import linear_shape
from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import VOCABULARY, Site
from deltatune.backbone.weights import linear_at, read_linear
from deltatune.delta.adapted import Adapted
from deltatune.delta.layer import DeepTokenLayer, Layer, Params, SpanningLayer, own_params
from deltatune.delta.merge import merge
from deltatune.delta.method import Method
from deltatune.errors import RoutingError, SiteError, UserError
from deltatune.laws.subject import Subject, agree, agree_rows, demand, gradients, made, same_bits, score


def identity_at_init(subject: Subject) -> None:
    """A fresh delta changes nothing if its layers say so, and something if they do not."""
    backbone = subject.fresh()
    rows = subject.rows(3)
    delta = made(subject.spec, backbone, move=False)
    adapted = Adapted(backbone, [delta])
    bare, fresh = subject.run(adapted, rows, None), subject.run(adapted, rows, "subject")
    if all(layer.identity_at_init for _, layer in delta.at_sites()):
        agree_rows(fresh, bare, "declared the identity at its start, but the output")
    else:
        apart = max(float((a - b).detach().abs().max()) for a, b in zip(fresh, bare, strict=True))
        demand(apart > 1e-6, "declared not the identity at its start, but the output is the bare backbone's")


def only_the_delta_learns(subject: Subject) -> None:
    """After two steps every parameter of the delta has had a gradient, and none of the backbone's has moved."""
    backbone = subject.fresh()
    before = {name: p.detach().clone() for name, p in backbone.module.named_parameters()}
    delta = made(subject.spec, backbone, move=False)
    adapted = Adapted(backbone, [delta])
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    own = {f"bank.{name}" for name, _ in adapted.bank.named_parameters()}
    demand(trained == own, f"trainable beside the delta: {sorted(trained ^ own)[:3]}")
    if not own:
        return
    adapted.train()
    optimiser = torch.optim.SGD(adapted.bank.parameters(), lr=0.1)
    reached: set[str] = set()
    for step in range(2):
        rows = subject.rows(4, seed=step)
        optimiser.zero_grad()
        score(subject.run(adapted, rows, "subject"), rows).backward()
        reached |= {n for n, g in gradients(delta).items() if g is not None and bool(g.any())}
        optimiser.step()
    lacking = sorted({name for name, _ in delta.named_parameters()} - reached)
    demand(not lacking, f"no gradient reaches {', '.join(lacking[:3])} ({len(lacking)} parameters)")
    for name, p in backbone.module.named_parameters():
        demand(p.grad is None, f"the backbone's {name} has a gradient")
        demand(same_bits(p, before[name]), f"the backbone's {name} moved")


def mode_and_mask_change_nothing(subject: Subject) -> None:
    """Training mode gives the outputs of evaluation mode, and a mask of ones (where there is a mask) those of none."""
    backbone = subject.fresh()
    adapted = Adapted(backbone, [made(subject.spec, backbone)])
    rows = subject.rows(3)
    wanted = subject.run(adapted, rows, "subject")
    adapted.bank.train()
    agree_rows(subject.run(adapted, rows, "subject"), wanted, "in training mode")
    rows = subject.rows(3, length=6)
    for mode in (True, False):
        adapted.bank.train(mode)
        batch = subject.batch(rows)
        wanted = subject.cut(adapted(**batch, deltas="subject"), rows)
        batch.pop("attention_mask", None)
        agree_rows(subject.cut(adapted(**batch, deltas="subject"), rows), wanted, "without a mask")


def count_is_real(subject: Subject) -> None:
    """`Delta.trainable()` is the number of values that an optimiser would move and that the file would hold."""
    adapted = Adapted(subject.fresh(), [made(subject.spec, subject.fresh())])
    delta = adapted.bank["subject"]
    optimised = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    stored = sum(t.numel() for t in delta.tensors().values())
    demand(
        delta.trainable() == optimised == stored,
        f"it declares {delta.trainable()} parameters, {optimised} are trainable and {stored} are saved",
    )


def stands_or_refuses(subject: Subject) -> None:
    """At each site of the vocabulary the method acts and learns, or is refused with a UserError."""
    if not isinstance(subject.spec, Method) or not subject.spec.at:
        return
    rows = subject.rows(3)
    for name in VOCABULARY:
        spec = subject.spec.model_copy(update={"at": name})
        backbone = subject.fresh()
        try:
            delta = made(spec, backbone)
            adapted = Adapted(backbone, [delta])
            outputs = subject.run(adapted, rows, "subject")
        except UserError:
            continue
        except Exception as error:
            demand(False, f"at={name!r}: {type(error).__name__} ({error}) in place of a UserError")
        bare = subject.run(adapted, rows, None)
        demand(any(not torch.equal(a, b) for a, b in zip(outputs, bare, strict=True)), f"at={name!r}: it has no effect")
        demand(all(bool(o.isfinite().all()) for o in outputs), f"at={name!r}: the output is not finite")
        score(outputs, rows).backward()
        lacking = [n for n, g in gradients(delta).items() if g is None or not bool(g.any())]
        demand(not lacking, f"at={name!r}: no gradient reaches {lacking[:2]}")


def scales_as_declared(subject: Subject) -> None:
    """Weight 0 is the bare backbone, 1 the delta; others give h + w (h' - h) where declared, and are refused else."""
    backbone = subject.fresh()
    delta = made(subject.spec, backbone)
    adapted = Adapted(backbone, [delta])
    rows = subject.rows(3)
    batch = subject.batch(rows)

    def at(weight: float) -> list[Tensor]:
        return subject.cut(adapted.run(adapted.call(3, "subject", scale=weight), **batch), rows)

    agree_rows(at(0.0), subject.run(adapted, rows, None), "weight 0 against the bare backbone")
    agree_rows(at(1.0), subject.run(adapted, rows, "subject"), "weight 1 against the delta")
    if not all(layer.scalable for _, layer in delta.at_sites()):
        try:
            at(0.5)
        except RoutingError:
            return
        demand(False, "weight 0.5 was taken, though a layer declares that it has no meaning there")
    whole, half = adapted.call(3, "subject"), adapted.call(3, "subject", scale=0.5)
    for site, layer in delta.at_sites():
        if len(adapted.bank.layers_at((site.key, layer.port))["subject"]) > 1:
            continue
        x, h = _entry(site, 3), torch.randn(3, 4, _width(backbone, site, layer)).to(backbone.dtype)
        x = x.squeeze(-1) if site.words else x.to(backbone.dtype)
        full, part = (adapted.bank.execute(call, site, layer.port, x, h) for call in (whole, half))
        agree(part, h + 0.5 * (full - h), f"weight 0.5 at {site.key}")


def weighs_as_declared(subject: Subject) -> None:
    """The effect is proportional to what the layer says it is, and `additive` says whether h has a part in it."""
    backbone = subject.fresh()
    draw = torch.Generator().manual_seed(0)
    for site, layer in made(subject.spec, backbone).at_sites():
        if layer.port not in ("output", "input") or isinstance(layer, (SpanningLayer, DeepTokenLayer)):
            demand(not layer.proportional and not layer.additive, f"{site.key}: nothing of it can be weighed")
            continue
        width = site.d_in if layer.port == "input" else site.d_out
        x = _entry(site, 1)
        h, other = (torch.randn(1, 4, width, generator=draw, dtype=torch.float64) for _ in range(2))
        entry, params = x if layer.reads_input else None, own_params(layer, torch.float64)

        def effect(p: Params, h: Tensor, site: Site = site, layer: Layer = layer, x: Tensor | None = entry) -> Tensor:
            if layer.needs == "weight-read":
                weight, bias = read_linear(linear_at(backbone.module, site), site)
                p = layer.read(p, weight.to(x), None if bias is None else bias.to(x))
            changed: Tensor = layer(p, x, h)
            return changed - h

        whole = effect(params, h)
        if layer.proportional:
            moved = {
                name: layer.neutral + 0.25 * (getattr(params, name) - layer.neutral) for name in layer.proportional
            }
            part = effect(Params(vars(params) | moved), h)
            agree(part, 0.25 * whole, f"a quarter of {layer.proportional} at {site.key}")
        same = torch.allclose(effect(params, other), whole, rtol=1e-9, atol=1e-9)
        demand(same == layer.additive, f"{site.key}: declared additive={layer.additive}, found {same}")


def _entry(site: Site, rows: int) -> Tensor:
    """Something that may come in at a site, four positions a row; ids as a layer gets them."""
    draw = torch.Generator().manual_seed(1)
    if site.words:
        return torch.randint(site.words, (rows, 4, 1), generator=draw)
    return torch.randn(rows, 4, site.d_in, generator=draw, dtype=torch.float64)


def _width(backbone: Backbone, site: Site, layer: Layer) -> int:
    """Width of the tensor that the layer's module gives out, or takes in."""
    if layer.port == "input":
        return site.d_in
    shape = linear_shape(backbone.module.get_submodule(site.exit)) if site.view is not None else None
    return shape[1] if shape else site.d_out


def merges_as_declared(subject: Subject) -> None:
    """If every layer is mergeable, the merged backbone gives the delta's output, and unmerged it is what it was."""
    backbone, plain = subject.fresh(), subject.fresh()
    delta = made(subject.spec, backbone)
    if not delta.layers or not all(layer.mergeable for _, layer in delta.at_sites()):
        return
    rows = subject.rows(3)
    wanted = subject.run(Adapted(backbone, [delta]), rows, "subject")
    before = dict(plain.module.named_parameters(remove_duplicate=False))
    if any(site.calls > 1 or _shared(plain, site) for site, _ in delta.at_sites()):
        try:
            merge(plain, delta)
        except SiteError:
            return
        demand(False, "merged where no weight is this place's own")
    merged = merge(plain, delta)
    agree_rows(subject.cut(plain.module(**subject.batch(rows)), rows), wanted, "merged against attached")
    merged.unmerge()
    after = dict(plain.module.named_parameters(remove_duplicate=False))
    demand(before.keys() == after.keys(), "unmerging left other parameters")
    for name, parameter in after.items():
        demand(parameter is before[name], f"unmerging did not put {name} back")


def _shared(backbone: Backbone, site: Site) -> bool:
    """Whether another module has the weight of a site, as a language-model head has that of a table."""
    weight = getattr(backbone.module.get_submodule(site.exit), "weight", None)
    places = backbone.module.named_parameters(remove_duplicate=False)
    return weight is not None and sum(parameter is weight for _, parameter in places) > 1
