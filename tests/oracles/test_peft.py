"""PEFT as the oracle: with the same weights, the same outputs and the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Site
from deltatune.delta.adapted import Adapted
from deltatune.delta.delta import Delta
from deltatune.delta.layer import Layer
from deltatune.delta.method import Method
from deltatune.laws.families import inputs, tiny
from deltatune.laws.subject import moved
from deltatune.methods.addition.ia3 import IA3
from deltatune.methods.addition.prefix import Prefix
from deltatune.methods.addition.prompt import Prompt
from deltatune.methods.addition.ptuning import PTuning
from deltatune.methods.reparameterization.dora import DoRA
from deltatune.methods.reparameterization.lora import LoRA
from deltatune.methods.reparameterization.oft import OFT
from deltatune.methods.reparameterization.vera import VeRA
from deltatune.methods.specification.lntuning import LNTuning
from deltatune.methods.specification.trainabletokens import TrainableTokens

LINEARS = {
    "bert": {"attn.q": "query", "attn.k": "key", "attn.v": "value", "ffn.up": "intermediate.dense", "ffn.down":
    "output.dense"}, "llama": {"attn.q": "q_proj", "attn.k": "k_proj", "attn.v": "v_proj", "ffn.up": "up_proj",
    "ffn.down": "down_proj"}, "t5": {"attn.q": "SelfAttention.q", "attn.k": "SelfAttention.k", "attn.v":
    "SelfAttention.v", "ffn.up": "wi", "ffn.down": "wo"},
}  # fmt: skip
Pairs = list[tuple[Tensor, Tensor]]  # ours, theirs


def attached(spec: Method, family: str, size: float = 0.2) -> Adapted:
    backbone = Backbone(tiny(family))
    return Adapted(backbone, [moved(Delta.build(spec, backbone, name="ours"), size=size)])


def compared(
    ours: Adapted,
    theirs: nn.Module,
    family: str,
    copy: Callable[[], None],
    gradients: Callable[[], Pairs],
    **more: Tensor,
) -> None:
    """Copy our weights over; demand equal outputs, then equal gradients of a random projection of them."""
    with torch.no_grad():
        copy()
    batch = inputs(family)
    mask = batch["attention_mask"].bool()
    prompted = ours.bank.has_tokens
    ours.bank.train(False)
    theirs.eval()
    first = ours(**batch, **more)[0]
    second = theirs(**batch)[0]
    second = second[:, -first.shape[1] :] if prompted else second
    kept = torch.ones(first.shape[:2], dtype=torch.bool) if family == "t5" else mask
    assert first.shape == second.shape
    torch.testing.assert_close(first[kept], second[kept], rtol=1e-5, atol=1e-5)
    bare = ours(**batch, deltas=None)[0]
    assert float((bare - first)[kept].detach().abs().max()) > 1e-2  # else all of this would say nothing
    weights = torch.randn(first[kept].shape, generator=torch.Generator().manual_seed(1))
    (first[kept] * weights).sum().backward()
    (second[kept] * weights).sum().backward()
    pairs = gradients()
    assert pairs
    for own, other in pairs:
        assert float(other.abs().max()) > 0
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def each(ours: Adapted) -> list[tuple[Site, Layer]]:
    return ours.bank["ours"].at_sites()


def grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_lora(family: str) -> None:
    names = LINEARS[family]
    # BERT's output.dense is in the attention too, and names that part of a path would match both.
    part = ["attn.q", "attn.v", "ffn.up"] + ([] if family == "bert" else ["ffn.down"])
    ours = attached(LoRA(r=3, alpha=7.0, at=" ".join(part)), family)
    config = peft.LoraConfig(r=3, lora_alpha=7, lora_dropout=0.0, target_modules=[names[p] for p in part], bias="none")
    theirs = peft.get_peft_model(tiny(family), config)

    def module(site: Site) -> nn.Module:
        return theirs.get_submodule(f"base_model.model.{site.exit}")

    def copy() -> None:
        for site, layer in each(ours):
            module(site).lora_A["default"].weight.copy_(layer.A)
            module(site).lora_B["default"].weight.copy_(layer.B)

    def gradients() -> Pairs:
        found = []
        for site, layer in each(ours):
            found.append((grad(layer.A), grad(module(site).lora_A["default"].weight)))
            found.append((grad(layer.B), grad(module(site).lora_B["default"].weight)))
        return found

    compared(ours, theirs, family, copy, gradients)
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == ours.bank["ours"].trainable()


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "gpt2"])
def test_dora(family: str) -> None:
    """Lengths without a gradient of their own, biases apart; GPT-2's linears are [in, out]."""
    part = ["attn.q", "attn.v", "ffn.up"] if family != "gpt2" else ["attn.o", "ffn.up", "ffn.down"]
    targets = [LINEARS[family][p] for p in part] if family != "gpt2" else ["c_proj", "c_fc"]
    ours = attached(DoRA(r=3, alpha=7.0, at=" ".join(part)), family)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, use_dora=True, fan_in_fan_out=family == "gpt2")
    theirs = peft.get_peft_model(tiny(family), config)

    def pairs(pick: Callable[[Tensor], Tensor]) -> Pairs:
        found = []
        for site, layer in each(ours):
            module = theirs.get_submodule(f"base_model.model.{site.exit}")
            found.append((pick(layer.A), pick(module.lora_A["default"].weight)))
            found.append((pick(layer.B), pick(module.lora_B["default"].weight)))
            found.append((pick(layer.m), pick(module.lora_magnitude_vector["default"].weight)))
        return found

    def copy() -> None:
        for (site, layer), (_, lengths) in zip(each(ours), pairs(lambda p: p)[2::3], strict=True):
            fresh = Delta.build(DoRA(at=site.name, blocks=str(site.block)), ours.source)
            start = next(la.m for s, la in fresh.at_sites() if s.key == site.key)
            torch.testing.assert_close(start, lengths, rtol=1e-6, atol=0.0)  # both start at |W|
            assert not torch.allclose(layer.m, start)
        for own, other in pairs(lambda p: p):
            other.copy_(own)

    compared(ours, theirs, family, copy, lambda: pairs(grad))
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == ours.bank["ours"].trainable()


