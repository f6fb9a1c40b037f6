"""Laws about copies: files, deep copies, pickles, and other backbones."""

from __future__ import annotations

import copy
import pickle
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from deltatune.backbone.blocks import is_norm
from deltatune.backbone.load import Backbone
from deltatune.delta.adapted import Adapted
from deltatune.delta.delta import Delta
from deltatune.errors import BackboneMismatch
from deltatune.laws.subject import Subject, agree_rows, alone_only, demand, made, moved, same_bits, score


def saved_is_loaded(subject: Subject) -> None:
    """A delta comes back from its file bit by bit in each dtype, and gives the same outputs."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        backbone = subject.fresh(torch.float32)
        delta = made(subject.spec, backbone).to(dtype)
        delta.record = {"metric": 0.5}
        with tempfile.TemporaryDirectory() as place:
            folder = str(Path(place) / "delta")
            delta.save(folder)
            loaded = Delta.load(folder, backbone)
        demand(str(loaded.spec) == str(delta.spec), f"saved {delta.spec}, loaded {loaded.spec}")
        kept = (delta.name, delta.seed, delta.fingerprint, delta.record, delta.sites)
        demand(
            (loaded.name, loaded.seed, loaded.fingerprint, loaded.record, loaded.sites) == kept, "the record changed"
        )
        demand(list(loaded.layers) == list(delta.layers), "the order of the layers changed")
        for name, tensor in delta.tensors().items():
            demand(same_bits(loaded.tensors()[name], tensor), f"{name} came back with other bits in {dtype}")
        rows = subject.rows(3)
        first = subject.run(Adapted(backbone, [delta]), rows, "subject")
        second = subject.run(Adapted(subject.fresh(torch.float32), [loaded]), rows, "subject")
        demand(all(map(torch.equal, first, second)), f"the loaded delta gives other outputs in {dtype}")


def copies_are_independent(subject: Subject) -> None:
    """A deep copy gives the same outputs, and training one leaves the other alone."""
    _copied(subject, copy.deepcopy)


def pickles_are_independent(subject: Subject) -> None:
    """The same for an unpickled copy."""
    _copied(subject, lambda adapted: pickle.loads(pickle.dumps(adapted)))  # noqa: S301


def _copied(subject: Subject, make: Callable[[Adapted], Adapted]) -> None:
    backbone = subject.fresh()
    deltas = [made(subject.spec, backbone, name, seed=seed) for seed, name in enumerate(("one", "two"))]
    adapted = Adapted(backbone, deltas)
    rows = subject.rows(5)
    route: list[str | None] = ["one"] * 5 if alone_only(deltas[0]) else ["one", "two", None, "two", "one"]
    wanted = subject.run(adapted, rows, route)  # makes the stacks, so that the copy has to end them
    other = make(adapted)
    agree_rows(subject.run(other, rows, route), wanted, "the copy's output")
    shared = {p.data_ptr() for p in adapted.parameters()} & {p.data_ptr() for p in other.parameters() if p.numel()}
    demand(not shared, f"the copy shares {len(shared)} tensors")
    for name in ("one", "two"):
        moved(other.bank[name], seed=9)
    agree_rows(subject.run(adapted, rows, route), wanted, "after a change of the copy, the original's output")
    if deltas[0].trainable():
        again = subject.run(other, rows, route)
        demand(any(not torch.equal(a, b) for a, b in zip(again, wanted, strict=True)), "the copy does not learn")
        score(again, rows).backward()
        demand(all(p.grad is None for p in adapted.parameters()), "the copy's gradient lands in the original")
    other.remove()
    agree_rows(subject.run(adapted, rows, route), wanted, "after removal of the copy, the original's output")


def other_backbones_are_refused(subject: Subject) -> None:
    """A delta goes onto its own backbone only; a rounded copy warns; `verify=False` goes on where the widths fit."""
    home = subject.fresh(torch.float32)
    delta = made(subject.spec, home)
    wrong: dict[str, Callable[[Backbone], None]] = {
        "other weights": _redrawn,
        "half the blocks": _halved,
        "one step of SGD at 1e-6": partial(_stepped, subject),
        "one norm changed": _norm_changed,
        "one bias or norm element changed": _element_changed,
        "a token more": _widened,
    }
    if len({site.exit for site in home.anatomy.sites if site.name == "block"}) < 2:
        del wrong["half the blocks"]  # ALBERT's layers are one block
    if not _norms(home):
        del wrong["one norm changed"]  # OLMo's have no weights
    if not _vectors(home):
        del wrong["one bias or norm element changed"]  # nor has it biases
    if not subject.reads_tokens and not subject.has_decoder:
        del wrong["a token more"]
    for what, change in wrong.items():
        other = subject.fresh(torch.float32)
        change(other)
        other = Backbone(other.module, other.processor, other.name)
        try:
            Adapted(other, [delta])
        except BackboneMismatch:
            pass
        else:
            demand(False, f"taken onto a backbone with {what}")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                Adapted(other, [delta], verify=False).remove()
            except BackboneMismatch:
                demand(what in ("half the blocks", "a token more"), f"verify=False was refused for {what}")
    for dtype in (torch.bfloat16, torch.float16):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Adapted(subject.fresh(dtype), [delta]).remove()
        demand(any("same backbone" in str(w.message) for w in caught), f"no warning for the {dtype} copy")


def _redrawn(backbone: Backbone) -> None:
    with torch.no_grad():
        for parameter in backbone.module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))


def _halved(backbone: Backbone) -> None:
    paths = {site.exit.rpartition(".")[0] for site in backbone.anatomy.sites if site.name == "block"}
    for path in paths:
        blocks = backbone.module.get_submodule(path)
        assert isinstance(blocks, nn.ModuleList)
        parent = backbone.module.get_submodule(path.rpartition(".")[0])
        setattr(parent, path.rpartition(".")[2], blocks[: len(blocks) // 2])


def _stepped(subject: Subject, backbone: Backbone) -> None:
    module, rows = backbone.module.requires_grad_(True), subject.rows(1, length=6)
    score(subject.cut(module(**subject.batch(rows, dtype=backbone.dtype)), rows), rows).backward()
    torch.optim.SGD(module.parameters(), lr=1e-6).step()


def _norms(backbone: Backbone) -> list[nn.Parameter]:
    """The weights of the trunk's norms; one inside a pooler (BEiT) is no part of it."""
    paths = [path.rpartition(".") for path in backbone.anatomy.parameters.values()]
    modules = backbone.module.get_submodule
    return [modules(at).get_parameter(leaf) for at, _, leaf in paths if leaf == "weight" and is_norm(modules(at))]


def _norm_changed(backbone: Backbone) -> None:
    with torch.no_grad():
        _norms(backbone)[-1].mul_(1.001)


def _vectors(backbone: Backbone) -> list[nn.Parameter]:
    """The biases and the weights of norms of the trunk, by name."""
    found = [backbone.module.get_parameter(path) for path in sorted(backbone.anatomy.parameters.values())]
    return [p for p in found if p.ndim == 1]


def _element_changed(backbone: Backbone) -> None:
    vectors = _vectors(backbone)
    with torch.no_grad():
        vectors[len(vectors) // 2][3] += 1e-4


def _widened(backbone: Backbone) -> None:
    table = backbone.embeddings.weight
    wider = nn.Parameter(torch.cat([table, table[:1]]).detach())
    for module in backbone.module.modules():  # tied weights stand in several places
        for name, parameter in module._parameters.items():
            if parameter is table:
                module._parameters[name] = wider
