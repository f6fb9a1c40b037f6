"""Quantised backbones: every method of activations trains on them, and what would write weights is refused by name."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tests.engine.subjects import SPECS, adapted, backward, close
from tests.fit.tiny import backbone as worded
from tests.fit.tiny import task
from torch import nn

import deltatune as dt
from deltatune.backbone.fingerprint import compare
from deltatune.backbone.load import Backbone
from deltatune.backbone.weights import quantised, read_weight
from deltatune.compose.expression import parse
from deltatune.delta.delta import Delta
from deltatune.delta.merge import merge
from deltatune.errors import BackboneMismatch, SiteError
from deltatune.laws.families import build, tiny
from deltatune.laws.subject import Subject, same_bits

torchao = pytest.importorskip("torchao.quantization", reason="needs the extra `quant`")

FAMILIES = ("bert", "llama", "t5")
FORMS = {
    "weights": torchao.Int8WeightOnlyConfig,
    "weights and activations": torchao.Int8DynamicActivationInt8WeightConfig,
}


def int8(family: str, form: str = "weights") -> Backbone:
    module = tiny(family)
    torchao.quantize_(module, FORMS[form]())
    return Backbone(module, name=family)


def dequantised(on: Backbone) -> Backbone:
    """The same network with plain weights of the values that the quantised ones stand for."""
    module = copy.deepcopy(on.module)
    for path, _ in on.module.named_parameters():
        owner, _, name = path.rpartition(".")
        module.get_submodule(owner)._parameters[name] = nn.Parameter(read_weight(on.module, path).clone())
    return Backbone(module, name=on.name)


def both(text: str, left: Backbone, right: Backbone) -> list[tuple[list[torch.Tensor], dict[str, Any]]]:
    """Outputs and gradients of one delta on two backbones; a delta's start may not depend on which it is."""
    found = []
    for on in (left, right):
        held = Subject(parse(text), on)
        rows = held.rows(4)
        model = adapted(text, on, verify=False)
        model.bank.train()
        outputs = held.run(model, rows, "one")
        found.append((outputs, backward(model, outputs, rows)))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", SPECS)
