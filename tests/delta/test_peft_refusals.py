"""PEFT's DoRA, OFT and VeRA, and kinds that are none: what has no counterpart here, or none there, is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.compose.expression import parse
from deltatune.delta.delta import Delta
from deltatune.delta.exchange.peft import CONFIG, TENSORS, export
from deltatune.errors import DeltaFileError, SiteError, UserError
from deltatune.laws.families import tiny
from deltatune.laws.subject import moved

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own
Tensors = dict[str, Tensor]
QUERY = "base_model.model.encoder.layer.0.attention.self.query"
CONFIGS: dict[str, Callable[[], Any]] = {
    "dora": lambda: peft.LoraConfig(r=2, target_modules=["query"], use_dora=True),
    "oft": lambda: peft.OFTConfig(target_modules=["query"], oft_block_size=8),
    "vera": lambda: peft.VeraConfig(target_modules=["query"], r=4),
}


def changed(folder: Path, kind: str, config: dict[str, Any], tensors: Callable[[Tensors], Any]) -> str:
    """A folder of PEFT's in which something was changed afterwards."""
    peft.get_peft_model(tiny("bert"), CONFIGS[kind]()).save_pretrained(str(folder))
    place = folder / CONFIG
    place.write_text(json.dumps({**json.loads(place.read_text()), **config}))
    held = load_file(folder / TENSORS)
    tensors(held)
    save_file(held, folder / TENSORS)
    return str(folder)


def nothing(held: Tensors) -> None:
    """The tensors stay."""


def redrawn(held: Tensors) -> None:
    held["base_model.vera_A"][0, 0] += 1e-3


@pytest.mark.parametrize(
    ("kind", "config", "tensors", "said"),
    [
        ("dora", {"use_dora": False}, nothing, "DoRA's magnitudes"),
        ("dora", {}, lambda t: t.pop(f"{QUERY}.lora_magnitude_vector"), "lacks lora_magnitude_vector of '.*0.*query'"),
        ("dora", {}, lambda t: t.update({f"{QUERY}.lora_magnitude_vector": torch.ones(3)}), r"shape \(3,\), expected"),
        ("oft", {"coft": True}, nothing, "coft=True .constrained OFT"),
        ("oft", {"module_dropout": 0.1}, nothing, "module_dropout=0.1 .OFT's dropout"),
        ("oft", {"bias": "all"}, nothing, "bias='all': trained biases"),
        ("oft", {"num_cayley_neumann_terms": 2}, nothing, "num_cayley_neumann_terms=2, which is no rotation"),
        ("oft", {"oft_block_size": 16}, nothing, r"shape \(4, 28\), expected \(2, 120\)"),
        ("oft", {"r": 4}, nothing, "r=4 and oft_block_size=8"),
        ("vera", {"projection_prng_key": 1}, nothing, "other random matrices than projection_prng_key=1"),
        ("vera", {}, redrawn, "other random matrices than projection_prng_key=0"),
        ("vera", {}, lambda t: t.pop("base_model.vera_B"), "lacks base_model.vera_A or base_model.vera_B"),
        ("vera", {"bias": "vera_only"}, nothing, "bias='vera_only': trained biases"),
    ],
)
def test_a_folder_of_peft_is_refused(
    tmp_path: Path, kind: str, config: dict[str, Any], tensors: Callable[[Tensors], Any], said: str
) -> None:
    with pytest.raises(DeltaFileError, match=said):
        Delta.load(changed(tmp_path / "it", kind, config, tensors), Backbone(tiny("bert")))


@pytest.mark.parametrize("kind", [["LORA"], {"LORA": 1}, None, 3, "LOHA"])
def test_a_folder_of_another_kind_is_refused(tmp_path: Path, kind: object) -> None:
    with pytest.raises(DeltaFileError, match=re.escape(f"holds {kind!r}, which is not read; expected LORA, IA3")):
        Delta.load(changed(tmp_path / "it", "dora", {"peft_type": kind}, nothing), Backbone(tiny("bert")))


@pytest.mark.parametrize("kind", CONFIGS)
def test_unchanged_it_is_read(tmp_path: Path, kind: str) -> None:
    delta = Delta.load(changed(tmp_path / "it", kind, {}, nothing), Backbone(tiny("bert")))
    assert str(delta.spec).startswith(kind)


@pytest.mark.parametrize(
    ("text", "family", "said"),
    [
        ("dora(r=2, at='attn.q') | dora(r=2, at='attn.q')", "bert", "several DoRAs at"),
        ("oft(b=8, at='attn.q') | oft(b=8, neumann=5, at='attn.k')", "bert", "one form of OFT a folder"),
        ("oft(b=8, at='attn.q') | oft(b=4, at='attn.k')", "bert", "one size of blocks a folder"),
        ("vera(r=4)", "gpt2", "one vera_lambda_d for 'transformer.h.0.attn.c_attn'"),
        ("vera(r=4) | vera(r=5, at='ffn.up')", "bert", "PEFT has one r for a VeRA"),
        ("vera(r=4, width=99)", "bert", "as wide as the largest input, 32; .* has width=99"),
    ],
)
def test_what_peft_cannot_hold_is_refused(text: str, family: str, said: str) -> None:
    backbone = Backbone(tiny(family))
    with pytest.raises(UserError, match=said):
        export(moved(Delta.build(parse(text), backbone)), backbone)


@pytest.mark.parametrize(("b", "said"), [(24, "take 16 or 32"), (64, "take 32 or 16")])
def test_blocks_that_do_not_divide_the_width_are_refused(b: int, said: str) -> None:
    with pytest.raises(SiteError, match=f"b={b} do not divide the 32 inputs of .*; {said}"):
        Delta.build(parse(f"oft(b={b})"), Backbone(tiny("bert")))
