"""A delta joins a bank or leaves it in the middle of a training, and the others do not notice."""

from __future__ import annotations

import pytest
import torch
from tests.delta.test_merge import given
from tests.fit.tiny import backbone

from deltatune.backbone.load import Backbone
from deltatune.compose.expression import parse
from deltatune.delta.adapted import Adapted, adapt
from deltatune.delta.delta import Delta
from deltatune.errors import BackboneMismatch, RoutingError, SiteError, UnknownName, UserError

SPECS = ("lora(r=2)", "adapter(m=3)", "prefix(n=2)", "lora(r=2)")


def made(on: Backbone, text: str, seed: int) -> Delta:
    return Delta.build(parse(text), on, seed=seed, name=f"{seed}").to(on.dtype)


class Loop:
    """Steps of several deltas on one batch, each with its own optimiser."""

    def __init__(self, on: Backbone, deltas: list[Delta]) -> None:
        self.adapted = Adapted(on, deltas)
        self.batch = given(on)
        self.optimisers = {delta.name: torch.optim.AdamW(delta.parameters(), lr=1e-2) for delta in deltas}

    def steps(self, number: int) -> None:
        for _ in range(number):
            names = self.adapted.bank.names
            rows = len(self.batch["input_ids"])
            for name in names:
                out = self.adapted(**self.batch, deltas=[name] * rows).last_hidden_state
                draw = torch.Generator().manual_seed(int(name))
                (out * torch.randn(out.shape, generator=draw, dtype=out.dtype)).mean().backward()
                self.optimisers[name].step()
                self.optimisers[name].zero_grad()

    def join(self, delta: Delta) -> None:
        self.adapted.join(delta)
        self.optimisers[delta.name] = torch.optim.AdamW(delta.parameters(), lr=1e-2)


def values(delta: Delta) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in delta.tensors().items()}


def test_who_joins_and_leaves_trains_as_alone_and_changes_nothing_for_the_others() -> None:
    alone = {}
    for seed, text in enumerate(SPECS):
        on = backbone("bert", torch.float64)
        loop = Loop(on, [made(on, text, seed)])
        loop.steps(4 if seed == 1 else 6 if seed != 3 else 3)
        alone[str(seed)] = values(loop.adapted.bank[str(seed)])
    on = backbone("bert", torch.float64)
    loop = Loop(on, [made(on, text, seed) for seed, text in enumerate(SPECS[:3])])
    loop.steps(3)
    loop.join(made(on, SPECS[3], 3))
    loop.steps(1)
    left = loop.adapted.leave("1")
    assert loop.adapted.bank.names == ["0", "2", "3"]
    loop.steps(2)
    for name in ("0", "2", "3"):
        for key, value in loop.adapted.bank[name].tensors().items():
            torch.testing.assert_close(value, alone[name][key], rtol=1e-9, atol=1e-9)
    for key, value in left.tensors().items():
        torch.testing.assert_close(value, alone["1"][key], rtol=1e-9, atol=1e-9)
    with pytest.raises(UnknownName):
        loop.adapted(**loop.batch, deltas="1")


def test_after_all_have_left_and_joined_the_backbone_is_given_back_to_the_bit() -> None:
    on = backbone("bert")
    flags = {name: p.requires_grad for name, p in on.module.named_parameters()}
    with torch.no_grad():
        bare = on.module(**given(on)).last_hidden_state
    adapted = Adapted(on, [made(on, "lora", 0)])
    adapted.join(made(on, "prompt(n=2)", 1))
    adapted.leave("0")
    adapted.leave("1")
    with torch.no_grad():
        assert torch.equal(adapted(**given(on), deltas=None).last_hidden_state, bare)
    adapted.remove()
    assert {name: p.requires_grad for name, p in on.module.named_parameters()} == flags
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in on.module.modules())
    with torch.no_grad():
        assert torch.equal(on.module(**given(on)).last_hidden_state, bare)


def test_who_does_not_fit_changes_nothing() -> None:
    on, other = backbone(), backbone()
    with torch.no_grad():
        next(other.module.parameters()).add_(1.0)
    adapted = Adapted(on, [made(on, "lora", 0)])
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in on.module.modules())
    for delta, error in (
        (made(on, "bitfit", 0), RoutingError),
        (made(other, "lora", 1), BackboneMismatch),
        (made(backbone("llama"), "ia3", 2), (BackboneMismatch, SiteError)),
    ):
        with pytest.raises(error):
            adapted.join(delta)
        assert adapted.bank.names == ["0"]
    assert hooks == sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in on.module.modules())
    adapted.remove()
    with pytest.raises(RoutingError, match="removed"):
        adapted.join(made(on, "bitfit", 1))


@pytest.mark.parametrize(("given", "fix"), [("lora(r=4)", r"dt.parse\('lora\(r=4\)'\)"), (3, r"dt.LoRA\(r=8\)")])
def test_what_is_no_method_is_said(given: object, fix: str) -> None:
    with pytest.raises(UserError, match=f"expected a method or a Delta, such as {fix}"):
        adapt(backbone("bert"), given)
