"""Formulas written out with plain hooks on modules named here, and weights set by hand, as the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deltatune.backbone.load import Backbone
from deltatune.delta.adapted import Adapted
from deltatune.delta.delta import Delta
from deltatune.delta.method import Method
from deltatune.laws.families import FAMILIES, inputs, tiny
from deltatune.laws.subject import moved
from deltatune.methods.addition.adapter import Adapter
from deltatune.methods.addition.parallel_adapter import ParallelAdapter
from deltatune.methods.baseline.full import Full
from deltatune.methods.specification.bitfit import BitFit

T5 = [("encoder.block.{}.layer.0.SelfAttention", "encoder.block.{}.layer.1.DenseReluDense"),
      ("decoder.block.{}.layer.0.SelfAttention", "decoder.block.{}.layer.2.DenseReluDense")]  # fmt: skip
# Family -> for each stack: the linear that ends the attention, and those that begin and end the feed-forward.
ENDS: dict[str, list[tuple[str, str, str]]] = {
    "bert": [("encoder.layer.{}.attention.output.dense", "encoder.layer.{}.intermediate.dense",
    "encoder.layer.{}.output.dense")], "distilbert": [("transformer.layer.{}.attention.out_lin",
    "transformer.layer.{}.ffn.lin1", "transformer.layer.{}.ffn.lin2")], "gpt2": [("transformer.h.{}.attn.c_proj",
    "transformer.h.{}.mlp.c_fc", "transformer.h.{}.mlp.c_proj")], "llama": [("model.layers.{}.self_attn.o_proj",
    "model.layers.{}.mlp.up_proj", "model.layers.{}.mlp.down_proj")], "t5": [(f"{attention}.o", f"{ffn}.wi",
    f"{ffn}.wo") for attention, ffn in T5],
}  # fmt: skip
ENDS["roberta"] = ENDS["bert"]
STACKS = {"t5": ("encoder", "decoder"), "gpt2": ("decoder",), "llama": ("decoder",)}


def ours(spec: Method, family: str) -> tuple[Adapted, dict[str, nn.Module]]:
    """An adapted model with a moved delta, and its layers by site key."""
    backbone = Backbone(tiny(family))
    delta = moved(Delta.build(spec, backbone, name="ours"))
    return Adapted(backbone, [delta]), {site.key: layer for site, layer in delta.at_sites()}


def compared(adapted: Adapted, oracle: nn.Module, theirs: list[Tensor], own: list[Tensor], family: str) -> None:
    """Demand equal outputs, and equal gradients of `theirs` and `own` (leaves, pair by pair)."""
    batch = inputs(family)
    first, second = adapted(**batch)[0], oracle(**batch)[0]
    torch.testing.assert_close(first, second, rtol=1e-5, atol=2e-5)
    assert float((adapted(**batch, deltas=None)[0] - first).detach().abs().max()) > 1e-2
    weights = torch.randn(first.shape, generator=torch.Generator().manual_seed(1))
    (first * weights).sum().backward()
    (second * weights).sum().backward()
    assert len(own) == len(theirs) > 0
    for one, other in zip(own, theirs, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=2e-5 * float(other.grad.abs().max()) + 1e-5)


def copies(layer: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter(family: str) -> None:
    adapted, layers = ours(Adapter(m=5), family)
    oracle = tiny(family)
    own, theirs = [], []
    for stack, paths in zip(STACKS.get(family, ("encoder",)), ENDS[family], strict=True):
        for block in range(2):
            for name, path in (("attn", paths[0]), ("ffn", paths[2])):
                layer = layers[f"{stack}.{block}.{name}"]
                p = copies(layer)

                def after(module: nn.Module, args: object, h: Tensor, p: dict[str, Tensor] = p) -> Tensor:
                    inner = nn.functional.gelu(h @ p["down"].T + p["down_bias"])
                    return h + inner @ p["up"].T + p["up_bias"]

                oracle.get_submodule(path.format(block)).register_forward_hook(after)
                own += list(layer.parameters())
                theirs += list(p.values())
    assert sum(p.numel() for p in own) == adapted.bank["ours"].trainable()
    compared(adapted, oracle, theirs, own, family)


@pytest.mark.parametrize("method", [Adapter, ParallelAdapter])
def test_two_activations_in_one_batch_are_each_its_own(method: type[Method]) -> None:
    backbone, batch = Backbone(tiny("bert")), inputs("bert", rows=2)
    names = ("relu", "tanh")
    deltas = [moved(Delta.build(method(m=5, act=act), backbone, name=act)) for act in names]
    with torch.no_grad():
        both = Adapted(backbone, deltas)
        together = both(**batch, deltas=list(names))[0]
        apart = [both(**batch, deltas=[act, act])[0] for act in names]
    for row, alone in enumerate(apart):
        torch.testing.assert_close(together[row], alone[row], rtol=1e-5, atol=1e-5)
    assert float((apart[0] - apart[1]).abs().max()) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_parallel_adapter(family: str) -> None:
    adapted, layers = ours(ParallelAdapter(m=5, scale=2.5), family)
    oracle = tiny(family)
    own, theirs = [], []
    for stack, paths in zip(STACKS.get(family, ("encoder",)), ENDS[family], strict=True):
        for block in range(2):
            layer = layers[f"{stack}.{block}.ffn"]
            p = copies(layer)
            kept: list[Tensor] = []

            def before(module: nn.Module, args: tuple[Tensor], kept: list[Tensor] = kept) -> None:
                kept[:] = [args[0]]

            def after(
                module: nn.Module, args: object, h: Tensor, p: dict[str, Tensor] = p, kept: list[Tensor] = kept
            ) -> Tensor:
                inner = torch.relu(kept[0] @ p["down"].T + p["down_bias"])
                return h + 2.5 * (inner @ p["up"].T) + p["up_bias"]

            oracle.get_submodule(paths[1].format(block)).register_forward_pre_hook(before)
            oracle.get_submodule(paths[2].format(block)).register_forward_hook(after)
            own += list(layer.parameters())
            theirs += list(p.values())
    compared(adapted, oracle, theirs, own, family)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2"])
def test_bitfit_is_the_biases_set_by_hand(family: str) -> None:
    adapted, layers = ours(BitFit(), family)
    oracle = tiny(family).requires_grad_(False)
    sites = {site.key: site for site, _ in adapted.bank["ours"].at_sites()}
    reached = set()
    own, theirs = [], []
    for key, layer in layers.items():
        site = sites[key]
        bias = oracle.get_submodule(site.exit).get_parameter("bias")
        part = slice(None) if site.view is None else slice(site.view.start, site.view.stop)
        with torch.no_grad():
            bias[part] += layer.get_parameter("bias")
        bias.requires_grad_()
        reached.add(f"{site.exit}.bias")
        own.append((layer.get_parameter("bias"), bias, part))
    expected = {n for n, _ in oracle.named_parameters() if n.endswith("bias") and "pooler" not in n}
    assert reached == expected
    batch = inputs(family)
    first, second = adapted(**batch)[0], oracle(**batch)[0]
    torch.testing.assert_close(first, second, rtol=1e-5, atol=2e-5)
    weights = torch.randn(first.shape, generator=torch.Generator().manual_seed(1))
    (first * weights).sum().backward()
    (second * weights).sum().backward()
    for mine, bias, part in own:
        assert mine.grad is not None
        assert bias.grad is not None
        theirs.append(float(bias.grad[part].abs().max()))
        torch.testing.assert_close(mine.grad, bias.grad[part], rtol=1e-4, atol=1e-4)
    assert max(theirs) > 0.1


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_bitfit_without_biases_adds_one_to_each_linear(family: str) -> None:
    adapted, layers = ours(BitFit(), family)
    oracle = tiny(family)
    sites = {site.key: site for site, _ in adapted.bank["ours"].at_sites()}
    linears = {n for n, m in oracle.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    assert {site.exit for site in sites.values()} == linears
    own, theirs = [], []
    for key, layer in layers.items():
        bias = layer.get_parameter("bias").detach().clone().requires_grad_()
        oracle.get_submodule(sites[key].exit).register_forward_hook(lambda m, a, h, bias=bias: h + bias)
        own.append(layer.get_parameter("bias"))
        theirs.append(bias)
    compared(adapted, oracle, theirs, own, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_is_the_weights_set_by_hand(family: str) -> None:
    adapted, layers = ours(Full(), family)
    oracle = tiny(family)
    (layer,) = layers.values()
    own, theirs = [], []
    for key, path in adapted.source.anatomy.parameters.items():
        change = layer.get_parameter(key.replace(".", "|"))
        weight = oracle.get_parameter(path)
        with torch.no_grad():
            weight += change
        own.append(change)
        theirs.append(weight)
    for name, parameter in oracle.named_parameters():
        if not any(parameter is weight for weight in theirs):
            parameter.requires_grad_(False)
            assert name.startswith(("pooler.", "lm_head."))
    compared(adapted, oracle, theirs, own, family)
