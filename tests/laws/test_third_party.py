"""A method in one file of under 50 lines keeps every law; one that breaks a law is caught by that law."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from deltatune.backbone.load import Backbone
from deltatune.delta.catalogue import catalogue
from deltatune.delta.method import Method
from deltatune.laws import LAWS, check_method
from deltatune.laws.families import FAMILIES, tiny

FILE = Path(__file__).parent / "my_method.py"


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The file, imported as an installed package would be; its methods leave the catalogue again."""
    spec = importlib.util.spec_from_file_location("my_method", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "my_method", module)
    spec.loader.exec_module(module)
    extended = {**catalogue(), "gain": module.Gain}
    monkeypatch.setattr("deltatune.delta.catalogue.catalogue", lambda: extended)
    yield module
    module.Gain.family = None
    del module.Gain.family  # a class without a family is no method


def test_method_is_short() -> None:
    assert len(FILE.read_text().splitlines()) < 50


def test_method_keeps_all_laws(theirs: ModuleType) -> None:
    results = check_method(theirs.Gain, [Backbone(tiny("bert"), name="bert")])
    assert [result.law for result in results] == list(LAWS)
    assert [f"{result.law}: {result.fault}" for result in results if not result.holds] == []


@pytest.mark.slow
def test_method_keeps_all_laws_on_every_family(theirs: ModuleType) -> None:
    results = check_method(theirs.Gain, [Backbone(tiny(family), name=family) for family in FAMILIES])
    assert [f"{r.backbone} {r.law}: {r.fault}" for r in results if not r.holds] == []


def rows_mixed(layer: type, method: type[Method]) -> None:
    layer.forward = lambda self, p, x, h: h + p.gain * h.mean(dim=(0, 1), keepdim=True)


def not_identity(layer: type, method: type[Method]) -> None:
    layer.forward = lambda self, p, x, h: 1.1 * h + p.gain * h


def nothing_learned(layer: type, method: type[Method]) -> None:
    layer.forward = lambda self, p, x, h: h + p.gain.detach() * h


def no_effect(layer: type, method: type[Method]) -> None:
    layer.forward = lambda self, p, x, h: h


def false_merge(layer: type, method: type[Method]) -> None:
    layer.mergeable = True
    layer.merged = lambda self, p, weight: weight
    method.model_fields["at"].default = "attn.q"
    method.model_rebuild(force=True)


def hidden_state(layer: type, method: type[Method]) -> None:
    """What it gives depends on how often it ran."""

    def forward(self: torch.nn.Module, p: object, x: object, h: torch.Tensor) -> torch.Tensor:
        self.count = getattr(self, "count", 0) + 1
        return h + p.gain * h * self.count  # type: ignore[attr-defined]

    layer.forward = forward


def unseen_tensor(layer: type, method: type[Method]) -> None:
    """A parameter that the spec does not rebuild: another shape each time."""
    start = layer.__init__

    def init(self: torch.nn.Module, width: int) -> None:
        start(self, width)
        self.extra = torch.nn.Parameter(torch.zeros(torch.randint(2, 10**6, ()).item()))

    layer.__init__ = init


FAULTS: dict[str, tuple[Callable[[type, type[Method]], None], set[str]]] = {
    "rows mixed": (rows_mixed, {"many_is_alone", "batched_is_loop", "trained_together_is_trained_alone"}),
    "not the identity": (not_identity, {"identity_at_init"}),
    "nothing learned": (nothing_learned, {"only_the_delta_learns"}),
    "no effect": (no_effect, {"stands_or_refuses", "only_the_delta_learns"}),
    "false merge": (false_merge, {"merges_as_declared"}),
    "hidden state": (hidden_state, {"copies_are_independent"}),
    "unseen tensor": (unseen_tensor, {"saved_is_loaded", "only_the_delta_learns"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(theirs: ModuleType, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, laws = FAULTS[fault]
    plant(theirs.GainLayer, theirs.Gain)
    monkeypatch.setattr("deltatune.laws.check.LAWS", {law: LAWS[law] for law in laws})
    results = check_method(theirs.Gain, [Backbone(tiny("bert"), name="bert")])
    assert {result.law for result in results if not result.holds} == laws
