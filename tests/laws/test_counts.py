"""The number of parameters of each method is the formula of its docstring."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.laws.subjects import SPECS, backbone

from deltatune.backbone.load import Backbone
from deltatune.delta.catalogue import catalogue
from deltatune.delta.delta import Delta
from deltatune.laws.families import FAMILIES

# Written out for the tiny models: width 32, feed-forward 48, 2 blocks a stack, 4 heads of 8 (Llama: 2 of keys and
# values).
D, F, V = 32, 48, 99
KV = {"llama": 16}
STACKS = {"t5": 2}
CROSS = {"t5": 1}  # attentions to the encoder, a block of the decoder


def sublayers(family: str) -> int:
    """Attention and feed-forward of each block; attention to an encoder is not among `attn ffn`."""
    return 2 * 2 * STACKS.get(family, 1)


def attentions(family: str) -> int:
    return 2 * (STACKS.get(family, 1) + CROSS.get(family, 0))


def full(family: str) -> int:
    module = backbone(family).module
    left_out = ("pooler.", "lm_head.")  # behind the trunk
    return sum(p.numel() for name, p in module.named_parameters() if not name.startswith(left_out))


def biases(family: str) -> int:
    module = backbone(family).module
    found = sum(p.numel() for name, p in module.named_parameters() if name.endswith("bias") and "pooler" not in name)
    if found:
        return found
    kv = KV.get(family, D)
    attention = D + kv + kv + D
    # Without any bias each linear gets one: q, k, v, o; up, gate (Llama), down.
    return {"llama": 2 * (attention + F + F + D), "t5": attentions(family) * attention + 4 * (F + D)}[family]


def gains(family: str) -> int:
    """Two norms a block, in T5's decoder a third; RMSNorms have no bias."""
    norms = 4 + (2 * 3 if family == "t5" else 0)
    return norms * D * (1 if family in ("llama", "t5") else 2)


FORMULAS: dict[str, Callable[[str], int]] = {
    "adapter": lambda f: sublayers(f) * (2 * D * 24 + D + 24),
    "parallel_adapter": lambda f: sublayers(f) // 2 * (2 * D * 24 + D + 24),
    "ia3": lambda f: 2 * STACKS.get(f, 1) * (2 * KV.get(f, D) + F),
    "prefix": lambda f: attentions(f) * 2 * 16 * KV.get(f, D),
    "prompt": lambda f: 20 * D,
    "ptuning": lambda f: 20 * D + 2 * D * 128 + 128 * 128 + 2 * 128 + D,
    "full": full,
    "head": lambda f: 0,
    "lora": lambda f: 2 * STACKS.get(f, 1) * 8 * ((D + D) + (D + KV.get(f, D))),
    "dora": lambda f: 2 * STACKS.get(f, 1) * (8 * ((D + D) + (D + KV.get(f, D))) + D + KV.get(f, D)),
    "oft": lambda f: 2 * STACKS.get(f, 1) * 2 * D * (32 - 1) // 2,
    "vera": lambda f: 2 * STACKS.get(f, 1) * (2 * 256 + D + KV.get(f, D)),
    "bitfit": biases,
    "lntuning": gains,
    "trainabletokens": lambda f: V * D,
    "lora of a table": lambda f: 4 * (V + D),
    # A is held once for each stack of equal shapes, B at each site.
    "lora tied": lambda f: 4 * (D + 2 * STACKS.get(f, 1) * (D + KV.get(f, D))),
    # D and U are held once, the biases at each site.
    "adapter tied": lambda f: 2 * D * 4 + sublayers(f) * (D + 4),
    "prompt deep": lambda f: 2 * 4 * D,  # of an encoder-decoder the encoder's blocks
    "lora | prefix | ia3": lambda f: (
        2 * STACKS.get(f, 1) * 2 * 2 * (D + F)
        + attentions(f) * 2 * 3 * KV.get(f, D)
        + 2 * STACKS.get(f, 1) * (2 * KV.get(f, D) + F)
    ),
}


def test_every_method_has_a_formula() -> None:
    assert FORMULAS.keys() == set(SPECS)
    for name, cls in catalogue().items():
        said = " ".join((cls.__doc__ or "").split())
        assert "Parameters: " in said or name == "head", f"{name} does not say its number of parameters"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", SPECS)
def test_count_is_the_formula(method: str, family: str) -> None:
    home: Backbone = backbone(family)
    assert Delta.build(SPECS[method], home).trainable() == FORMULAS[method](family)
