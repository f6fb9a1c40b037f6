"""Layers that read the weight of their linear: the backbone's own values, in full precision, once per call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.engine.subjects import adapted

from deltatune.backbone.load import Backbone
from deltatune.backbone.weights import linear_at, read_linear
from deltatune.compose.expression import parse
from deltatune.delta import bank
from deltatune.delta.adapted import Adapted
from deltatune.delta.delta import Delta
from deltatune.delta.layer import own_params
from deltatune.errors import SiteError
from deltatune.laws.families import FAMILIES, inputs, tiny
from deltatune.methods.reparameterization.dora import DoRA, DoRALayer


@pytest.mark.parametrize("family", FAMILIES)
def test_a_view_has_its_own_rows_and_bias(family: str) -> None:
    """The product of what was read is what the module gives at the site, Conv1D and fused linears included."""
    on = Backbone(tiny(family))
    for site in on.anatomy.select("attn.{q,k,v,o} ffn.{up,down}"):
        linear = linear_at(on.module, site)
        x = torch.randn(3, site.d_in, generator=torch.Generator().manual_seed(0))
        whole = linear(x)
        weight, bias = read_linear(linear, site)
        torch.testing.assert_close(
            torch.nn.functional.linear(x, weight, bias), whole if site.view is None else site.view.take(whole)
        )
        assert (bias is not None) == site.bias


@pytest.mark.parametrize("name", ["attn", "norm.ffn", "block", "embed"])
def test_what_is_no_linear_is_refused(name: str) -> None:
    with pytest.raises(SiteError):
        Delta.build(DoRA(at=name), Backbone(tiny("bert")))


def test_the_weight_is_read_once_a_call_where_nothing_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("dora(r=2)", Backbone(tiny("llama")), "one", "two")
    read: list[Any] = []
    monkeypatch.setattr(bank, "read_linear", lambda *given: read.append(given) or read_linear(*given))
    ids = torch.arange(3, 10)[None].repeat(2, 1)
    with torch.no_grad():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), deltas=["one", "two"], max_new_tokens=4, do_sample=False
        )
    assert len(read) == len(model.bank["one"].layers)  # both deltas at once, and not again for each token
    read.clear()
    model(input_ids=ids, deltas=["one", "two"])
    assert len(read) == len(model.bank["one"].layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_dora_starts_at_the_backbone_under_autocast(family: str) -> None:
    on = Backbone(tiny(family))
    model = Adapted(on, [Delta.build(DoRA(), on, name="one")])
    with torch.autocast("cpu", torch.bfloat16):
        fresh, bare = (model(**inputs(family), deltas=name)[0] for name in ("one", None))
    assert torch.equal(fresh, bare)


@torch.no_grad()
def test_autocast_does_not_round_the_lengths() -> None:
    """Rows of the length that they are trained to have keep it: sums in bfloat16 would be off by a hundredth."""
    model = adapted("dora(r=2)", Backbone(tiny("bert")))
    for site, layer in model.bank["one"].at_sites():
        assert isinstance(layer, DoRALayer)
        weight, _ = read_linear(linear_at(model.backbone, site), site)
        layer.m.copy_(layer.lengths(own_params(layer, torch.float32), weight)[0, 0])
        call, place = model.call(1, "one"), (site.key, "output")
        (run,) = call.plan.rounds(place)[0]
        with torch.autocast("cpu", torch.bfloat16):
            params = model.bank.params(call, place, run, torch.bfloat16)
        assert params.gain.dtype == torch.bfloat16
        assert float(params.gain.abs().max()) < 1e-6


def test_a_row_of_zeros_stays_one() -> None:
    """It has no direction to turn: PEFT divides zero by zero there."""
    module = tiny("bert")
    query = module.get_submodule("encoder.layer.0.attention.self.query")
    with torch.no_grad():
        query.get_parameter("weight")[3] = 0.0
    on = Backbone(module)
    model = Adapted(on, [Delta.build(parse("dora(r=2)"), on, name="one")])
    out = model(**inputs("bert"))[0]
    assert torch.equal(out, model(**inputs("bert"), deltas=None)[0])
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.bank.parameters())
