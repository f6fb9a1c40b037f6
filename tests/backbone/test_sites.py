"""Sites proved by behaviour: what a layer there sees, and what changes when the weights behind it change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Site
from deltatune.delta.adapted import Adapted
from deltatune.delta.delta import Delta
from deltatune.delta.layer import Layer, Params
from deltatune.laws.families import FAMILIES, inputs, tiny
from deltatune.methods.specification.bitfit import BitFit

POST_NORM = ("bert", "roberta", "distilbert")
# The order in which a block computes; parts of one rank do not see each other.
PRE = ["norm.attn", "attn.q attn.k attn.v", "attn.o attn", "norm.cross", "cross.q cross.k cross.v", "cross.o cross",
       "norm.ffn", "ffn.up ffn.gate", "ffn.act", "ffn.down ffn", "block"]  # fmt: skip
POST = ["attn.q attn.k attn.v", "attn.o attn", "norm.attn", "ffn.up", "ffn.act", "ffn.down ffn", "norm.ffn", "block"]
Seen = dict[str, tuple[Tensor | None, Tensor]]


class Recorder:
    """A spec whose layers keep what they see and change nothing; no Method, so that no catalogue finds it."""

    tie = ""

    def __init__(self) -> None:
        self.seen: Seen = {}
        self.calls: dict[str, int] = {}

    @staticmethod
    def name() -> str:
        return "recorder"

    def layer(self, site: Site, generator: torch.Generator) -> Layer:
        return Recording(self, site)

    def join(self, placed: object) -> None:
        """Its layers need not know of each other."""


class Recording(Layer):
    positionwise = False

    def __init__(self, recorder: Recorder, site: Site) -> None:
        super().__init__()
        self.recorder, self.site = recorder, site
        self.reads_input = site.name != "embed"  # type: ignore[misc]

    def forward(self, p: Params, x: Tensor | None, h: Tensor) -> Tensor:
        self.recorder.seen[self.site.key] = (x, h)
        self.recorder.calls[self.site.key] = self.recorder.calls.get(self.site.key, 0) + 1
        return h


def record(module: nn.Module, batch: dict[str, Tensor]) -> tuple[Recorder, Any]:
    """Run the bare model with a recording layer at every site."""
    backbone = Backbone(module)
    recorder = Recorder()
    sites = [(0, site) for site in backbone.anatomy.sites if site.name != "weights"]
    adapted = Adapted(backbone, [Delta(recorder, sites, name="recorder")])  # type: ignore[arg-type]
    with torch.no_grad():
        output = adapted(**batch, use_cache=False) if "decoder_input_ids" in batch else adapted(**batch)
    adapted.remove()
    return recorder, output


def perturb(module: nn.Module, site: Site) -> None:
    """Change the weights behind a site, through its view."""
    weight = module.get_submodule(site.exit).get_parameter("weight")
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        if site.view is not None:
            weight[:, site.view.start : site.view.stop] += torch.randn(len(weight), site.d_out, generator=draw)
        else:
            weight += torch.randn(weight.shape, generator=draw)


def rank(site: Site, family: str) -> int:
    order = POST if family in POST_NORM else PRE
    return next(i for i, names in enumerate(order) if site.name in names.split())


def should_change(site: Site, other: Site, family: str, gated: bool) -> bool:
    """Whether the tensor at `other` lies behind the weights of `site`."""
    spans = {"attn": "attn.o", "cross": "cross.o", "ffn": "ffn.down"}
    if other.key.replace(other.name, spans.get(other.name, other.name)) == site.key:
        return True  # itself, or the span that ends with it
    if site.name == "embed":
        return True  # in GPT-2 and T5 the head and the decoder's embedding are the same table
    if other.name == "lm_head":
        return True
    if site.name == "lm_head" or other.name == "embed":
        return False
    if site.stack != other.stack:
        # From an encoder into a decoder the way leads through the keys and values of its first attention to it.
        starts = other.name in ("cross.k", "cross.v") or other.block is None or other.block > 0
        return site.stack == "encoder" and (starts or rank(other, family) > PRE.index("cross.q cross.k cross.v"))
    if other.name in ("cross.k", "cross.v"):
        return False  # they read the encoder
    if site.name == "norm.embed":
        return True
    if site.name == "norm.final" or other.name == "norm.embed":
        return False
    if other.name == "norm.final":
        return True
    assert site.block is not None
    assert other.block is not None
    if site.block != other.block:
        return other.block > site.block
    if gated and (site.name, other.name) == ("ffn.up", "ffn.act"):
        return False  # the activation stands behind the gate
    return rank(other, family) > rank(site, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_perturbed_weights_change_what_lies_behind_them_and_nothing_else(family: str) -> None:
    batch = inputs(family)
    before = record(tiny(family), batch)[0].seen
    anatomy = Backbone(tiny(family)).anatomy
    sites = [site for site in anatomy.sites if site.name not in ("weights", "block", "attn", "cross", "ffn", "ffn.act")]
    assert len(sites) >= 18
    for site in sites:
        if site.name == "lm_head" and family in ("gpt2", "t5"):
            continue  # tied to the embedding
        module = tiny(family)
        perturb(module, site)
        after = record(module, batch)[0].seen
        for other in anatomy.sites:
            if other.name == "weights":
                continue
            changed = not torch.equal(after[other.key][1], before[other.key][1])
            assert changed == should_change(site, other, family, anatomy.has("ffn.gate")), f"{site.key} -> {other.key}"


@pytest.mark.parametrize("family", FAMILIES)
def test_each_site_is_called_once_with_its_widths_and_rows(family: str) -> None:
    batch = inputs(family, rows=5)
    recorder, _ = record(tiny(family), batch)
    sites = [site for site in Backbone(tiny(family)).anatomy.sites if site.name != "weights"]
    assert recorder.calls == {site.key: 1 for site in sites}
    for site in sites:
        x, h = recorder.seen[site.key]
        decoder = family == "t5" and site.stack == "decoder"
        tokens = batch["decoder_input_ids" if decoder else "input_ids"].shape[1]
        reads = batch["input_ids"].shape[1] if site.name in ("cross.k", "cross.v") else tokens
        assert site.rows == "rows"
        assert h.shape == (5, reads, site.d_out), site.key
        assert x is None or x.shape == (5, reads, site.d_in), site.key


@pytest.mark.parametrize("family", FAMILIES)
def test_spans_see_the_input_of_a_sublayer_and_its_output_before_the_residual(family: str) -> None:
    """The residual sum and the norm, computed here from what the sites give, are what the next site gives."""
    module = tiny(family)
    seen = record(module, inputs(family))[0].seen
    anatomy = Backbone(module).anatomy
    for stack, depth in anatomy.depth.items():
        for number in range(depth):
            at = {site.name: site for site in anatomy.sites if (site.stack, site.block) == (stack, number)}
            x, h = ({name: seen[site.key][i] for name, site in at.items()} for i in (0, 1))
            entry = x["block"]
            assert entry is not None
            norm = {name: module.get_submodule(site.exit) for name, site in at.items() if name.startswith("norm")}
            if family in POST_NORM:
                assert torch.equal(x["attn"], entry)
                close(norm["norm.attn"](entry + h["attn"]), h["norm.attn"])
                assert torch.equal(x["ffn"], h["norm.attn"])
                close(norm["norm.ffn"](h["norm.attn"] + h["ffn"]), h["block"])
            else:
                total = entry
                for part in [part for part in ("attn", "cross", "ffn") if part in at]:
                    close(norm[f"norm.{part}"](total), x[part])
                    total = total + h[part]
                close(total, h["block"])
            assert torch.equal(x["attn.q"], x["attn"])
            assert torch.equal(h["attn.o"], h["attn"])
            assert torch.equal(x["ffn.up"], x["ffn"])
            assert torch.equal(h["ffn.down"], h["ffn"])
            if "cross" in at:
                last = seen["encoder.norm.final"][1]
                assert torch.equal(x["cross.k"], last)
                assert torch.equal(x["cross.v"], last)


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_and_gate(family: str) -> None:
    module = tiny(family)
    seen = record(module, inputs(family))[0].seen
    for stack in Backbone(module).anatomy.depth:
        (act_in, act), (_, up), (down_in, _) = (seen[f"{stack}.0.ffn.{part}"] for part in ("act", "up", "down"))
        gate = seen.get(f"{stack}.0.ffn.gate", (None, up))[1]
        assert torch.equal(act_in, gate)
        close(act * up if gate is not up else act, down_in)


def test_queries_keys_and_values_of_gpt2_are_views_of_one_linear() -> None:
    module = tiny("gpt2")
    anatomy = Backbone(module).anatomy
    batch = inputs("gpt2")
    whole: list[Tensor] = []
    handle = module.get_submodule("transformer.h.0.attn.c_attn").register_forward_hook(lambda m, a, o: whole.append(o))
    seen = record(module, batch)[0].seen
    handle.remove()
    parts = torch.cat([seen[f"decoder.0.attn.{part}"][1] for part in "qkv"], dim=-1)
    assert torch.equal(parts, whole[0])
    for part in "qkv":
        site = anatomy.by_key[f"decoder.0.attn.{part}"]
        other = tiny("gpt2")
        perturb(other, site)
        again = record(other, batch)[0].seen
        changed = {p for p in "qkv" if not torch.equal(again[f"decoder.0.attn.{p}"][1], seen[f"decoder.0.attn.{p}"][1])}
        assert changed == {part}
        assert not torch.equal(again["decoder.0.attn.o"][1], seen["decoder.0.attn.o"][1])


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_keys_and_values_are_what_they_are_called(family: str) -> None:
    """A constant added to all keys changes nothing, to all values moves the output by W_o c, to queries more than that."""
    batch = inputs(family)
    backbone = Backbone(tiny(family).double())
    groups = sorted({site.key.removesuffix(".q") for site in backbone.anatomy.sites if site.name.endswith(".q")})

    def outputs(key: str, value: float) -> Tensor:
        """The tensor at `<group>.o` with a constant vector added at one site."""
        site = backbone.anatomy.by_key[key]
        last = backbone.module.get_submodule(backbone.anatomy.by_key[f"{key.rpartition('.')[0]}.o"].exit)
        kept: list[Tensor] = []
        handle = last.register_forward_hook(lambda m, a, h: kept.append(h))
        delta = Delta(BitFit(), [(0, site)], name="constant").double()
        with torch.no_grad(), Adapted(backbone, [delta]) as adapted:
            draw = torch.randn(site.d_out, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            next(delta.parameters()).copy_(value * draw)
            adapted(**batch)
        handle.remove()
        return kept[-1]

    for group in groups:
        bare = outputs(f"{group}.v", 0.0)
        moved = outputs(f"{group}.v", 1.0) - bare
        assert float(moved.abs().max()) > 1e-2
        assert float((moved - moved[:1, :1]).abs().max()) < 1e-9, f"{group}.v"
        for part, changes in (("q", True), ("k", family == "llama")):  # rotated keys are not all moved alike
            difference = outputs(f"{group}.{part}", 1.0) - bare
            assert (float(difference.abs().max()) > 1e-6) == changes, f"{group}.{part}"
            assert not changes or float((difference - difference[:1, :1]).abs().max()) > 1e-6, f"{group}.{part}"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_lacking_is_declared_with_a_reason(family: str) -> None:
    anatomy = Backbone(tiny(family)).anatomy
    cross = {f"cross{part}" for part in ("", ".q", ".k", ".v", ".o")} | {"norm.cross"}
    expected = {
        "bert": cross | {"ffn.gate", "norm.final", "lm_head"},
        "roberta": cross | {"ffn.gate", "norm.final", "lm_head"},
        "distilbert": cross | {"ffn.gate", "norm.final", "lm_head"},
        "gpt2": cross | {"ffn.gate", "norm.embed"},
        "llama": cross | {"norm.embed"},
        "t5": {"ffn.gate", "norm.embed"},
    }[family]
    assert set(anatomy.absent) == expected
    assert all(len(reason) > 10 for reason in anatomy.absent.values())
    assert all(not anatomy.has(name) for name in expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_are_declared_as_they_are(family: str) -> None:
    module = tiny(family)
    for site in Backbone(module).anatomy.sites:
        if site.entry == site.exit and site.name not in ("weights", "block"):
            assert site.bias == (getattr(module.get_submodule(site.exit), "bias", None) is not None), site.key
