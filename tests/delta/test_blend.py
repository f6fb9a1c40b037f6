"""Blends against their formulas computed apart, and conversion to LoRA against the best approximation there is."""

from __future__ import annotations

import math

import pytest
import torch
from tests.delta.test_algebra import delta, weights_after
from tests.fit.tiny import backbone
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.delta import blend as module
from deltatune.delta.blend import BLENDS, blend, effect, to_lora
from deltatune.delta.delta import Delta
from deltatune.errors import SiteError, UnknownName, UserError

LINEAR = ["lora(r=3)", "ia3", "bitfit", "lora | ia3 | bitfit"]


def changes(on: Backbone, one: Delta) -> dict[str, Tensor]:
    bare = {name: p.detach().clone() for name, p in on.module.named_parameters()}
    return {name: value - bare[name] for name, value in weights_after(on, one).items()}


def linears_only(text: str) -> str:
    return text.replace("bitfit", 'bitfit(at="attn.{q,k,v,o} ffn.{up,down}")')


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("text", LINEAR)
def test_without_a_rank_the_lora_changes_the_weights_as_the_delta_did(family: str, text: str) -> None:
    on = backbone(family, torch.float64)
    one = delta(
        on, linears_only(text) if family != "llama" else text.replace(" | bitfit", "").replace("bitfit", "ia3"), 0
    )
    wanted, found = changes(on, one), changes(on, to_lora(one, on))
    assert any(value.any() for value in wanted.values())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_at_a_rank_it_is_the_best_approximation(rank: int) -> None:
    on = backbone("bert", torch.float64)
    one = delta(on, "ia3", 0)
    made = to_lora(one, on, rank=rank)
    ranks = {layer.get_parameter("A").shape[0] for layer in made.layers.values() if hasattr(layer, "A")}
    assert ranks == {rank}
    for key, (_, change, _) in effect(one, on).items():
        assert change is not None
        found = effect(made, on)[key][1]
        assert found is not None
        lost = torch.linalg.svdvals(change)[rank:].square().sum().sqrt()
        torch.testing.assert_close((found - change).norm(), lost, rtol=1e-8, atol=1e-10)


def test_at_a_share_of_the_energy_it_takes_the_least_rank_that_keeps_it() -> None:
    on = backbone("bert", torch.float64)
    one = delta(on, "ia3", 0)
    made = effect(to_lora(one, on, energy=0.9), on)
    for key, (_, change, _) in effect(one, on).items():
        assert change is not None and made[key][1] is not None
        kept = made[key][1]
        share = float(kept.square().sum() / change.square().sum())  # type: ignore[union-attr]
        rank = int(torch.linalg.matrix_rank(kept, rtol=1e-9))  # type: ignore[arg-type]
        values = torch.linalg.svdvals(change).square()
        assert share >= 0.9 - 1e-9
        assert float(values[: rank - 1].sum() / values.sum()) < 0.9


# Breadcrumbs always drop the outliers, whatever the density.
@pytest.mark.parametrize("how", [how for how in BLENDS if "breadcrumbs" not in how])
def test_a_blend_of_one_delta_that_keeps_everything_is_that_delta(how: str) -> None:
    on = backbone("bert", torch.float64)
    one = delta(on, "lora(r=2)", 0)
    wanted, found = changes(on, one), changes(on, blend([one], on, how, density=1.0))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-9)


