"""OpenDelta's folders: what it wrote computes the same here; what would not is refused by name."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.oracles import opendelta
from torch import Tensor, nn

from deltatune.backbone.load import Backbone
from deltatune.delta.adapted import adapt
from deltatune.delta.delta import Delta
from deltatune.errors import DeltaFileError, UserError
from deltatune.laws.families import inputs, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be verified", "ignore:Detected pickle protocol")
KEY = {
    "lora": ".lora.", "adapter": ".adapter.", "parallel_adapter": ".parallel_adapter.", "prefix": ".prefix.",
    "soft_prompt": "soft_prompt_layer.",
}  # fmt: skip
ATTN = {
    "bert": "encoder.layer.{}.attention", "roberta": "encoder.layer.{}.attention", "gpt2": "transformer.h.{}.attn",
}  # fmt: skip
ENDS = {
    "bert": ("encoder.layer.{}.attention.output.dense", "encoder.layer.{}.output.dense"),
    "gpt2": ("transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"),
}
ENDS["roberta"] = ENDS["bert"]
T5_ENDS = [
    *(f"encoder.block.{i}.layer.{end}" for i in (0, 1) for end in ("0.SelfAttention.o", "1.DenseReluDense.wo")),
    *(f"decoder.block.{i}.layer.{end}" for i in (0, 1) for end in ("0.SelfAttention.o", "2.DenseReluDense.wo")),
]
T5_QV = [f"{stack}.block.{i}.layer.0.SelfAttention.{x}" for stack in ("encoder", "decoder") for i in (0, 1) for x in "qv"]  # fmt: skip


def default(*names: str) -> dict[str, Any]:
    """The options of a delta at its default places, which are named in the common structure."""
    return {"modified_modules": list(names), "common_structure": True}


def twice(*patterns: str) -> list[str]:
    return [pattern.format(block) for block in (0, 1) for pattern in patterns]


def saved(folder: Path, model: nn.Module, kind: str, own: str | Callable[[str], bool] = "", **options: Any) -> Path:
    mark = KEY.get(kind, "") if own == "" else own
    chosen = mark if callable(mark) else lambda name: mark in f".{name}"
    opendelta.stirred(model, chosen)
    return opendelta.save(model, chosen, folder, kind, **options)


def computed(model: nn.Module, family: str) -> Tensor:
    """The first output where the mask counts; what a prompt adds is cut off."""
    batch = inputs(family)
    with torch.no_grad():
        out: Tensor = model(**batch)[0]
    return out if family == "t5" else out[:, -batch["input_ids"].shape[1] :][batch["attention_mask"].bool()]


def same(folder: Path, theirs: nn.Module, family: str, spec: str) -> Delta:
    """Demand equal outputs to 5e-6 of their norm (float32), also after saving as ours, and that the delta does something."""
    backbone = Backbone(tiny(family))
    delta = Delta.load(str(folder), backbone)
    delta.save(str(folder.parent / "ours"))
    assert str(delta.spec) == spec
    second, bare = computed(theirs.eval(), family), computed(tiny(family), family)
    assert float((bare - second).abs().max()) > 1e-2
    for one in (delta, Delta.load(str(folder.parent / "ours"), backbone)):
        with adapt(backbone, one) as adapted:
            first = computed(adapted, family)
        assert float((first - second).norm() / second.norm()) < 5e-6
    return delta


LORA = default("attn@.q@", "attn@.v@")


@pytest.mark.parametrize(
    ("family", "paths", "options", "spec"),
    [
        ("bert", twice("encoder.layer.{}.attention.self.query", "encoder.layer.{}.attention.self.value"), LORA, "lora(at='attn.q attn.v', r=3, alpha=7.0)"),
        ("roberta", twice("encoder.layer.{}.attention.self.query", "encoder.layer.{}.attention.self.value"), LORA, "lora(at='attn.q attn.v', r=3, alpha=7.0)"),
        ("t5", T5_QV, LORA, "lora(at='attn.q attn.v', r=3, alpha=7.0)"),
        ("bert", ["encoder.layer.1.intermediate.dense"], {"modified_modules": ["1.intermediate.dense"]}, "lora(at='ffn.up', blocks='1', r=3, alpha=7.0)"),
        ("bert", ["encoder.layer.0.attention.self.key"], {"modified_modules": ["key"], "exclude_modules": ["encoder.layer.1"]}, "lora(at='attn.k', blocks='0', r=3, alpha=7.0)"),
        ("bert", twice("encoder.layer.{}.attention.self.key"), {"modified_modules": [r"[r]attention\.self\.k.*"]}, "lora(at='attn.k', r=3, alpha=7.0)"),
    ],
)  # fmt: skip
def test_lora(tmp_path: Path, family: str, paths: list[str], options: dict[str, Any], spec: str) -> None:
    theirs = tiny(family)
    opendelta.lora(theirs, paths, 3, 7.0)
    folder = saved(tmp_path / "theirs", theirs, "lora", lora_r=3, lora_alpha=7, lora_dropout=0.0, **options)
    assert same(folder, theirs, family, spec).trainable() == sum(x.numel() for x in torch.load(folder / "pytorch_model.bin").values())  # fmt: skip


ADAPTER = default("attn@.proj@", "ff@.w2@")


@pytest.mark.parametrize(
    ("family", "paths", "options", "spec"),
    [
        ("bert", twice(*ENDS["bert"]), ADAPTER, "adapter(m=5, act='gelu_tanh')"),
        ("roberta", twice(*ENDS["roberta"]), ADAPTER, "adapter(m=5, act='gelu_tanh')"),
        ("gpt2", twice(*ENDS["gpt2"]), ADAPTER, "adapter(m=5, act='gelu_tanh')"),
        ("t5", T5_ENDS, ADAPTER, "adapter(m=5, act='gelu_tanh')"),
        # Modules that hold others: what they give is what a norm, a linear or the block gives.
        ("bert", twice("encoder.layer.{}.attention"), {"modified_modules": ["attention"]}, "adapter(at='norm.attn', m=5, act='gelu_tanh')"),
        ("bert", ["encoder.layer.1.output"], {"modified_modules": ["layer.1.output"]}, "adapter(at='norm.ffn', blocks='1', m=5, act='gelu_tanh')"),
        ("gpt2", twice("transformer.h.{}.attn", "transformer.h.{}.mlp"), default("attn@", "ff@"), "adapter(m=5, act='gelu_tanh')"),
        ("t5", ["encoder.block.1.layer.1"], {"modified_modules": ["encoder.block.1.layer.1"]}, "adapter(at='block', blocks='1', m=5, act='gelu_tanh')"),
    ],
)  # fmt: skip
def test_adapter(tmp_path: Path, family: str, paths: list[str], options: dict[str, Any], spec: str) -> None:
    theirs = tiny(family)
    opendelta.adapter(theirs, paths, 32, 5)
    folder = saved(tmp_path / "theirs", theirs, "adapter", bottleneck_dim=5, non_linearity="gelu_new", **options)
    same(folder, theirs, family, spec)


@pytest.mark.parametrize(
    ("act", "ours"),
    [("relu", "relu"), ("tanh", "tanh"), ("swish", "silu"), ("gelu_orig", "gelu"), ("leakyrelu", "leaky_relu")],
)
def test_activations(tmp_path: Path, act: str, ours: str) -> None:
    theirs = tiny("bert")
    opendelta.adapter(theirs, twice("encoder.layer.{}.output.dense"), 32, 24, act)
    options = {"bottleneck_dim": 24, "non_linearity": act, "modified_modules": ["layer.0.output.dense", "layer.1.output.dense"]}  # fmt: skip
    folder = saved(tmp_path / "theirs", theirs, "adapter", **options)
    same(folder, theirs, "bert", f"adapter(at='ffn'{f', act={ours!r}' if ours != 'gelu' else ''})")


PARALLEL = default("attn@", "attn@", "ff@.w1@", "ff@.w2@")


@pytest.mark.parametrize(
    ("family", "pairs", "options", "spec"),
    [
        ("bert", [(f"encoder.layer.{i}.intermediate.dense", f"encoder.layer.{i}.output.dense") for i in (0, 1)],
         default("ff@.w1@", "ff@.w2@"), "parallel_adapter(m=5, scale=1.0, act='gelu_tanh')"),
        ("gpt2", [pair for i in (0, 1) for pair in ((f"transformer.h.{i}.attn", f"transformer.h.{i}.attn"),
         (f"transformer.h.{i}.mlp.c_fc", f"transformer.h.{i}.mlp.c_proj"))], PARALLEL,
         "parallel_adapter(at='attn ffn', m=5, scale=1.0, act='gelu_tanh')"),
        ("t5", [(f"{where}.DenseReluDense.wi", f"{where}.DenseReluDense.wo") for where in
         (*(f"encoder.block.{i}.layer.1" for i in (0, 1)), *(f"decoder.block.{i}.layer.2" for i in (0, 1)))],
         {"modified_modules": ["wi", "wo"]}, "parallel_adapter(m=5, scale=1.0, act='gelu_tanh')"),
    ],
)  # fmt: skip
def test_parallel_adapter(
    tmp_path: Path, family: str, pairs: list[tuple[str, str]], options: dict[str, Any], spec: str
) -> None:
    theirs = tiny(family)
    opendelta.parallel_adapter(theirs, pairs, 32, 5)
    more = {"bottleneck_dim": 5, "non_linearity": "gelu_new", "scaled": None, **options}
    folder = saved(tmp_path / "theirs", theirs, "parallel_adapter", **more)
    assert not any("parallel_adapter_1" in key for key in torch.load(folder / "pytorch_model.bin"))
    same(folder, theirs, family, spec)


BITFIT = default("attn@", "ff@", "layer_norm@", "lm_head@.proj@")
BERT_BIASES = twice(
    *(f"encoder.layer.{{}}.attention.{x}" for x in ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")),
    *(f"encoder.layer.{{}}.{x}" for x in ("intermediate.dense", "output.dense", "output.LayerNorm")),
)  # fmt: skip
GPT2_BIASES = [
    *twice(*(f"transformer.h.{{}}.{x}" for x in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"))),
    "transformer.ln_f",
]  # fmt: skip


@pytest.mark.parametrize(("family", "paths"), [("bert", BERT_BIASES), ("roberta", BERT_BIASES), ("gpt2", GPT2_BIASES)])
def test_bitfit(tmp_path: Path, family: str, paths: list[str]) -> None:
    theirs = tiny(family)
    opendelta.bitfit(theirs, paths)
    biases = {f"{path}.bias" for path in paths}
    folder = saved(tmp_path / "theirs", theirs, "bitfit", lambda name: name in biases, **BITFIT)
    backbone = Backbone(tiny(family))
    delta = Delta.load(str(folder), backbone)
    assert {site.exit for site, _ in delta.at_sites()} == set(paths)
    second = computed(theirs, family)
    with adapt(backbone, delta) as adapted:
        first = computed(adapted, family)
    assert float((second - computed(tiny(family), family)).abs().max()) > 1e-2
    assert float((first - second).norm() / second.norm()) < 5e-6


def test_bitfit_of_a_network_without_biases(tmp_path: Path) -> None:
    theirs = tiny("t5")
    linears = [
        p for p, m in theirs.named_modules() if isinstance(m, nn.Linear) and "EncDec" not in p and p != "lm_head"
    ]
    norms = [p for p, _ in theirs.named_modules() if p.endswith("layer_norm")]
    opendelta.bitfit(theirs, linears, norms)
    folder = saved(tmp_path / "theirs", theirs, "bitfit", lambda name: name.endswith(".bias"), **BITFIT)
    backbone = Backbone(tiny("t5"))
    delta = Delta.load(str(folder), backbone)
    assert {site.exit for site, _ in delta.at_sites()} == {*linears, *norms}
    second = computed(theirs, "t5")
    with adapt(backbone, delta) as adapted:
        first = computed(adapted, "t5")
    assert float((second - computed(tiny("t5"), "t5")).abs().max()) > 1e-2
    assert float((first - second).norm() / second.norm()) < 5e-6


@pytest.mark.parametrize("network", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_prefix(tmp_path: Path, family: str, network: bool) -> None:
    theirs = opendelta.Prefixed(tiny(family), twice(ATTN[family]), 3, network)
    options = {"prefix_token_num": 3, "reparameterize": network, "embed_dim": 6, "mid_dim": 5, **default("attn@")}
    folder = saved(tmp_path / "theirs", theirs.model, "prefix", ".reparams." if network else ".prefix.", **options)
    same(folder, theirs, family, "prefix(at='attn', n=3)")


def test_prefix_in_one_block(tmp_path: Path) -> None:
    model = tiny("gpt2")
    theirs = opendelta.Prefixed(model, ["transformer.h.0.attn"], 3, False)
    options = {"prefix_token_num": 3, "modified_modules": ["h.0.attn"], "reparameterize": False}
    folder = saved(tmp_path / "theirs", model, "prefix", **options)
    delta = Delta.load(str(folder), Backbone(tiny("gpt2")))
    assert str(delta.spec) == "prefix(at='attn', blocks='0', n=3)"
    (layer,) = delta.layers.values()
    assert torch.equal(layer.get_parameter("keys"), theirs.tables()[0][0])


@pytest.mark.parametrize(("family", "at"), [("gpt2", ""), ("t5", "encoder")])
def test_soft_prompt(tmp_path: Path, family: str, at: str) -> None:
    theirs = opendelta.Prompted(tiny(family), 3, at)
    options = {"soft_token_num": 3, "token_init": True, "init_range": 0.5, "other_expand_ids": {"attention_mask": 1}}
    folder = saved(tmp_path / "theirs", theirs.model, "soft_prompt", modified_modules=["root"], **options)
    same(folder, theirs, family, "prompt(n=3)")


# What is refused


def plain(folder: Path, family: str = "bert", **options: Any) -> Path:
    """An OpenDelta LoRA on q and v of BERT."""
    model = tiny(family)
    opendelta.lora(model, twice("encoder.layer.{}.attention.self.query", "encoder.layer.{}.attention.self.value"), 2, 4)
    return saved(folder, model, "lora", **{"lora_r": 2, "lora_alpha": 4, **LORA, **options})


def edited(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = torch.load(folder / "pytorch_model.bin")
    change(tensors)
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def refused(folder: Path, said: str, family: str = "bert", kind: type[Exception] = DeltaFileError) -> None:
    with pytest.raises(kind, match=said) as caught:
        Delta.load(str(folder), Backbone(tiny(family)))
    assert "\n" not in str(caught.value)


QUERY = "encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{QUERY}.lora.lora_A"), f"lacks '{QUERY}.lora.lora_A', a part of '{QUERY}'"),
        (lambda t: [t.pop(key) for key in list(t) if QUERY in key], f"lacks tensors for '{QUERY}', which its modified_modules select"),
        (lambda t: t.update({k.replace("query", "key"): v for k, v in t.items()}), "self.key', which its modified_modules do not select"),
        (lambda t: t.update({f"{QUERY}.lora.lora_A": torch.zeros(3, 32)}), r"'A' of '.*' has shape \(3, 32\), expected \(2, 32\)"),
        (lambda t: t.update({f"{QUERY}.lora_1.lora_A": torch.zeros(2, 32)}), "of a delta 'lora_1' that its config.json does not describe"),
        (lambda t: t.update({f"{QUERY}.adapter.modulelist.up_proj.bias": torch.zeros(2)}), "of a delta 'adapter' that"),
        (lambda t: t.update({f"{QUERY}.weight": torch.zeros(32, 32)}), "a weight of the backbone, trained whole"),
        (lambda t: t.update({"encoder.layer.7.output.dense.weight": torch.zeros(2)}), "at no site"),
        (lambda t: t.update({k.replace("layer.1", "layer.7"): v for k, v in t.items()}), "layer.7.*at no site of"),
        (lambda t: t.update({"steps": 3}), "'steps', which is no tensor"),
        (lambda t: t.update({"ids": torch.arange(3)}), "'ids', which is no tensor of floating numbers"),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, change: Callable[[Any], None], said: str) -> None:
    refused(edited(plain(tmp_path / "theirs"), change), said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"delta_type": "compacter"}, "holds 'compacter' .*Kronecker"),
        ({"delta_type": "low_rank_adapter"}, "holds 'low_rank_adapter' .*thin"),
        ({"delta_type": "lroa"}, "holds 'lroa', which is not read; expected lora"),
        ({"delta_type": ["lora"]}, "holds .*which is not read"),
        ({"backend": "bmt"}, "backend='bmt'"),
        ({"gated": True}, "gated=True, which has no counterpart here"),
        ({"lora_r": "two"}, "config.json is damaged: ValueError"),
        ({"modified_modules": None}, "config.json is damaged: TypeError"),
        (
            {"modified_modules": ["[r]("], "common_structure": False},
            "config.json is damaged: (re.)?(PatternError|error)",
        ),
    ],
)
def test_an_option_without_a_counterpart_is_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    folder = plain(tmp_path / "theirs")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **options}))
    refused(folder, said)


def test_an_activation_that_is_not_ours_is_refused_by_name(tmp_path: Path) -> None:
    theirs = tiny("bert")
    opendelta.adapter(theirs, twice("encoder.layer.{}.output.dense"), 32, 5)
    options = {"bottleneck_dim": 5, "non_linearity": "mish", "modified_modules": ["0.output.dense", "1.output.dense"]}
    refused(saved(tmp_path / "theirs", theirs, "adapter", **options), "unknown activation 'mish'", kind=UserError)


@pytest.mark.parametrize(("family", "path"), [("t5", "encoder.block.0.layer.0"), ("gpt2", "transformer.h.0")])
def test_an_adapter_behind_a_residual_stands_at_a_block_or_is_refused(tmp_path: Path, family: str, path: str) -> None:
    theirs = tiny(family)
    opendelta.adapter(theirs, [path], 32, 5, "relu")
    options = {"bottleneck_dim": 5, "non_linearity": "relu", "modified_modules": [path]}
    folder = saved(tmp_path / "theirs", theirs, "adapter", **options)
    if family == "t5":
        refused(folder, f"'{path}' gives is at no site of", family)
    else:
        same(folder, theirs, family, "adapter(at='block', blocks='0', m=5, act='relu')")


def test_a_parallel_adapter_around_a_norm_is_refused(tmp_path: Path) -> None:
    theirs = tiny("bert")
    pairs = [("encoder.layer.0.attention", "encoder.layer.0.attention")]
    opendelta.parallel_adapter(theirs, pairs, 32, 5)
    options = {"bottleneck_dim": 5, "non_linearity": "relu", "modified_modules": ["0.attention", "0.attention"]}
    folder = saved(tmp_path / "theirs", theirs, "parallel_adapter", **options)
    refused(folder, r"a residual or norm between\) .* has no site")


def test_a_prefix_on_t5_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = tiny("t5")
    holder = nn.Module()
    holder.past_key, holder.past_value = nn.Parameter(torch.zeros(3, 32)), nn.Parameter(torch.zeros(3, 32))
    model.get_submodule("encoder.block.0.layer.0.SelfAttention").add_module("prefix", holder)
    folder = saved(
        tmp_path / "theirs", model, "prefix", prefix_token_num=3, modified_modules=["encoder.block.0.layer.0"]
    )
    refused(folder, "the blocks after the first lose their table of positions", "t5")


def test_a_prompt_for_an_encoder_is_refused_with_the_reason(tmp_path: Path) -> None:
    theirs = opendelta.Prompted(tiny("bert"), 3)
    folder = saved(tmp_path / "theirs", theirs.model, "soft_prompt", soft_token_num=3, modified_modules=["root"])
    refused(folder, "OpenDelta puts it before the first token")


def test_it_warns_that_the_backbone_is_not_verified_and_what_is_left_out(tmp_path: Path) -> None:
    folder = edited(plain(tmp_path / "theirs"), lambda t: t.update({"classifier.weight": torch.zeros(2, 32)}))
    with pytest.warns(UserWarning, match="names 'their-backbone'.*cannot be verified; its head classifier is not read"):
        delta = Delta.load(str(folder), Backbone(tiny("bert")))
    assert delta.record["imported"] == {"from": "opendelta", "version": "0.3.0", "base": "their-backbone"}


def test_a_file_of_a_network_with_a_head_is_read_onto_the_trunk(tmp_path: Path) -> None:
    folder = edited(plain(tmp_path / "theirs"), lambda t: [t.update({f"bert.{key}": t.pop(key)}) for key in list(t)])
    edited(folder, lambda t: t.update({"cls.predictions.bias": torch.zeros(99)}))
    delta = Delta.load(str(folder), Backbone(tiny("bert")))
    kept = Delta.load(str(plain(tmp_path / "plain")), Backbone(tiny("bert")))
    assert all(torch.equal(one, other) for one, other in zip(delta.parameters(), kept.parameters(), strict=True))


class Harmful:
    """What would run if a pickle were opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("write", [torch.save, lambda what, file: file.write_bytes(pickle.dumps(what))])
def test_nothing_in_the_file_runs(tmp_path: Path, write: Callable[[Any, Path], None]) -> None:
    folder, mark = plain(tmp_path / "theirs"), tmp_path / "ran"
    write({"a": Harmful(mark)}, folder / "pytorch_model.bin")
    refused(folder, "holds something else than tensors, which is never unpickled")
    assert not mark.exists()
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "lacks pytorch_model.bin")


def test_without_a_backbone_it_says_what_to_do(tmp_path: Path) -> None:
    folder = plain(tmp_path / "theirs")
    with pytest.raises(DeltaFileError, match=f"{re.escape(str(folder))} is a folder of OpenDelta.*deltatune import"):
        Delta.load(str(folder))


def test_the_folder_of_a_network_is_not_taken_for_one(tmp_path: Path) -> None:
    folder = tmp_path / "network"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert", "transformers_version": "4.24.0"}')
    torch.save({"a": torch.zeros(2)}, folder / "pytorch_model.bin")
    refused(folder, "is no saved delta")
