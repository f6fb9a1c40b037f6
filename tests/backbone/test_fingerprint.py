"""The fingerprint gives three answers, and gives them about the weights alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import nn

from deltatune.backbone.fingerprint import compare
from deltatune.backbone.load import Backbone
from deltatune.laws.families import CONFIGS, FAMILIES, tiny


def verdict(left: nn.Module, right: nn.Module) -> str:
    return compare(Backbone(left).fingerprint(), Backbone(right).fingerprint())


@pytest.mark.parametrize("family", FAMILIES)
def test_same_weights_are_the_same(family: str) -> None:
    module = tiny(family)
    assert verdict(module, tiny(family)) == "same"
    assert verdict(module, copy.deepcopy(module).requires_grad_(False).train()) == "same"


def test_what_wraps_the_trunk_does_not_matter() -> None:
    trunk = tiny("bert")
    wrapped = hf.BertForSequenceClassification(CONFIGS["bert"]())
    wrapped.bert.load_state_dict(trunk.state_dict())
    assert verdict(trunk, wrapped) == "same"
    masked = hf.BertForMaskedLM(CONFIGS["bert"]())
    masked.bert.load_state_dict(trunk.state_dict(), strict=False)  # it has no pooler
    assert verdict(trunk, masked) == "same"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("left", "right", "answer"),
    [
        (torch.float32, torch.bfloat16, "same up to dtype"),
        (torch.bfloat16, torch.float32, "same up to dtype"),
        (torch.float32, torch.float16, "same up to dtype"),
        (torch.float32, torch.float64, "same"),  # nothing was lost
        (torch.float64, torch.bfloat16, "same up to dtype"),
        (torch.bfloat16, torch.float16, "different"),  # neither holds the other
    ],
)
def test_rounded_copies(family: str, left: torch.dtype, right: torch.dtype, answer: str) -> None:
    assert verdict(tiny(family).to(left), tiny(family).to(right)) == answer


def test_bfloat16_widened_again_is_what_it_was() -> None:
    narrow = tiny("bert").to(torch.bfloat16)
    assert verdict(narrow, copy.deepcopy(narrow).float()) == "same"


def step(module: nn.Module) -> None:
    ids = torch.arange(5, 11)[None]
    module(input_ids=ids).last_hidden_state.square().sum().backward()
    torch.optim.SGD(module.parameters(), lr=1e-6).step()


def one_element(name: str) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        with torch.no_grad():
            parameter = module.get_parameter(name)
            parameter.view(-1)[-1] = torch.nextafter(parameter.view(-1)[-1], torch.tensor(9.0))

    return change


def swapped_blocks(module: nn.Module) -> None:
    layers = module.get_submodule("encoder.layer")
    layers._modules["0"], layers._modules["1"] = layers._modules["1"], layers._modules["0"]


@pytest.mark.parametrize(
    "change",
    [
        step,
        swapped_blocks,
        one_element("embeddings.word_embeddings.weight"),
        one_element("embeddings.position_embeddings.weight"),
        one_element("embeddings.LayerNorm.bias"),
        one_element("encoder.layer.1.attention.self.key.bias"),
        one_element("encoder.layer.0.output.LayerNorm.weight"),
        one_element("encoder.layer.1.output.dense.weight"),
        lambda module: module.resize_token_embeddings(100, mean_resizing=False),
    ],
)
def test_near_copies_differ(change: Callable[[nn.Module], None]) -> None:
    other = tiny("bert")
    change(other)
    assert verdict(tiny("bert"), other) == "different"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_the_trunk_counts(family: str) -> None:
    backbone = Backbone(tiny(family))
    before = backbone.fingerprint()
    behind = {"pooler.dense.weight", "pooler.dense.bias"} | ({"lm_head.weight"} if family == "llama" else set())
    for name, parameter in backbone.module.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[0] += 1e-3
        assert (backbone.fingerprint() != before) == (name not in behind), name
        with torch.no_grad():
            parameter.copy_(kept)
        assert backbone.fingerprint() == before


def test_remembered_fingerprint_is_given_up_when_weights_change() -> None:
    backbone = Backbone(tiny("bert"))
    first = backbone.fingerprint()
    assert backbone.fingerprint() is first
    embeddings = backbone.module.get_submodule("embeddings.LayerNorm")
    embeddings.weight = nn.Parameter(embeddings.weight + 1)
    second = backbone.fingerprint()
    assert second != first
    backbone.module.to(torch.bfloat16)
    assert backbone.fingerprint()["dtype"] == "bfloat16"


def test_scalar_and_empty_tensors_do_no_harm() -> None:
    module = tiny("bert")
    module.get_submodule("embeddings.LayerNorm").register_parameter("temperature", nn.Parameter(torch.tensor(1.0)))
    assert verdict(module, copy.deepcopy(module)) == "same"
    assert verdict(module, tiny("bert")) == "different"


def test_a_copy_has_weights_of_its_own_and_what_is_known_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone(tiny("t5"))
    wanted = backbone.fingerprint()
    monkeypatch.setattr("deltatune.backbone.load.find_anatomy", None)  # neither is worked out again
    with monkeypatch.context() as once:
        once.setattr("deltatune.backbone.load.fingerprint", None)
        copied = backbone.copy()
        assert copied.anatomy.sites == backbone.anatomy.sites
        assert copied.fingerprint() == wanted
    with torch.no_grad():
        copied.module.get_parameter("shared.weight")[5, 5] += 1
    assert compare(copied.fingerprint(), wanted) == "different"
    assert backbone.fingerprint() == wanted == Backbone.fingerprint(backbone)
    assert not {p.data_ptr() for p in backbone.module.parameters()} & {p.data_ptr() for p in copied.module.parameters()}
