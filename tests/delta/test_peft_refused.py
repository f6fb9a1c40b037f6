"""What of PEFT's folders has no counterpart here, and what of ours has none there, is refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tests.backbone.families import GROUPED
from tests.delta.test_peft_files import theirs_in
from torch import nn

from deltatune.backbone.load import Backbone
from deltatune.compose.expression import parse
from deltatune.delta.adapted import adapt
from deltatune.delta.delta import Delta
from deltatune.delta.exchange.peft import TENSORS, export
from deltatune.delta.exchange.vllm import export_for_vllm
from deltatune.delta.merge import merge
from deltatune.errors import BackboneMismatch, DeltaFileError, SiteError, UserError
from deltatune.laws.families import tiny
from deltatune.laws.subject import moved

pytestmark = pytest.mark.filterwarnings("ignore")


def saved(model: nn.Module, config: Any, folder: Path) -> str:
    peft.get_peft_model(model, config).save_pretrained(str(folder))
    return str(folder)


def test_a_gain_of_zero_is_not_moved_by_a_factor(tmp_path: Path) -> None:
    theirs_in(tmp_path / "theirs", "llama", peft.LNTuningConfig(task_type="CAUSAL_LM"))
    backbone = Backbone(tiny("llama"))
    with torch.no_grad():
        backbone.module.model.norm.weight[3] = 0.0
    with pytest.raises(DeltaFileError, match=r"'model.norm' moves a gain that is zero in this backbone"):
        Delta.load(str(tmp_path / "theirs"), backbone)


def test_a_norm_that_is_at_no_site_is_refused(tmp_path: Path) -> None:
    model = hf.AutoModelForCausalLM.from_config(hf.Qwen3Config(**GROUPED))
    folder = saved(model, peft.LNTuningConfig(target_modules=["q_norm"]), tmp_path / "theirs")
    with pytest.raises(DeltaFileError, match=r"q_norm', which is no norm at a site of"):
        Delta.load(folder, Backbone(model))


def test_a_norm_has_one_copy_there() -> None:
    backbone = Backbone(tiny("bert"))
    delta = moved(Delta.build(parse("lntuning | lntuning(at='norm.attn')"), backbone))
    with pytest.raises(UserError, match="twice; PEFT has one copy of a norm"):
        export(delta, backbone)


def test_a_bias_is_not_merged_into_a_norm_that_would_pass_over_it() -> None:
    backbone = Backbone(tiny("llama"))
    delta = moved(Delta.build(parse("bitfit(at='norm.attn')"), backbone))
    with pytest.raises(SiteError, match="LlamaRMSNorm has none and would pass over it"):
        merge(backbone, delta)


def test_trained_rows_of_a_shared_table_go_with_the_head() -> None:
    backbone = Backbone(tiny("gpt2"))
    with pytest.raises(
        UserError, match="the language-model head, which shares the table, changes with it; fit it with"
    ):
        export(moved(Delta.build(parse("trainabletokens"), backbone)), backbone)


def test_a_lora_that_the_head_shares_is_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["wte"], ensure_weight_tying=True, task_type="CAUSAL_LM")
    theirs_in(tmp_path / "theirs", "gpt2", config)
    with pytest.raises(DeltaFileError, match="ensure_weight_tying=True: its LoRA of the table acts in the"):
        Delta.load(str(tmp_path / "theirs"), Backbone(tiny("gpt2")))


@pytest.mark.parametrize(
    "config", [peft.TrainableTokensConfig(token_indices=[7]), peft.LoraConfig(target_modules=["shared", "q"])]
)
def test_the_second_table_of_an_encoder_decoder_is_no_site(tmp_path: Path, config: Any) -> None:
    theirs_in(tmp_path / "theirs", "t5", config)
    with pytest.raises(DeltaFileError, match="two tables, and the decoder's is no site"):
        Delta.load(str(tmp_path / "theirs"), Backbone(tiny("t5")))


def test_a_table_of_another_size_is_refused(tmp_path: Path) -> None:
    theirs_in(tmp_path / "theirs", "bert", peft.LoraConfig(target_modules=["word_embeddings"]))
    larger = tiny("bert")
    larger.resize_token_embeddings(101, mean_resizing=False)
    with pytest.raises(DeltaFileError, match=r"lora_embedding_A' has shape \(8, 99\), expected \(8, 101\)"):
        Delta.load(str(tmp_path / "theirs"), Backbone(larger))
    delta = Delta.build(parse("lora(at='embed')"), Backbone(tiny("bert")))
    with pytest.raises(BackboneMismatch, match="needs a table of 99 tokens, 'BertModel' has one of 101"):
        adapt(larger, delta, verify=False)


@pytest.mark.parametrize("lacking", ["lora_A", "lora_embedding_A", "lora_embedding"])
def test_half_a_lora_is_refused(tmp_path: Path, lacking: str) -> None:
    """Of the linears nothing, of the table one tensor, of the table nothing."""
    theirs_in(tmp_path / "theirs", "bert", peft.LoraConfig(target_modules=["query", "word_embeddings"]))
    file = tmp_path / "theirs" / TENSORS
    kept = {
        key: tensor
        for key, tensor in load_file(file).items()
        if lacking not in key and not (lacking == "lora_A" and "lora_B" in key)
    }
    save_file(kept, file)
    with pytest.raises(
        DeltaFileError, match=r"lacks (tensors for|'base_model.model.embeddings.word_embeddings.lora_e)"
    ):
        Delta.load(str(tmp_path / "theirs"), Backbone(tiny("bert")))


def test_vllm_is_not_given_a_lora_at_the_table() -> None:
    backbone = Backbone(tiny("llama"))
    with pytest.raises(UserError, match="LoRA at the table of embeddings, which is not written for vLLM"):
        export_for_vllm(moved(Delta.build(parse("lora(at='attn.q embed')"), backbone)), backbone)


def test_a_prompt_network_of_an_encoder_is_refused() -> None:
    backbone = Backbone(tiny("bert"))
    with pytest.raises(UserError, match="PEFT puts a prompt before the first token of an encoder"):
        export(Delta.build(parse("ptuning(n=2)"), backbone), backbone)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trainabletokens(tokens='99')", "tokens='99' names token 99; the table has 99 tokens, 0 to 98"),
        ("trainabletokens(tokens='a')", "tokens='a' does not parse"),
        ("trainabletokens(tokens='99:')", "tokens='99:' names no tokens"),
        ("trainabletokens(at='attn.q')", "trainable tokens are rows of a table"),
        ("lntuning(at='attn.q')", "LN-tuning needs norms with a gain; BertModel has none at 'attn.q'"),
    ],
)
def test_mistakes(text: str, said: str) -> None:
    with pytest.raises(SiteError, match=re.escape(said)):
        Delta.build(parse(text), Backbone(tiny("bert")))
