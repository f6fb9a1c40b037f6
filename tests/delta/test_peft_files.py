"""PEFT's folders, both ways: what it wrote computes the same here, what we write computes the same there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.backbone.families import build
from torch import Tensor, nn

from deltatune.backbone.load import Backbone
from deltatune.compose.expression import parse
from deltatune.delta.adapted import adapt
from deltatune.delta.delta import Delta
from deltatune.delta.exchange.peft import CONFIG, TENSORS, export, write
from deltatune.errors import UserError
from deltatune.laws.families import inputs, tiny
from deltatune.laws.subject import moved

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, and ours that the backbone is not verified
TASK = {"gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}


def computed(model: nn.Module, family: str) -> Tensor:
    """The first output where the mask counts; what a prompt adds is cut off."""
    batch = inputs(family)
    with torch.no_grad():
        out: Tensor = model(**batch)[0]
    if family == "t5":
        return out
    return out[:, -batch["input_ids"].shape[1] :][batch["attention_mask"].bool()]


def same(ours: Delta, theirs: nn.Module, family: str, backbone: Backbone) -> None:
    """Demand equal outputs to 5e-6 of their norm (float32, summed in another order), and that the delta does something."""
    with adapt(backbone, ours) as adapted:
        first = computed(adapted, family)
    bare, second = computed(tiny(family), family), computed(theirs.eval(), family)
    assert float((bare - second).abs().max()) > 1e-3
    assert float((first - second).norm() / second.norm()) < 5e-6
    torch.testing.assert_close(first, second, rtol=1e-4, atol=5e-5)


def stirred(model: nn.Module, seed: int = 0, size: float = 0.3) -> nn.Module:
    """Move what PEFT trains away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "ia3_l" in name or "prompt_encoder" in name:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def theirs_in(folder: Path, family: str, config: Any, seed: int = 0, size: float = 0.3) -> nn.Module:
    """Save what PEFT makes of a config into a folder."""
    torch.manual_seed(seed)
    model = stirred(peft.get_peft_model(tiny(family), config), seed, size)
    model.save_pretrained(str(folder))
    return model


def lora(family: str, **options: Any) -> Any:
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 7, "task_type": TASK.get(family), **options})


LORAS: list[tuple[str, dict[str, Any]]] = [
    ("bert", dict(target_modules=["query", "value"])),
    ("bert", dict(target_modules=r".*layer\.\d+\.(output|intermediate)\.dense")),
    ("bert", dict(target_modules=["query", "value"], rank_pattern={"value": 5}, alpha_pattern={r"0\.attention\.self\.query": 3})),
    ("bert", dict(target_modules=["query"], layers_to_transform=[1])),
    ("bert", dict(target_modules=["query", "key"], exclude_modules=["0.attention.self.key"])),
    ("roberta", dict(target_modules=["query", "key", "value"], use_rslora=True)),
    ("roberta", dict(target_modules=["query", "key"], use_rslora=True, rank_pattern={"key": 2})),
    ("distilbert", dict(target_modules=["q_lin", "ffn.lin1"])),
    ("gpt2", dict(target_modules=["c_attn"], fan_in_fan_out=True)),
    ("gpt2", dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, use_rslora=True)),
    ("gpt2", dict(target_modules="all-linear")),
    ("llama", dict(target_modules="all-linear", lora_dropout=0.1)),
    ("llama", dict(target_modules=["q_proj", "lm_head"])),
    ("bert", dict(target_modules=["query", "word_embeddings"])),
    ("bert", dict(target_modules=["word_embeddings"], use_rslora=True, lora_dropout=0.1)),
    ("gpt2", dict(target_modules=["c_attn", "wte"], fan_in_fan_out=True, alpha_pattern={"wte": 3}, rank_pattern={"wte": 2})),
    ("llama", dict(target_modules=["q_proj", "embed_tokens", "lm_head"], lora_dropout=0.1)),
    ("llama", dict(target_modules=r".*(embed_tokens|q_proj)")),
    ("bert", dict(target_modules=["query"], trainable_token_indices=[7, 3, 20])),
    ("gpt2", dict(target_modules=["c_attn"], fan_in_fan_out=True, trainable_token_indices={"wte": [7, 3, 20]})),
    ("llama", dict(target_modules=["q_proj"], trainable_token_indices=[7, 3, 20])),
    ("llama", dict(target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")),
    ("t5", dict(target_modules=["q", "v", "wo"])),
    ("t5", dict(target_modules=r"decoder.*EncDecAttention\.(q|k)")),
    ("t5", dict(target_modules="all-linear")),
    ("bert", dict(target_modules=["query", "output.dense"], use_dora=True, rank_pattern={"query": 2})),
    ("gpt2", dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, use_dora=True, use_rslora=True)),
    ("llama", dict(target_modules="all-linear", use_dora=True, lora_dropout=0.1)),
    ("t5", dict(target_modules=["q", "v", "wo"], use_dora=True)),
]  # fmt: skip