def test_int8_weights_give_what_the_dequantised_give(text: str, family: str) -> None:
    on = int8(family)
    assert quantised(on.module) == "Int8Tensor"
    (got, after), (wanted, before) = both(text, on, dequantised(on))
    close(got, wanted, 2e-5)
    for name, gradient in before.items():
        # Relative to all of them: the true gradient of a key's bias is zero.
        scale = max(float(g.abs().max()) for g in before.values())
        torch.testing.assert_close(after[name], gradient, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", SPECS)
def test_gradients_pass_quantised_activations(text: str, family: str) -> None:
    """torchao's kernel has no gradient; where a residual goes around it, that would not even fail."""
    on = int8(family, "weights and activations")
    (_, after), (_, before) = both(text, on, dequantised(on))
    got, wanted = (torch.cat([g.flatten() for g in found.values()]) for found in (after, before))
    assert float(nn.functional.cosine_similarity(got, wanted, dim=0)) > 0.98
    assert all(gradient.any() for name, gradient in after.items() if "key" not in name)


def test_gradient_through_one_quantised_linear_is_that_of_its_weight() -> None:
    """The last block's last linear alone: no other rounding lies between it and the loss."""
    on = int8("llama", "weights and activations")
    model = adapted("ia3(at='ffn.down', blocks='-1')", on)
    down = on.module.get_submodule("model.layers.1.mlp.down_proj")
    seen: dict[str, torch.Tensor] = {}

    def keep(_: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        for name, value in (("entry", args[0]), ("exit", output)):
            value.retain_grad()
            seen[name] = value

    down.register_forward_hook(keep)
    model(input_ids=torch.arange(3, 10)[None]).logits.square().sum().backward()
    wanted = seen["exit"].grad @ read_weight(down, "weight")
    torch.testing.assert_close(seen["entry"].grad, wanted)
    assert wanted.any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_fit_runs_on_int8_and_its_delta_is_known_again(family: str, form: str, tmp_path: Any) -> None:
    on = worded(family)
    torchao.quantize_(on.module, FORMS[form]())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run = dt.fit(on, "lora(r=2)", task(), steps=6, batch=4, precision="float32")
        run.delta.save(str(tmp_path / "it"))
        Delta.load(str(tmp_path / "it"), on)
    with pytest.warns(UserWarning, match="trained on the same backbone in quantised Int8Tensor"):
        Delta.load(str(tmp_path / "it"), worded(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_removal_gives_the_quantised_network_back(family: str) -> None:
    on = int8(family, "weights and activations")
    before = {name: read_weight(on.module, name).clone() for name, _ in on.module.named_parameters()}
    flags = {name: p.requires_grad for name, p in on.module.named_parameters()}
    model = adapted("lora(r=2) | adapter(m=2)", on)
    held = Subject(parse("lora"), on)
    held.run(model, held.rows(2), "one")
    model.remove()
    assert {name: p.requires_grad for name, p in on.module.named_parameters()} == flags
    assert all(same_bits(read_weight(on.module, name), value) for name, value in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in on.module.modules())


@pytest.mark.parametrize("text", ["lora", "ia3", "bitfit"])
def test_merging_into_quantised_weights_is_refused(text: str) -> None:
    on = int8("llama")
    delta = Delta.build(parse(text), on)
    with pytest.raises(SiteError, match=r"cannot be merged: the weights of 'llama' are quantised \(Int8Tensor\)"):
        merge(on, delta)


def test_deltas_of_weights_are_refused_by_name() -> None:
    with pytest.raises(SiteError, match=r"delta 'full' changes the weights themselves.*quantised \(Int8Tensor\)"):
        dt.adapt(int8("bert"), parse("full"))


@pytest.mark.parametrize("family", FAMILIES)
def test_fingerprint_of_quantised_weights(family: str) -> None:
    plain, twice, other = Backbone(tiny(family)), int8(family), Backbone(build(family, seed=7))
    found = int8(family).fingerprint()
    assert compare(found, twice.fingerprint()) == "same"
    assert compare(plain.fingerprint(), found) == compare(found, plain.fingerprint()) == "same up to dtype"
    half = Backbone(tiny(family).to(torch.bfloat16)).fingerprint()
    assert compare(half, found) == "same up to dtype"
    assert compare(other.fingerprint(), found) == compare(found, other.fingerprint()) == "different"
    torchao.quantize_(other.module, FORMS["weights"]())
    assert compare(other.fingerprint(), found) == "different"
    older = {name: value for name, value in plain.fingerprint().items() if name != "sketch"}
    assert compare(older, found) == "different"  # nothing to compare by
    with pytest.raises(BackboneMismatch, match="trained on other weights"):
        dt.adapt(other, Delta.build(parse("lora"), plain))


def test_a_sketch_does_not_soften_the_answer_for_plain_weights() -> None:
    moved = tiny("bert")
    with torch.no_grad():
        moved.get_parameter("encoder.layer.0.output.dense.weight")[0, 0] += 1e-3
    assert compare(Backbone(tiny("bert")).fingerprint(), Backbone(moved).fingerprint()) == "different"
    assert compare(Backbone(tiny("bert")).fingerprint(), Backbone(moved.bfloat16()).fingerprint()) == "different"


ON = "cuda" if torch.cuda.is_available() else "cpu"


def nf4(folder: Path, kind: str = "nf4", *, double: bool = False) -> tuple[Backbone, Backbone]:
    """A network in four bits, and one with plain weights of the values that these stand for."""
    pytest.importorskip("bitsandbytes", reason="needs the extra `quant`")
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=99, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=192, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        initializer_range=0.1,
    )  # fmt: skip
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    form = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    four = hf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=form, device_map=ON, dtype=torch.float32)
    plain = hf.AutoModelForCausalLM.from_pretrained(folder).to(ON)
    for path, _ in four.named_parameters():
        plain.get_parameter(path).data = read_weight(four, path).to(torch.float32)
    return Backbone(four.eval(), name="four"), Backbone(plain.eval(), name="plain")


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("text", SPECS)
def test_nf4_gives_what_the_dequantised_give(text: str, double: bool, tmp_path: Path) -> None:
    on, plain = nf4(tmp_path, double=double)
    assert quantised(on.module) == "Params4bit"
    (got, after), (wanted, before) = both(text, on, plain)
    close([g.float() for g in got], wanted, 5e-2)  # its kernels for some CPUs compute in bfloat16
    left, right = (torch.cat([g.flatten().float() for g in found.values()]) for found in (after, before))
    assert float(nn.functional.cosine_similarity(left, right, dim=0)) > 0.999


@pytest.mark.filterwarnings("ignore:delta .* was trained on the same backbone in quantised")
@pytest.mark.parametrize("double", [False, True])
def test_nf4_is_read_alike_before_and_after_its_use(double: bool, tmp_path: Path) -> None:
    """For some CPUs bitsandbytes packs weights anew at the first evaluation, and its gradients stop there."""
    on, plain = nf4(tmp_path, double=double)
    held = Subject(parse("lora"), on)
    with torch.no_grad():
        on.module(**held.batch(held.rows(2)))
    for path, parameter in plain.module.named_parameters():
        torch.testing.assert_close(read_weight(on.module, path).float(), parameter, rtol=2e-2, atol=2e-3)
    assert compare(Backbone(plain.module).fingerprint(), Backbone(on.module).fingerprint()) == "same up to dtype"
    (_, after), (_, before) = both("dora(r=2)", on, plain)
    left, right = (torch.cat([g.flatten().float() for g in found.values()]) for found in (after, before))
    assert float(nn.functional.cosine_similarity(left, right, dim=0)) > 0.999


@pytest.mark.filterwarnings("ignore:delta .* was trained on the same backbone in quantised")
def test_nf4_is_fitted_on_and_refuses_what_writes_weights(tmp_path: Path) -> None:
    on, _ = nf4(tmp_path)
    on.processor = worded("llama").processor
    run = dt.fit(on, "lora(r=2)", task(), steps=6, batch=4, precision="float32")
    assert run.delta.fingerprint["dtype"] == "quantised Params4bit"
    with pytest.raises(SiteError, match=r"quantised \(Params4bit\)"):
        merge(on, run.delta)
    with pytest.raises(SiteError, match=r"quantised \(Params4bit\)"):
        dt.adapt(on, parse("full"))
