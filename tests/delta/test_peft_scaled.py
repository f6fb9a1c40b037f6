"""Gemma multiplies its embeddings by a number and its norms by 1 + weight: PEFT's files of both, and merging there."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from tests.backbone.families import GROUPED
from tests.delta.test_peft_files import stirred
from torch import Tensor, nn

from deltatune.backbone.load import Backbone
from deltatune.compose.expression import parse
from deltatune.delta.adapted import adapt
from deltatune.delta.delta import Delta
from deltatune.delta.exchange.peft import TENSORS, export, write
from deltatune.delta.merge import merge
from deltatune.laws.subject import moved

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(8, 64).reshape(7, 8)


@cache
def weights(tied: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    config = hf.GemmaConfig(**{**GROUPED, "tie_word_embeddings": tied})
    return hf.AutoModelForCausalLM.from_config(config).state_dict()


def gemma(tied: bool = True) -> nn.Module:
    config = hf.GemmaConfig(**{**GROUPED, "tie_word_embeddings": tied})
    model: nn.Module = hf.AutoModelForCausalLM.from_config(config)
    model.load_state_dict(weights(tied))
    return model.eval()


def said(model: Callable[..., Any]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


CONFIGS = [
    peft.LNTuningConfig(task_type="CAUSAL_LM"),
    peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=7, target_modules=["q_proj", "embed_tokens"]),
    peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[30, 9, 10]),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.peft_type)
def test_what_peft_wrote_computes_the_same_and_goes_back(tmp_path: Path, config: Any) -> None:
    theirs = stirred(peft.get_peft_model(gemma(), config)).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    backbone = Backbone(gemma())
    delta = Delta.load(str(tmp_path / "theirs"), backbone)
    with adapt(backbone, delta) as adapted:
        ours = said(adapted)
    assert float((said(backbone.module) - ours).abs().max()) > 1e-2
    torch.testing.assert_close(ours, said(theirs), rtol=1e-4, atol=2e-5)
    made = export(delta, backbone)
    before = load_file(tmp_path / "theirs" / TENSORS)
    assert made.tensors.keys() == {key for key in before if not key.endswith("base_layer.weight")}
    assert all(torch.equal(tensor, before[key]) for key, tensor in made.tensors.items())
    write(made, tmp_path / "again")
    torch.testing.assert_close(said(peft.PeftModel.from_pretrained(gemma(), str(tmp_path / "again"))), ours)
    if config.peft_type == "LORA":
        assert (made.config["r"], made.config["lora_alpha"], made.config["alpha_pattern"]) == (3, 7, {})


@pytest.mark.parametrize(
    ("text", "tied"),
    [
        ("lntuning(at='norm.{attn,ffn,final}')", True),
        ("lora(at='embed attn.q', r=3)", False),
        ("trainabletokens(tokens='8:40')", False),
    ],
)
def test_merged_is_attached(text: str, tied: bool) -> None:
    backbone = Backbone(gemma(tied).double())
    delta = moved(Delta.build(parse(text), backbone).double())
    bare = said(backbone.module)
    with adapt(backbone, delta) as adapted:
        wanted = said(adapted)
    assert float((wanted - bare).abs().max()) > 1e-3
    merged = merge(backbone, delta)
    torch.testing.assert_close(said(backbone.module), wanted, rtol=1e-5, atol=1e-6)  # its norms compute in float32
    merged.unmerge()
    assert torch.equal(said(backbone.module), bare)
