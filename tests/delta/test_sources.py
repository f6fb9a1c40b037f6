"""Where a layer's parameters come from (free, tied) and how values pass from site to site (spanning layers)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Site
from deltatune.delta.adapted import Adapted, adapt
from deltatune.delta.delta import Delta
from deltatune.delta.files import load, save
from deltatune.delta.layer import Layer, Params, SpanningLayer, constant
from deltatune.delta.method import Family, Method
from deltatune.errors import RoutingError, UnknownName
from deltatune.laws.families import tiny
from deltatune.methods.reparameterization.lora import LoRA


@pytest.fixture
def backbone() -> Backbone:
    return Backbone(tiny("bert").double())


def batch(rows: int) -> dict[str, Tensor]:
    ids = torch.randint(5, 90, (rows, 6), generator=torch.Generator().manual_seed(rows))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def shaken(delta: Delta) -> Delta:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return delta.double()


def test_a_tied_parameter_is_one_and_its_gradient_the_sum(backbone: Backbone) -> None:
    tied = shaken(Delta.build(LoRA(r=2, tie="A"), backbone, name="tied"))
    free = Delta.build(LoRA(r=2), backbone, name="free").double()
    assert tied.trainable() == free.trainable() - 3 * 2 * 32  # q and v of two blocks share one A of four
    with torch.no_grad():
        for address, layer in free.layers.items():
            for name in ("A", "B"):
                layer.get_parameter(name).copy_(tied.layers[address].get_parameter(name))
    outputs = {}
    for delta in (tied, free):
        adapted = adapt(backbone, delta)
        outputs[delta.name] = adapted(**batch(3)).last_hidden_state
        outputs[delta.name].square().sum().backward()
        adapted.remove()
    assert torch.equal(outputs["tied"], outputs["free"])
    one = next(iter(tied.layers.values())).get_parameter("A").grad
    several = sum(layer.get_parameter("A").grad for layer in free.layers.values())  # type: ignore[misc]
    assert one is not None and torch.allclose(one, several, atol=1e-12)


def test_tied_deltas_in_one_batch_are_each_what_they_are_alone(backbone: Backbone) -> None:
    deltas = [shaken(Delta.build(LoRA(r=2, tie="A, B"), backbone, seed=i, name=str(i))) for i in range(3)]
    adapted = Adapted(backbone, deltas)
    together = adapted(**batch(3), deltas=["0", "1", "2"]).last_hidden_state
    together.square().sum().backward()
    gradients = [next(d.parameters()).grad.clone() for d in deltas]  # type: ignore[union-attr]
    for number, delta in enumerate(deltas):
        delta.zero_grad()
        row = {name: value[number : number + 1] for name, value in batch(3).items()}
        alone = adapted(**row, deltas=delta).last_hidden_state
        assert torch.allclose(alone[0], together[number], atol=1e-11)
        alone.square().sum().backward()
        assert torch.allclose(next(delta.parameters()).grad, gradients[number], atol=1e-9)  # type: ignore[arg-type]


def test_a_tied_delta_is_saved_once_and_loaded_tied(backbone: Backbone, tmp_path: Any) -> None:
    delta = shaken(Delta.build(LoRA(r=2, tie="A"), backbone, name="tied")).float()
    save(delta, tmp_path / "delta")
    again = load(tmp_path / "delta")
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in delta.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), delta.parameters(), strict=True))
    assert again.trainable() == delta.trainable()


def test_tying_what_is_not_there_names_what_is(backbone: Backbone) -> None:
    with pytest.raises(UnknownName, match=r"'C'.*valid: A, B"):
        Delta.build(LoRA(tie="C"), backbone)


class Gate(Method):
    """Write a mean at attn.q and scale ffn.down's output with it: a method of two sites that need each other."""

    family: ClassVar[Family] = "addition"
    paper: ClassVar[str] = "none"
    rate: ClassVar[float] = 1e-3
    at: str = "attn.q ffn.down"

    def layer(self, site: Site, generator: torch.Generator) -> Layer:
        return Writer() if site.name == "attn.q" else Reader()


class Writer(SpanningLayer):
    writes: ClassVar[tuple[str, ...]] = ("mean",)

    def __init__(self) -> None:
        super().__init__()
        self.strength = constant((1,), 0.0)

    def span(
        self, p: Params, x: Tensor | None, h: Tensor, read: Mapping[str, Tensor]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert x is not None
        return h, {"mean": x.mean(dim=(1, 2), keepdim=True) * p.strength[0]}


class Reader(SpanningLayer):
    reads: ClassVar[tuple[str, ...]] = ("mean",)
    reads_input: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.bias = constant((1,), 0.0)

    def span(
        self, p: Params, x: Tensor | None, h: Tensor, read: Mapping[str, Tensor]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return h * (1 + read["mean"] + p.bias[0]), {}


def test_values_pass_between_sites_row_by_row(backbone: Backbone) -> None:
    deltas = [shaken(Delta.build(Gate(), backbone, seed=i, name=str(i))) for i in range(2)]
    adapted = Adapted(backbone, deltas)
    route = ["1", None, "0", "1"]
    together = adapted(**batch(4), deltas=route).last_hidden_state
    together.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.bank.parameters())
    for number, name in enumerate(route):
        row = {key: value[number : number + 1] for key, value in batch(4).items()}
        alone = adapted(**row, deltas=name).last_hidden_state
        assert torch.allclose(alone[0], together[number], atol=1e-11)
    bare = adapted(**batch(4), deltas=None).last_hidden_state
    assert not torch.allclose(bare[0], together[0], atol=1e-3)


def test_reading_what_was_never_written_is_refused(backbone: Backbone) -> None:
    adapted = adapt(backbone, Gate(at="ffn.down"))
    with pytest.raises(RoutingError, match="reads 'mean' before any of its sites wrote it"):
        adapted(**batch(2))