@pytest.mark.parametrize(
    "options", [{}, {"share": True}, {"neumann": 5}, {"neumann": 4, "share": True}, {"neumann": 8}]
)
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_oft(family: str, options: dict[str, Any]) -> None:
    part = ["attn.q", "attn.v", "ffn.up"]
    ours = attached(OFT(b=8, at=" ".join(part), **options), family, size=0.05)
    config = peft.OFTConfig(
        oft_block_size=8, block_share="share" in options, use_cayley_neumann="neumann" in options,
        num_cayley_neumann_terms=options.get("neumann", 5), target_modules=[LINEARS[family][p] for p in part],
    )  # fmt: skip
    theirs = peft.get_peft_model(tiny(family), config)

    def pairs(pick: Callable[[Tensor], Tensor]) -> Pairs:
        modules = ((layer, theirs.get_submodule(f"base_model.model.{site.exit}")) for site, layer in each(ours))
        return [(pick(layer.R), pick(module.oft_R["default"].weight)) for layer, module in modules]

    def copy() -> None:
        for own, other in pairs(lambda p: p):
            other.copy_(own)

    compared(ours, theirs, family, copy, lambda: pairs(grad))
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == ours.bank["ours"].trainable()


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "gpt2"])
def test_vera(family: str) -> None:
    """PEFT's random matrices are ours: only the vectors are copied."""
    part = ["attn.q", "attn.v", "ffn.up", *([] if family == "bert" else ["ffn.down"])]
    part = ["attn.o", "ffn.up", "ffn.down"] if family == "gpt2" else part
    targets = [LINEARS[family][p] for p in part] if family != "gpt2" else ["c_proj", "c_fc"]
    ours = attached(VeRA(r=10, key=3, at=" ".join(part)), family)
    config = peft.VeraConfig(r=10, projection_prng_key=3, target_modules=targets, fan_in_fan_out=family == "gpt2")
    theirs = peft.get_peft_model(tiny(family), config)

    def pairs(pick: Callable[[Tensor], Tensor]) -> Pairs:
        found = []
        for site, layer in each(ours):
            module = theirs.get_submodule(f"base_model.model.{site.exit}")
            found.append((pick(layer.b), pick(module.vera_lambda_b["default"])))
            found.append((pick(layer.d), pick(module.vera_lambda_d["default"])))
        return found

    def copy() -> None:
        for own, other in pairs(lambda p: p):
            other.copy_(own)

    compared(ours, theirs, family, copy, lambda: pairs(grad))
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == ours.bank["ours"].trainable()


