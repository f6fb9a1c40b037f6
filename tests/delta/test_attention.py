"""The plain products are the attention that transformers computes, in every case that a backbone asks for."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.backbone import families
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from deltatune.backbone.load import Backbone
from deltatune.compose.expression import parse
from deltatune.delta.adapted import Adapted
from deltatune.delta.attention import causal, plain
from deltatune.delta.delta import Delta


class Attending(nn.Module):
    """What an attention function asks of its module."""

    def __init__(self, groups: int, is_causal: bool) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, is_causal


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize(
    ("groups", "mask", "is_causal", "scaling"),
    list(itertools.product((1, 2), ("none", "bool", "float"), (False, True), (None, 0.3))),
)
def test_plain_is_the_fused_kernel(groups: int, mask: str, is_causal: bool, scaling: float | None) -> None:
    query, key, value = drawn(3, 4, 5, 8), drawn(3, 4 // groups, 5, 8), drawn(3, 4 // groups, 5, 8) + 1
    seen = torch.ones(3, 1, 5, 5, dtype=torch.bool)
    seen[1, ..., 3:] = False
    seen = seen & causal(query, key) if is_causal else seen
    given = {
        "none": None,
        "bool": seen,
        "float": torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min),
    }[mask]
    module = Attending(groups, is_causal)
    wanted, _ = sdpa_attention_forward(module, query, key, value, given, scaling=scaling)
    got, weights = plain(module, query, key, value, given, scaling=scaling)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 5, dtype=torch.float64))


def test_plain_adds_a_position_bias() -> None:
    query, key, value, bias = drawn(2, 4, 5, 8), drawn(2, 4, 6, 8), drawn(2, 4, 6, 8), drawn(1, 4, 5, 6)
    got, _ = plain(Attending(1, False), query, key, value, None, position_bias=bias)
    wanted = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_last_query_sees_every_key() -> None:
    """With a cache there are more keys than queries, and the queries are the last of them."""
    seen = causal(torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 4, 1))[0, 0]
    assert seen.tolist() == [[True, True, True, False], [True, True, True, True]]
    whole = causal(torch.zeros(1, 1, 4, 1), torch.zeros(1, 1, 4, 1))[0, 0]
    assert whole[-2:].equal(seen)


def test_row_that_sees_nothing_is_finite() -> None:
    query, key = drawn(2, 1, 3, 4), drawn(2, 1, 3, 4)
    seen = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    seen[1] = False
    got, _ = plain(Attending(1, False), query.requires_grad_(), key, key, seen)
    got.sum().backward()
    assert bool(got.isfinite().all())
    assert query.grad is not None
    assert bool(query.grad.isfinite().all())


def test_each_run_of_a_shared_block_has_its_own_prefix() -> None:
    on = Backbone(families.build("albert"))
    delta = Delta.build(parse("prefix(n=3)"), on, name="it")
    with Adapted(on, [delta]) as adapted:
        adapted(input_ids=torch.arange(5, 11)[None]).last_hidden_state.square().sum().backward()
    assert len(delta.layers) == 2
    assert all(p.grad is not None and p.grad.any() for p in delta.parameters())
