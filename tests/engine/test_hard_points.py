"""The eight hard points of docs/architecture.md, each against the network changed by hand, in rows of a mixed batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.backbone.families import build, inputs
from torch import Tensor, nn

import deltatune as dt
from deltatune.backbone.load import Backbone
from deltatune.delta.delta import Delta
from deltatune.errors import RoutingError
from deltatune.laws.subject import moved

Params = dict[str, Tensor]


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def hidden(model: Any, rows: dict[str, Tensor], **more: Any) -> Tensor:
    out: Tensor = model(**rows, output_hidden_states=True, **more).hidden_states[-1]
    return out


def layers(delta: Delta) -> dict[str, Params]:
    return {site.key: {n: p.detach() for n, p in layer.named_parameters()} for site, layer in delta.at_sites()}


def holds(family: str, spec: Any, by_hand: Callable[[nn.Module, dict[str, Params]], None], mixed: bool = True) -> None:
    """Rows of two deltas and of none, in one call, are what networks changed by hand give each.

    Where they cannot be mixed, such a call is refused, and each alone is what its network gives.
    """
    backbone = Backbone(build(family).double(), name=family)
    deltas = [moved(Delta.build(spec, backbone, name=name, seed=i), seed=i) for i, name in enumerate("ab")]
    rows = inputs(family, rows=3)
    expected = []
    with torch.no_grad():
        for one in (*deltas, None):
            network = build(family).double()
            if one is not None:
                by_hand(network, layers(one))
            expected.append(hidden(network, rows))
        assert not torch.allclose(expected[0], expected[1]) and not torch.allclose(expected[0], expected[2])
        with dt.adapt(backbone, *deltas) as adapted:
            if mixed:
                found = hidden(adapted, rows, deltas=["b", None, "a"])
                wanted = [expected[1][0], expected[2][1], expected[0][2]]
                torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-7, atol=1e-9)
            else:
                with pytest.raises(RoutingError, match="table of positions"):
                    hidden(adapted, rows, deltas=["b", "b", "a"])
            for one, whole in zip(("a", "b", None), expected, strict=True):
                torch.testing.assert_close(hidden(adapted, rows, deltas=one), whole, rtol=1e-7, atol=1e-9)


def product(p: Params, alpha: float = 16.0) -> Tensor:
    return alpha / len(p["A"]) * p["B"] @ p["A"]


def test_1_ia3_scales_what_is_no_output_of_a_module_in_llama() -> None:
    def by_hand(network: Any, own: dict[str, Params]) -> None:
        for number, block in enumerate(network.model.layers):
            block.mlp.down_proj.weight *= own[f"decoder.{number}.ffn.down"]["scale"]

    holds("llama", dt.IA3(at="ffn.down"), by_hand)


def test_2_mam_on_bert_which_has_no_module_for_its_feed_forward() -> None:
    def feed(block: Any, p: Params) -> Callable[[Tensor], Tensor]:
        def forward(attended: Tensor) -> Tensor:
            beside = torch.relu(attended @ p["down"].T + p["down_bias"]) @ p["up"].T
            inner = block.output.dense(block.intermediate(attended)) + 4.0 * beside + p["up_bias"]
            out: Tensor = block.output.LayerNorm(inner + attended)
            return out

        return forward

    def by_hand(network: Any, own: dict[str, Params]) -> None:
        for number, block in enumerate(network.encoder.layer):
            keys = own[f"encoder.{number}.attn"]
            attention = block.attention.self

            def attend(hidden_states: Tensor, *_: Any, a: Any = attention, k: Params = keys, **__: Any) -> Any:
                def heads(x: Tensor) -> Tensor:
                    return x.unflatten(-1, (-1, a.attention_head_size)).transpose(-2, -3)

                rows = len(hidden_states)
                key = torch.cat([k["keys"].expand(rows, -1, -1), a.key(hidden_states)], dim=1)
                value = torch.cat([k["values"].expand(rows, -1, -1), a.value(hidden_states)], dim=1)
                q, kk, v = heads(a.query(hidden_states)), heads(key), heads(value)
                weights = (q @ kk.mT / a.attention_head_size**0.5).softmax(-1)
                return (weights @ v).transpose(1, 2).flatten(-2), None

            attention.forward = attend

            block.feed_forward_chunk = feed(block, own[f"encoder.{number}.ffn"])

    holds("bert", dt.Prefix(n=3) | dt.ParallelAdapter(m=5), by_hand)


def test_3_the_last_run_alone_of_the_block_that_albert_shares() -> None:
    def by_hand(network: Any, own: dict[str, Params]) -> None:
        ((key, p),) = own.items()
        depth = network.config.num_hidden_layers
        assert key == f"encoder.{depth - 1}.attn.q" and depth > 1
        query = network.encoder.albert_layer_groups[0].albert_layers[0].attention.query
        runs = [0]

        def change(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            runs[0] += 1
            return output + args[0] @ product(p).T if runs[0] % depth == 0 else output

        query.register_forward_hook(change)

    holds("albert", dt.LoRA(r=2, at="attn.q", blocks="-1:"), by_hand)


def test_4_deberta_asks_its_q_of_positions_too() -> None:
    def by_hand(network: Any, own: dict[str, Params]) -> None:
        for number, block in enumerate(network.encoder.layer):
            block.attention.self.query_proj.weight += product(own[f"encoder.{number}.attn.q"])

    # Rows of several deltas are refused there: the table of positions is one for all of them.
    holds("deberta-v2", dt.LoRA(r=2, at="attn.q"), by_hand, mixed=False)


def test_5_the_q_of_gpt_neox_stands_in_every_third_piece_of_a_fused_matrix() -> None:
    def by_hand(network: Any, own: dict[str, Params]) -> None:
        for number, block in enumerate(network.gpt_neox.layers):
            fused = block.attention.query_key_value.weight
            pieces = fused.view(network.config.num_attention_heads, 3, -1, fused.shape[1])
            pieces[:, 0] += product(own[f"decoder.{number}.attn.q"]).view_as(pieces[:, 0])

    holds("gpt_neox", dt.LoRA(r=2, at="attn.q"), by_hand)


def test_6_what_acts_on_every_expert_of_mixtral() -> None:
    def by_hand(network: Any, own: dict[str, Params]) -> None:
        for number, block in enumerate(network.model.layers):
            gate, up, down = (own[f"decoder.{number}.ffn.{part}"] for part in ("gate", "up", "down"))
            block.mlp.experts.gate_up_proj += torch.cat([product(gate), product(up)])
            block.mlp.experts.down_proj += product(down)

    holds("mixtral", dt.LoRA(r=2, at="ffn.{gate,up,down}"), by_hand)


def test_7_rotations_of_several_deltas_in_one_batch() -> None:
    def by_hand(network: Any, own: dict[str, Params]) -> None:
        for number, block in enumerate(network.model.layers):
            for part in ("q", "v"):
                turned = []
                for entries in own[f"decoder.{number}.attn.{part}"]["R"]:
                    q = torch.zeros(8, 8)
                    q[*torch.triu_indices(8, 8, 1)] = entries
                    q = q - q.T
                    turned.append((torch.eye(8) + q).inverse() @ (torch.eye(8) - q))
                weight = getattr(block.self_attn, f"{part}_proj").weight
                weight.copy_(weight @ torch.block_diag(*turned).T)

    holds("llama", dt.OFT(b=8, at="attn.{q,v}"), by_hand)


def test_8_tokens_that_are_replaced_before_every_block() -> None:
    def by_hand(network: Any, own: dict[str, Params]) -> None:
        def first(module: nn.Module, args: Any, h: Tensor) -> Tensor:
            p = own["encoder.embed"]["prompt"].expand(len(h), -1, -1)
            return torch.cat([h[:, :1], p, h[:, 1:]], dim=1)

        network.embeddings.register_forward_hook(first)
        for number, block in enumerate(network.layers[1:], 1):

            def renew(module: nn.Module, args: Any, p: Tensor = own[f"encoder.{number}.block"]["prompt"]) -> Any:
                h = args[0].clone()
                h[:, 1:4] = p
                return (h, *args[1:])

            block.register_forward_pre_hook(renew)
        network.layers[-1].register_forward_hook(lambda module, args, out: torch.cat([out[:, :1], out[:, 4:]], dim=1))

    holds("vit", dt.Prompt(n=3, at="embed block"), by_hand)