def test_lora_on_the_fused_linear_of_gpt2() -> None:
    """Two products of rank r on the views q and v are one of rank 2r on the whole, with zeros where they do not meet."""
    r, width = 3, 32
    ours = attached(LoRA(r=r, alpha=6.0, at="attn.{q,v}"), "gpt2")
    config = peft.LoraConfig(
        r=2 * r, lora_alpha=12, lora_dropout=0.0, target_modules=["c_attn"], bias="none", fan_in_fan_out=True
    )
    theirs = peft.get_peft_model(tiny("gpt2"), config)

    def parts(layer: Layer, site: Site) -> tuple[Tensor, Tensor, slice, slice]:
        module = theirs.get_submodule(f"base_model.model.{site.exit}")
        rows = slice(0, r) if site.name == "attn.q" else slice(r, 2 * r)
        out = slice(0, width) if site.name == "attn.q" else slice(2 * width, 3 * width)
        return module.lora_A["default"].weight, module.lora_B["default"].weight, rows, out

    def copy() -> None:
        for site, layer in each(ours):
            A, B, rows, out = parts(layer, site)
            A[rows] = layer.A
            if site.name == "attn.q":
                B.zero_()
            B[out, rows] = layer.B

    def gradients() -> Pairs:
        found = []
        for site, layer in each(ours):
            A, B, rows, out = parts(layer, site)
            found += [(grad(layer.A), grad(A)[rows]), (grad(layer.B), grad(B)[out, rows])]
        return found

    compared(ours, theirs, "gpt2", copy, gradients)


def test_lora_on_the_other_linears_of_gpt2() -> None:
    ours = attached(LoRA(r=2, alpha=2.0, at="attn.o ffn.{up,down}"), "gpt2")
    config = peft.LoraConfig(
        r=2, lora_alpha=2, lora_dropout=0.0, target_modules=["c_proj", "c_fc"], fan_in_fan_out=True
    )
    theirs = peft.get_peft_model(tiny("gpt2"), config)

    def module(site: Site) -> nn.Module:
        return theirs.get_submodule(f"base_model.model.{site.exit}")

    def copy() -> None:
        for site, layer in each(ours):
            module(site).lora_A["default"].weight.copy_(layer.A)
            module(site).lora_B["default"].weight.copy_(layer.B)

    compared(
        ours,
        theirs,
        "gpt2",
        copy,
        lambda: [(grad(la.A), grad(module(s).lora_A["default"].weight)) for s, la in each(ours)],
    )


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_ia3(family: str) -> None:
    names = LINEARS[family]
    down = [r".*layer\.\d+\.output\.dense"] if family == "bert" else [names["ffn.down"]]
    wanted = [names["attn.k"], names["attn.v"], *down]
    config = peft.IA3Config(
        target_modules="|".join(rf".*{n}" for n in wanted) if family == "bert" else wanted,
        feedforward_modules=down[0] if family == "bert" else down,
    )
    ours = attached(IA3(), family)
    theirs = peft.get_peft_model(tiny(family), config)

    def vector(site: Site) -> Tensor:
        return theirs.get_submodule(f"base_model.model.{site.exit}").ia3_l["default"]

    def copy() -> None:
        for site, layer in each(ours):
            vector(site).view(-1).copy_(layer.scale)

    compared(ours, theirs, family, copy, lambda: [(grad(la.scale), grad(vector(s)).view(-1)) for s, la in each(ours)])
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == ours.bank["ours"].trainable()


def test_ia3_on_gpt2() -> None:
    config = peft.IA3Config(
        target_modules=r".*(c_attn|mlp\.c_proj)", feedforward_modules=r".*mlp\.c_proj", fan_in_fan_out=True
    )
    ours = attached(IA3(), "gpt2")
    theirs = peft.get_peft_model(tiny("gpt2"), config)

    def vector(site: Site) -> Tensor:
        whole = theirs.get_submodule(f"base_model.model.{site.exit}").ia3_l["default"].view(-1)
        return whole if site.view is None else whole[site.view.start : site.view.stop]

    def gradient(site: Site) -> Tensor:
        whole = grad(theirs.get_submodule(f"base_model.model.{site.exit}").ia3_l["default"]).view(-1)
        return whole if site.view is None else whole[site.view.start : site.view.stop]

    def copy() -> None:
        for site, layer in each(ours):
            vector(site).copy_(layer.scale)

    compared(ours, theirs, "gpt2", copy, lambda: [(grad(la.scale), gradient(s)) for s, la in each(ours)])


