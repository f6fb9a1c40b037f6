"""A delta in the weights does what it did beside them; what is lost is said; it comes out to the bit."""

from __future__ import annotations

import pytest
import torch
from tests.delta.test_packing import inputs, moved
from tests.fit.tiny import backbone
from torch import Tensor, nn

from deltatune.backbone.load import Backbone
from deltatune.compose.expression import parse
from deltatune.delta.adapted import Adapted
from deltatune.delta.delta import Delta
from deltatune.delta.merge import merge
from deltatune.errors import BackboneMismatch, RoutingError, SiteError
from deltatune.laws.families import FAMILIES

# At one place: before the linear, beside it, after it, and on the bias.
JOINED = (
    'ia3(at="attn.{k,v} ffn.down") | lora(r=3, at="attn.{q,k,v,o} ffn.{up,down}") | bitfit | lora(r=2, at="ffn.down")'
)
# What reads the weights reads the backbone's own, whatever acted before it.
READING = 'lora(r=2, at="attn.{q,v}") | bitfit | dora(r=2, at="attn.{q,k,v,o} ffn.{up,down}") | ia3'


def given(on: Backbone) -> dict[str, Tensor]:
    made = inputs(on)
    return {**made, "decoder_input_ids": made["input_ids"][:, :4]} if on.kind == "encoder-decoder" else made


def said(module: nn.Module, on: Backbone, **options: object) -> Tensor:
    with torch.no_grad():
        output = module(**given(on), **options)
    return output.logits if "logits" in output else output.last_hidden_state


def delta(text: str, on: Backbone, size: int = 3) -> Delta:
    return moved(Delta.build(parse(text), on).to(on.dtype), size)


@pytest.mark.parametrize("text", [JOINED, READING, "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_attached_and_unmerged_is_bare(family: str, text: str) -> None:
    on = backbone(family, torch.float64)
    one = delta(text, on)
    before = [(name, p, p.detach().clone()) for name, p in on.module.named_parameters(remove_duplicate=False)]
    bare = said(on.module, on)
    with Adapted(on, [one]) as adapted:
        wanted = said(adapted, on)
    merged = merge(on, one)
    torch.testing.assert_close(said(on.module, on), wanted, rtol=1e-9, atol=1e-9)
    assert float((wanted - bare).abs().max()) > 1e-2
    assert merged.changes and merged.lost == 0.0 and all(change.size > 0 for change in merged.changes)
    assert merged.unmerge() is on.module
    now = list(on.module.named_parameters(remove_duplicate=False))
    assert [(n, id(p)) for n, p in now] == [(n, id(p)) for n, p, _ in before]
    assert all(torch.equal(p, was) for (_, p), (_, _, was) in zip(now, before, strict=True))
    assert torch.equal(said(on.module, on), bare)


def test_what_rounding_takes_away_is_said() -> None:
    on = backbone("bert", torch.bfloat16)
    one = Delta.build(parse("lora"), on)
    for parameter in one.parameters():
        nn.init.constant_(parameter, 1e-3)
    merged = merge(on, one)
    # A change of 1.6e-5 beside weights of 0.02, of which bfloat16 keeps eight bits: most of it is gone.
    assert 0.5 < merged.lost <= 2.0
    assert {c.parameter.rpartition(".")[0].rpartition(".")[2] for c in merged.changes} == {"query", "value"}
    large = backbone("bert", torch.bfloat16)
    assert merge(large, moved(Delta.build(parse("lora"), large), 1)).lost < 0.05


def test_a_bias_that_was_not_there_comes_and_goes() -> None:
    on = backbone("llama", torch.float64)
    module = on.module.get_submodule(next(site.exit for site in on.anatomy.sites if site.name == "attn.q"))
    assert module.bias is None
    merged = merge(on, delta("bitfit", on))
    assert isinstance(module.bias, nn.Parameter)
    assert any(change.size == float("inf") for change in merged.changes)
    merged.unmerge()
    assert module.bias is None


def test_a_tied_weight_is_refused_for_one_place_and_stays_tied_for_the_whole() -> None:
    on = backbone("gpt2")
    with pytest.raises(
        SiteError, match=r"the weight at decoder.lm_head is also transformer.wte.weight, which would change"
    ):
        merge(on, delta('lora(at="lm_head")', on))
    merge(on, delta("full", on))
    assert on.module.lm_head.weight is on.module.transformer.wte.weight


def test_a_table_and_the_head_that_shares_it_are_merged_where_both_change_alike() -> None:
    on = backbone("gpt2", torch.float64)
    bare = said(on.module, on)
    one = delta("trainabletokens(tokens='4:', at='embed lm_head', tie='change')", on)
    with Adapted(on, [one]) as adapted:
        wanted = said(adapted, on)
    merged = merge(on, one)
    assert on.module.lm_head.weight is on.module.transformer.wte.weight
    assert len(merged.changes) == 1
    torch.testing.assert_close(said(on.module, on), wanted, rtol=1e-9, atol=1e-9)
    merged.unmerge()
    assert on.module.lm_head.weight is on.module.transformer.wte.weight
    assert torch.equal(said(on.module, on), bare)
    for text in ("trainabletokens(at='embed')", "trainabletokens(at='embed lm_head')"):
        with pytest.raises(SiteError, match=r"the weight at decoder.embed is also .*, which would change with it"):
            merge(on, delta(text, on))


@pytest.mark.parametrize("text", ["adapter(m=4)", "prefix(n=2)", "prompt(n=2)", "lora | parallel_adapter(m=4)"])
def test_what_is_no_change_of_weights_is_refused_and_nothing_is_written(text: str) -> None:
    on = backbone()
    before = [p.clone() for p in on.module.parameters()]
    with pytest.raises(SiteError, match="cannot be merged: at .* it is no change of the weights; leave it attached"):
        merge(on, delta(text, on))
    assert all(torch.equal(p, was) for p, was in zip(on.module.parameters(), before, strict=True))


def test_a_span_of_several_modules_is_refused() -> None:
    on = backbone()
    with pytest.raises(SiteError, match="encoder.0.ffn is no linear, table or norm with a weight"):
        merge(on, delta('lora(at="ffn")', on))


def test_attached_deltas_and_other_backbones_are_refused() -> None:
    on = backbone()
    one = delta("lora", on)
    with Adapted(on, [one]), pytest.raises(RoutingError, match="would act twice"):
        merge(on, one)
    merge(on, one)
    with pytest.raises(BackboneMismatch):  # a second time: these are no longer the weights that it was trained on
        merge(on, one)


def test_two_deltas_merge_one_after_the_other_and_come_out_in_turn() -> None:
    on = backbone("bert", torch.float64)
    bare = said(on.module, on)
    first, second = delta("lora", on, 1), delta('lora(r=2, at="attn.o")', on, 2)
    with Adapted(on, [first]) as adapted:
        one = said(adapted, on)
    kept = [merge(on, first), merge(on, second, verify=False)]
    assert not torch.allclose(said(on.module, on), one)
    kept.pop().unmerge()
    torch.testing.assert_close(said(on.module, on), one, rtol=1e-9, atol=1e-9)
    kept.pop().unmerge()
    assert torch.equal(said(on.module, on), bare)


@pytest.mark.parametrize("text", ["lora(at='norm.attn')", "vera(at='norm.ffn')"])
def test_a_product_beside_a_norm_is_no_gain(text: str) -> None:
    on = backbone("bert", torch.float64)
    with pytest.raises(SiteError, match=r"acts on what the norm reads, which is no change of its gain and bias"):
        merge(on, delta(text, on))