def test_linear_is_the_weighted_sum() -> None:
    on = backbone("bert", torch.float64)
    a, b = delta(on, "lora(r=2)", 0), delta(on, linears_only("ia3 | bitfit"), 1)
    one, other, both = changes(on, a), changes(on, b), changes(on, blend([a, b], on, "linear", weights=[0.3, -1.5]))
    for name in one:
        torch.testing.assert_close(both[name], 0.3 * one[name] - 1.5 * other[name], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("weights", [None, [0.7, -0.4, 1.2]])
def test_ties_trims_elects_a_sign_and_takes_the_mean_of_those_that_have_it(weights: list[float] | None) -> None:
    """Against the algorithm of the paper, entry by entry in Python; its mean weighted, times the sum of the weights."""
    on = backbone("bert", torch.float64)
    several = [delta(on, "lora(r=2)", seed) for seed in range(3)]
    made = effect(blend(several, on, "ties", weights=weights, density=0.3), on)
    shares = weights or [1 / 3] * 3
    for key, (_, found, _) in made.items():
        assert found is not None
        own = [effect(one, on)[key][1] for one in several]
        trimmed = []
        for change in own:
            assert change is not None
            least = sorted(change.abs().reshape(-1).tolist(), reverse=True)[round(0.3 * change.numel()) - 1]
            trimmed.append([value if abs(value) >= least else 0.0 for value in change.reshape(-1).tolist()])
        for place, values in enumerate(zip(*trimmed, strict=True)):
            weighted = [w * value for w, value in zip(shares, values, strict=True)]
            elected = math.copysign(1.0, sum(weighted))
            agreeing = [(abs(w), value) for w, value in zip(shares, weighted, strict=True) if value * elected > 0]
            counted = sum(w for w, _ in agreeing)
            wanted = sum(value for _, value in agreeing) / counted * sum(map(abs, shares)) if agreeing else 0.0
            assert found.reshape(-1)[place].item() == pytest.approx(wanted, abs=1e-9)


def test_sparsifiers_keep_what_they_say() -> None:
    draw = torch.Generator().manual_seed(0)
    change = torch.randn(200, 300, generator=draw, dtype=torch.float64)
    for name, exact in (("magnitude", True), ("random", False), ("ranked", False), ("breadcrumbs", True)):
        found = module.SPARSIFIERS[name](change, 0.4, torch.Generator().manual_seed(1))
        share = float((found != 0).double().mean())
        assert share == pytest.approx(0.4, abs=1e-9 if exact else 0.01), name
    trimmed = module.magnitude(change, 0.4, draw)
    assert change[trimmed != 0].abs().min() >= change[trimmed == 0].abs().max()
    crumbs = module.breadcrumbs(change, 0.4, draw)
    assert crumbs.abs().max() < change.abs().max() and change[crumbs != 0].abs().max() == crumbs.abs().max()
    # Those that draw keep the expectation of every entry.
    for sparsifier in (module.random, module.ranked):
        drawn = [sparsifier(change, 0.4, torch.Generator().manual_seed(seed)) for seed in range(400)]
        assert float((torch.stack(drawn).mean(dim=0) - change).abs().mean()) < 0.06
    kept = torch.stack(
        [(module.ranked(change, 0.4, torch.Generator().manual_seed(s)) != 0).double() for s in range(50)]
    )
    order = change.abs().argsort(dim=1)
    chance = kept.mean(dim=0).gather(1, order).mean(dim=0)
    assert float(chance[-30:].mean()) > 0.45 > 0.35 > float(chance[:30].mean())


def test_the_same_seed_draws_the_same_blend_and_another_another() -> None:
    on = backbone("bert", torch.float64)
    several = [delta(on, "lora(r=2)", seed) for seed in range(2)]
    one, same, other = (blend(several, on, "dare", seed=seed).tensors() for seed in (0, 0, 1))
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert any(not torch.equal(value, other[name]) for name, value in one.items() if value.shape == other[name].shape)


def test_what_cannot_be_blended_is_refused() -> None:
    on = backbone()
    lora = delta(on, "lora", 0)
    with pytest.raises(UnknownName, match="ties"):
        blend([lora], on, "tie")
    with pytest.raises(UnknownName, match="'linear' concatenates"):
        blend([lora], on, "cat")
    for options, said in (
        ({"weights": [1.0, 2.0]}, "expected 1 finite numbers"),
        ({"density": 0.0}, "density=0"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 2, "energy": 0.5}, "not both"),
        ({"energy": 1.5}, "energy=1.5"),
    ):
        with pytest.raises(UserError, match=said):
            blend([lora], on, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no delta"):
        blend([], on)
    for text in ("adapter", "prefix", "full", 'bitfit(at="norm.attn")'):
        with pytest.raises(SiteError):
            to_lora(delta(on, text, 0), on)


def test_the_blend_is_saved_and_loaded(tmp_path: object) -> None:
    on = backbone()
    made = blend([delta(on, "lora(r=2)", 0), delta(on, 'lora(r=3, at="attn.q ffn.up", blocks="1")', 1)], on, rank=4)
    made.save(str(tmp_path / "blend"))  # type: ignore[operator]
    again = Delta.load(str(tmp_path / "blend"), on)  # type: ignore[operator]
    assert again.spec == made.spec
    assert all(torch.equal(value, again.tensors()[name]) for name, value in made.tensors().items())
    assert again.record["made"]["blend"] == "ties"