@pytest.mark.parametrize(("family", "table"), [("bert", "word_embeddings"), ("gpt2", "wte"), ("llama", "embed_tokens")])
def test_lora_at_a_table(family: str, table: str) -> None:
    ours = attached(LoRA(r=3, alpha=7.0, at="embed"), family)
    theirs = peft.get_peft_model(tiny(family), peft.LoraConfig(r=3, lora_alpha=7, target_modules=[table]))
    ((site, layer),) = each(ours)
    module = theirs.get_submodule(f"base_model.model.{site.exit}")
    A, B = module.lora_embedding_A["default"], module.lora_embedding_B["default"]

    def copy() -> None:
        A.copy_(layer.A)
        B.copy_(layer.B)

    compared(ours, theirs, family, copy, lambda: [(grad(layer.A), grad(A)), (grad(layer.B), grad(B))])
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == ours.bank["ours"].trainable()


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_trainable_tokens(family: str) -> None:
    """In GPT-2 the head shares the table, and learns with it on both sides."""
    where = {"at": "embed lm_head", "tie": "change"} if family == "gpt2" else {}
    tokens = [7, 3, *range(20, 90)]
    ours = attached(TrainableTokens(tokens=",".join(map(str, tokens)), **where), family)
    theirs = peft.get_peft_model(tiny(family), peft.TrainableTokensConfig(token_indices=tokens))
    site, layer = next((site, layer) for site, layer in each(ours) if site.words)
    module = theirs.get_submodule(f"base_model.model.{site.exit}")
    rows = module.trainable_tokens_delta["default"]

    def copy() -> None:
        rows.copy_(module.base_layer.weight[tokens] + layer.change)

    compared(ours, theirs, family, copy, lambda: [(grad(layer.change), grad(rows))])
    assert rows.numel() == ours.bank["ours"].trainable()


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("bert", r".*layer\.\d+\..*LayerNorm"),
        ("gpt2", ["ln_1", "ln_2"]),
        ("llama", ["input_layernorm", "post_attention_layernorm"]),
        ("t5", ["layer_norm"]),
    ],
)
def test_ln_tuning(family: str, targets: list[str] | str) -> None:
    """Theirs are gain and bias themselves; the gradient of our factor is the sum of what goes through both."""
    ours = attached(LNTuning(), family)
    theirs = peft.get_peft_model(tiny(family), peft.LNTuningConfig(target_modules=targets))

    def norms(site: Site) -> tuple[nn.Module, nn.Module]:
        module = theirs.get_submodule(f"base_model.model.{site.exit}")
        return module.base_layer, module.ln_tuning_layers["default"]

    def copy() -> None:
        for site, layer in each(ours):
            own, trained = norms(site)
            trained.weight.copy_(own.weight * (1 + layer.gain))
            if site.bias:
                trained.bias.copy_(own.bias * (1 + layer.gain) + layer.bias)

    def gradients() -> Pairs:
        found = []
        for site, layer in each(ours):
            own, trained = norms(site)
            through = own.weight * grad(trained.weight)
            if site.bias:
                through = through + own.bias * grad(trained.bias)
                found.append((grad(layer.bias), grad(trained.bias)))
            found.append((grad(layer.gain), through))
        return found

    compared(ours, theirs, family, copy, gradients)
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == ours.bank["ours"].trainable()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_prompt(family: str) -> None:
    ours = attached(Prompt(n=4), family)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    theirs = peft.get_peft_model(tiny(family), config)
    table = theirs.prompt_encoder["default"].embedding.weight
    prompt = each(ours)[0][1].get_parameter("prompt")
    compared(ours, theirs, family, lambda: table.copy_(prompt), lambda: [(grad(prompt), grad(table))])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_p_tuning(family: str) -> None:
    ours = attached(PTuning(n=4, m=8), family)
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8)
    theirs = peft.get_peft_model(tiny(family), config)
    encoder, layer = theirs.prompt_encoder["default"], each(ours)[0][1]
    linears = [module for module in encoder.mlp_head if isinstance(module, nn.Linear)]
    pairs = [(layer.prompt, encoder.embedding.weight)]
    for i, linear in enumerate(linears, 1):
        pairs += [(layer.get_parameter(f"W{i}"), linear.weight), (layer.get_parameter(f"b{i}"), linear.bias)]

    def copy() -> None:
        for own, other in pairs:
            other.copy_(own)

    compared(ours, theirs, family, copy, lambda: [(grad(own), grad(other)) for own, other in pairs])
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == ours.bank["ours"].trainable()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_prefix(family: str) -> None:
    """PEFT puts the prefix into the cache, which moves the text's positions on; ours has none, so we say them here."""
    n, depth = 4, 2
    ours = attached(Prefix(n=n), family)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=n, prefix_projection=False)
    theirs = peft.get_peft_model(tiny(family), config)
    table = theirs.prompt_encoder["default"].embedding.weight  # [n, depth * (keys, values) * heads * width]

    def side_by_side(pick: Callable[[Tensor], Tensor]) -> Tensor:
        layers = {site.block: layer for site, layer in each(ours)}
        return torch.cat([pick(getattr(layers[i], name)) for i in range(depth) for name in ("keys", "values")], dim=1)

    positions = torch.arange(n, n + inputs(family)["input_ids"].shape[1])[None]
    compared(
        ours,
        theirs,
        family,
        lambda: table.copy_(side_by_side(lambda p: p)),
        lambda: [(side_by_side(grad), grad(table))],
        position_ids=positions,
    )
