"""Sums of effects are sums; means of parameters are means; what has no sum is refused."""

from __future__ import annotations

import pytest
import torch
from tests.delta.test_merge import given
from tests.delta.test_packing import moved
from tests.fit.tiny import backbone
from torch import Tensor, nn

from deltatune.backbone.load import Backbone
from deltatune.compose.expression import parse
from deltatune.delta.adapted import Adapted
from deltatune.delta.algebra import lerp, soup, total
from deltatune.delta.delta import Delta
from deltatune.delta.merge import merge
from deltatune.errors import UserError
from deltatune.heads.classification import SequenceClassification


def delta(on: Backbone, text: str, seed: int) -> Delta:
    return moved(Delta.build(parse(text), on, seed=seed, name=f"{text} {seed}").to(on.dtype), seed + 1)


def weights_after(on: Backbone, one: Delta) -> dict[str, Tensor]:
    merged = merge(on, one)
    found = {name: p.detach().clone() for name, p in on.module.named_parameters()}
    merged.unmerge()
    return found


ADDITIVE = [
    "lora(r=3)",
    'lora(r=2, tie="A")',
    "bitfit",
    "lora | bitfit",
    'lora(at="attn.q") | lora(at="attn.q ffn.up")',
]


@pytest.mark.parametrize("second", [*ADDITIVE, "full"])
@pytest.mark.parametrize("first", [*ADDITIVE, "full"])
def test_a_weighted_sum_changes_the_weights_by_the_weighted_sum(first: str, second: str) -> None:
    if (first == "full") != (second == "full"):
        pytest.skip("a change of all weights and one at a site have no common form")
    on = backbone("bert", torch.float64)
    a, b = delta(on, first, 0), delta(on, second, 1)
    bare = {name: p.detach().clone() for name, p in on.module.named_parameters()}
    one, other, both = weights_after(on, a), weights_after(on, b), weights_after(on, 0.5 * a - 2 * b)
    for name, start in bare.items():
        wanted = start + 0.5 * (one[name] - start) - 2 * (other[name] - start)
        torch.testing.assert_close(both[name], wanted, rtol=1e-9, atol=1e-9)
    assert any(not torch.equal(both[name], start) for name, start in bare.items())


@pytest.mark.parametrize("text", ["ia3", "parallel_adapter", "adapter", "lora", "bitfit"])
def test_a_multiple_acts_as_the_delta_routed_with_that_weight(text: str) -> None:
    on = backbone("bert", torch.float64)
    one = delta(on, text, 0)
    third = one * (1 / 3)
    with torch.no_grad(), Adapted(on, [one]) as adapted:
        wanted = adapted.run(
            adapted.call(len(given(on)["input_ids"]), one.name, scale=1 / 3), **given(on)
        ).last_hidden_state
        whole = adapted(**given(on)).last_hidden_state
    with torch.no_grad(), Adapted(on, [third]) as adapted:
        found = adapted(**given(on)).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert float((whole - found).abs().max()) > 1e-3


def test_a_sum_of_parallel_adapters_is_exact_at_one_place() -> None:
    on = backbone("bert", torch.float64)
    a, b = (delta(on, 'parallel_adapter(m=3, blocks="-1")', seed) for seed in (0, 1))
    seen: list[Tensor] = []
    site = next(iter(a.sites.values()))
    handle = on.module.get_submodule(site.exit).register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        on.module(**given(on))
        for one in (a, b, 2 * a + b):
            with Adapted(on, [one]) as adapted:
                late = on.module.get_submodule(site.exit).register_forward_hook(lambda m, args, out: seen.append(out))
                adapted(**given(on))
                late.remove()
    handle.remove()
    bare, (first, second, both) = seen[0], (seen[i] for i in (2, 4, 6))
    torch.testing.assert_close(both - bare, 2 * (first - bare) + (second - bare), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ("adapter", "adapter", "depends on what else acts there"),
        ("lora", "ia3", "depends on what else acts there"),
        ("prefix", "prefix", "depends on what else acts there"),
    ],
)
def test_effects_that_do_not_add_up_are_refused(first: str, second: str, said: str) -> None:
    on = backbone()
    with pytest.raises(UserError, match=said):
        delta(on, first, 0) + delta(on, second, 1)


def test_what_cannot_be_multiplied_or_added_is_refused_with_the_reason() -> None:
    on = backbone()
    with pytest.raises(UserError, match="not proportional to any of its parameters"):
        0.5 * delta(on, "prefix", 0)
    with pytest.raises(UserError, match="finite"):
        float("nan") * delta(on, "lora", 0)
    other = backbone()
    with torch.no_grad():
        next(other.module.parameters()).add_(1.0)
    with pytest.raises(UserError, match="different backbones"):
        delta(on, "lora", 0) + delta(other, "lora", 0)
    with pytest.raises(UserError, match="do not average: lora, bitfit"):
        soup([delta(on, "lora", 0), delta(on, "bitfit", 0)])
    with pytest.raises(UserError, match="sum to 1"):
        soup([delta(on, "lora", 0), delta(on, "lora", 1)], [1.0, 1.0])
    with pytest.raises(UserError, match="at least one"):
        soup([])


@pytest.mark.parametrize("text", ["lora", "adapter", "prefix | bitfit", "prompt"])
def test_a_soup_is_the_mean_of_parameters_and_a_lerp_begins_and_ends_at_its_deltas(text: str) -> None:
    on = backbone()
    several = [delta(on, text, seed) for seed in range(3)]
    mean = soup(several)
    for name, value in mean.tensors().items():
        torch.testing.assert_close(value, sum(one.tensors()[name] for one in several) / 3)
    a, b = several[:2]
    for t, wanted in ((0.0, a), (1.0, b)):
        assert all(torch.equal(v, wanted.tensors()[name]) for name, v in lerp(a, b, t).tensors().items())
    assert all(torch.equal(value, a.tensors()[name]) for name, value in a.tensors().items())


def test_heads_of_one_kind_are_summed_as_their_deltas_are(tmp_path: object) -> None:
    on = backbone()
    deltas = [delta(on, "lora", seed) for seed in (0, 1)]
    for number, one in enumerate(deltas):
        one.head = SequenceClassification(32, ("a", "b"), "mean", False, torch.Generator().manual_seed(number))
    a, b = deltas
    weights = [one.head.linear.weight.detach() for one in deltas]  # type: ignore[union-attr]
    mixed = 0.25 * a + 0.75 * b
    assert torch.equal(
        total([(0.25, a), (0.75, b)]).tensors()["head.linear.weight"], mixed.tensors()["head.linear.weight"]
    )
    assert isinstance(mixed.head, nn.Module)
    torch.testing.assert_close(mixed.head.get_parameter("linear.weight"), 0.25 * weights[0] + 0.75 * weights[1])
    mixed.save(str(tmp_path / "mixed"))  # type: ignore[operator]
    again = Delta.load(str(tmp_path / "mixed"), on)  # type: ignore[operator]
    assert all(torch.equal(v, mixed.tensors()[name]) for name, v in again.tensors().items())
    b.head = SequenceClassification(32, ("a", "c"), "mean", False)
    assert total([(0.5, a), (0.5, b)]).head is None