@pytest.mark.parametrize(("family", "options"), LORAS)
def test_lora_of_peft_computes_the_same_here(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    theirs = theirs_in(tmp_path / "theirs", family, lora(family, **options))
    backbone = Backbone(tiny(family))
    delta = Delta.load(str(tmp_path / "theirs"), backbone)
    same(delta, theirs, family, backbone)
    back(delta, tmp_path, family, backbone)


OFTS: list[tuple[str, dict[str, Any]]] = [
    ("bert", dict(target_modules=["query", "value"], oft_block_size=8, use_cayley_neumann=False)),
    ("bert", dict(target_modules=["query", "output.dense"], oft_block_size=32, use_cayley_neumann=False)),
    ("roberta", dict(target_modules=["query", "output.dense"], r=4, oft_block_size=0, num_cayley_neumann_terms=7)),
    ("llama", dict(target_modules="all-linear", oft_block_size=16, block_share=True, use_cayley_neumann=False)),
    ("llama", dict(target_modules=["q_proj"], oft_block_size=4, num_cayley_neumann_terms=3)),
    ("t5", dict(target_modules=["q", "v"], oft_block_size=8, layers_to_transform=[1])),
    ("bert", dict(target_modules=["key"], oft_block_size=24)),  # as near to 16 as to 32: PEFT takes the smaller
]  # fmt: skip


@pytest.mark.parametrize(("family", "options"), OFTS)
def test_oft_of_peft_computes_the_same_here(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    config = peft.OFTConfig(task_type=TASK.get(family), **options)
    theirs = theirs_in(tmp_path / "theirs", family, config, size=0.05)
    backbone = Backbone(tiny(family))
    delta = Delta.load(str(tmp_path / "theirs"), backbone)
    same(delta, theirs, family, backbone)
    back(delta, tmp_path, family, backbone)


VERAS: list[tuple[str, dict[str, Any]]] = [
    ("bert", dict(target_modules=["query", "value"])),
    ("bert", dict(target_modules=["query", "output.dense"], projection_prng_key=5, vera_dropout=0.1)),
    ("roberta", dict(target_modules=["query", "intermediate.dense"], save_projection=False, d_initial=0.5)),
    ("gpt2", dict(target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True)),
    ("llama", dict(target_modules="all-linear", save_projection=False)),
    ("llama", dict(target_modules=["q_proj", "lm_head"])),
    ("t5", dict(target_modules=r".*(decoder.*EncDecAttention\.q|0.*wo)")),
]  # fmt: skip


@pytest.mark.parametrize(("family", "options"), VERAS)
def test_vera_of_peft_computes_the_same_here(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    theirs = theirs_in(tmp_path / "theirs", family, peft.VeraConfig(r=6, task_type=TASK.get(family), **options))
    backbone = Backbone(tiny(family))
    delta = Delta.load(str(tmp_path / "theirs"), backbone)
    same(delta, theirs, family, backbone)
    back(delta, tmp_path, family, backbone)


def test_one_rotation_of_a_fused_linear_is_three_equal_ones(tmp_path: Path) -> None:
    """And of three different ones there is no file, nor of what PEFT's OFT has no class for."""
    model = peft.get_peft_model(build("gpt_neox"), peft.OFTConfig(target_modules=["query_key_value"], oft_block_size=8))
    theirs = stirred(model, size=0.05)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    backbone = Backbone(build("gpt_neox"))
    delta = Delta.load(str(tmp_path / "theirs"), backbone)
    assert {site.name for site, _ in delta.at_sites()} == {"attn.q", "attn.k", "attn.v"}
    ids = torch.arange(3, 12)[None]
    with adapt(backbone, delta) as adapted, torch.no_grad():
        first, second, bare = adapted(ids)[0], theirs.eval()(ids)[0], adapted(ids, deltas=None)[0]
    assert float((bare - second).abs().max()) > 1e-3
    torch.testing.assert_close(first, second, rtol=1e-4, atol=5e-5)
    write(export(delta, backbone), tmp_path / "again")
    assert (tmp_path / "theirs" / TENSORS).read_bytes() == (tmp_path / "again" / TENSORS).read_bytes()
    with pytest.raises(UserError, match="one rotation for the input of .*query_key_value"):
        export(moved(Delta.build(parse("oft(b=8, at='attn.{q,k,v}')"), backbone)), backbone)
    with pytest.raises(UserError, match="takes no Conv1D"):
        export(Delta.build(parse("oft(b=8, at='ffn.up')"), Backbone(tiny("gpt2"))), Backbone(tiny("gpt2")))


def back(delta: Delta, tmp_path: Path, family: str, backbone: Backbone) -> None:
    """Export of an import: the same bits, and PEFT computes the same with it; our own folder between changes nothing."""
    delta.save(str(tmp_path / "ours"))
    write(export(Delta.load(str(tmp_path / "ours"), backbone), backbone), tmp_path / "again")
    before, after = load_file(tmp_path / "theirs" / TENSORS), load_file(tmp_path / "again" / TENSORS)
    copies = {key for key in before if key.endswith("base_layer.weight")}  # of the backbone's own weights
    drawn = {"base_model.vera_A", "base_model.vera_B"} - before.keys()  # PEFT need not save these, we always do
    assert before.keys() - copies == after.keys() - drawn
    assert all(torch.equal(before[key], after[key]) for key in after.keys() - drawn)
    if not copies and not (drawn & after.keys()):
        assert (tmp_path / "theirs" / TENSORS).read_bytes() == (tmp_path / "again" / TENSORS).read_bytes()
    same(delta, peft.PeftModel.from_pretrained(tiny(family), str(tmp_path / "again")), family, backbone)


IA3S: list[tuple[str, dict[str, Any]]] = [
    ("bert", dict(target_modules=r".*(key|value|layer\.\d+\.output\.dense)", feedforward_modules=r".*layer\.\d+\.output\.dense")),
    ("roberta", dict(target_modules=["key", "value"], feedforward_modules=[])),
    ("gpt2", dict(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True)),
    ("llama", {}),
    ("t5", {}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "options"), IA3S)
def test_ia3_of_peft_computes_the_same_here(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    theirs = theirs_in(tmp_path / "theirs", family, peft.IA3Config(task_type=TASK.get(family), **options))
    backbone = Backbone(tiny(family))
    delta = Delta.load(str(tmp_path / "theirs"), backbone)
    same(delta, theirs, family, backbone)
    back(delta, tmp_path, family, backbone)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_prompt_of_peft_computes_the_same_here(tmp_path: Path, family: str) -> None:
    config = peft.PromptTuningConfig(task_type=TASK[family], num_virtual_tokens=3, num_transformer_submodules=1)
    theirs = theirs_in(tmp_path / "theirs", family, config)
    backbone = Backbone(tiny(family))
    delta = Delta.load(str(tmp_path / "theirs"), backbone)
    same(delta, theirs, family, backbone)
    back(delta, tmp_path, family, backbone)


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_p_tuning_of_peft_computes_the_same_here(tmp_path: Path, family: str, kind: str) -> None:
    """What its network made is all that the file holds: it comes back as a prompt."""
    config = peft.PromptEncoderConfig(
        task_type=TASK[family], num_virtual_tokens=3, num_transformer_submodules=1, encoder_hidden_size=8,
        encoder_reparameterization_type=kind,
    )  # fmt: skip
    theirs = theirs_in(tmp_path / "theirs", family, config)
    backbone = Backbone(tiny(family))
    delta = Delta.load(str(tmp_path / "theirs"), backbone)
    assert str(delta.spec) == "prompt(n=3)"
    same(delta, theirs, family, backbone)
    back(delta, tmp_path, family, backbone)


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
def test_prefix_of_peft_computes_the_same_here(tmp_path: Path, family: str, projected: bool) -> None:
    task = TASK.get(family, "FEATURE_EXTRACTION")
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3, prefix_projection=projected)
    theirs = theirs_in(tmp_path / "theirs", family, config)
    backbone = Backbone(tiny(family))
    delta = Delta.load(str(tmp_path / "theirs"), backbone)
    same(delta, theirs, family, backbone)
    back(delta, tmp_path, family, backbone)


TOKENS: list[tuple[str, dict[str, Any]]] = [
    ("bert", {}),
    ("gpt2", {}),  # its head shares the table
    ("llama", {}),
    ("llama", dict(target_modules=["embed_tokens", "lm_head"])),
]


@pytest.mark.parametrize(("family", "options"), TOKENS)
def test_trained_tokens_of_peft_compute_the_same_here(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    config = peft.TrainableTokensConfig(task_type=TASK.get(family), token_indices=list(range(60, 20, -1)), **options)
    theirs = theirs_in(tmp_path / "theirs", family, config)
    backbone = Backbone(tiny(family))
    delta = Delta.load(str(tmp_path / "theirs"), backbone)
    same(delta, theirs, family, backbone)
    back(delta, tmp_path, family, backbone)


LNS: list[tuple[str, dict[str, Any]]] = [
    ("bert", dict(target_modules=["LayerNorm"])),
    ("bert", dict(target_modules=r".*attention\.output\.LayerNorm")),
    ("gpt2", {}),
    ("llama", {}),
    ("t5", {}),
]


@pytest.mark.parametrize(("family", "options"), LNS)
def test_ln_tuning_of_peft_computes_the_same_here(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    theirs = theirs_in(tmp_path / "theirs", family, peft.LNTuningConfig(task_type=TASK.get(family), **options))
    backbone = Backbone(tiny(family))
    delta = Delta.load(str(tmp_path / "theirs"), backbone)
    same(delta, theirs, family, backbone)
    back(delta, tmp_path, family, backbone)


OURS = [
    *((family, "lora(r=4)") for family in ("bert", "roberta", "distilbert", "gpt2", "llama", "t5")),
    ("bert", "lora(r=4, alpha=7, at='attn.{q,k,v,o} ffn.{up,down}')"),
    ("bert", "lora(r=2, at='ffn.down', blocks='-1:')"),
    ("bert", "lora(r=2, at='attn.q') | lora(r=3, alpha=5, at='attn.q ffn.up')"),
    ("bert", "lora(r=2, tie='A')"),
    ("gpt2", "lora(r=2, at='attn.{q,k,v,o} ffn.{up,down}')"),
    ("gpt2", "lora(r=2, alpha=8, at='attn.q') | lora(r=3, alpha=5, at='attn.v')"),
    ("llama", "lora(r=4, at='attn.{q,k,v,o} ffn.{up,gate,down} lm_head')"),
    ("t5", "lora(r=4, at='attn.q cross.{k,o} ffn.up')"),
    *((family, "dora(r=4)") for family in ("bert", "gpt2", "llama", "t5")),
    ("bert", "dora(r=2, alpha=5, at='attn.q') | dora(r=3, at='ffn.{up,down}')"),
    ("gpt2", "dora(r=2, at='attn.{q,k,v,o} ffn.{up,down}')"),
    *((family, "oft(b=8)") for family in ("bert", "llama", "t5")),
    ("llama", "oft(b=4, share=True, neumann=6, at='attn.{q,o} ffn.down')"),
    ("bert", "oft(b=8, at='attn.q') | oft(b=12, at='ffn.down')"),
    *((family, "vera(r=6)") for family in ("bert", "llama", "t5")),
    ("gpt2", "vera(r=6, key=2, at='attn.v ffn.{up,down}')"),
    ("llama", "vera(r=6, at='attn.{q,o} ffn.down', blocks='-1')"),
    *((family, "lora(r=4, at='attn.q embed')") for family in ("bert", "roberta", "distilbert", "gpt2", "llama", "t5")),
    ("bert", "lora(r=2, at='embed') | lora(r=3, alpha=5, at='attn.q', dropout=0.0)"),
    *((family, "trainabletokens(tokens='90:,5,3:50')") for family in ("bert", "roberta", "distilbert", "llama")),
    ("gpt2", "trainabletokens(tokens='5:', at='embed lm_head', tie='change')"),
    ("llama", "trainabletokens(tokens='5:', at='embed lm_head')"),
    ("bert", "lora(r=2) | trainabletokens(tokens='5:')"),
    ("gpt2", "trainabletokens(at='embed lm_head', tie='change') | lora(r=2)"),
    *((family, "ia3") for family in ("bert", "roberta", "distilbert", "gpt2", "llama", "t5")),
    ("gpt2", "ia3(at='attn.k')"),
    *((family, "lntuning") for family in ("bert", "roberta", "distilbert", "gpt2", "llama", "t5")),
    ("gpt2", "lntuning(at='norm.{attn,final}')"),
    *((family, "ptuning(n=3, m=8)") for family in ("gpt2", "llama", "t5")),
    *((family, "prompt(n=3)") for family in ("gpt2", "llama", "t5")),
    *((family, "prefix(n=3, shift=True)") for family in ("bert", "roberta", "gpt2", "llama")),
]


@pytest.mark.parametrize(("family", "text"), OURS)
def test_ours_computes_the_same_in_peft(tmp_path: Path, family: str, text: str) -> None:
    backbone = Backbone(tiny(family))
    delta = moved(Delta.build(parse(text), backbone, seed=1))
    write(export(delta, backbone), tmp_path / "out")
    assert {file.name for file in tmp_path.rglob("*")} == {"out", CONFIG, TENSORS}
    theirs = peft.PeftModel.from_pretrained(tiny(family), str(tmp_path / "out"))
    same(delta, theirs, family, backbone)
    same(Delta.load(str(tmp_path / "out"), backbone), theirs, family, backbone)
