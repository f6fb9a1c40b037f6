"""Random matrices drawn from a key: the same everywhere and always, and nowhere among what is trained or saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltatune.backbone.load import Backbone
from deltatune.delta.adapted import adapt
from deltatune.delta.delta import Delta
from deltatune.delta.frozen import projections
from deltatune.errors import SiteError
from deltatune.laws.families import inputs, tiny
from deltatune.laws.subject import moved
from deltatune.methods.reparameterization.vera import VeRA

CPU = torch.device("cpu")


def drawn(key: int, r: int, width: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return projections(key, r, width, rows, torch.float32, CPU)


def test_draws_are_those_of_every_release() -> None:
    """A saved VeRA holds its key alone: another draw would be another delta. Values of torch 2.13, exact in float32."""
    A, B = drawn(0, 2, 3, 2)
    assert A.tolist() == [
        [-0.010587962344288826, 0.75864577293396, -1.1639615297317505],
        [-1.040774941444397, -0.5446904897689819, 0.3792317807674408],
    ]
    assert B.tolist() == [[-0.03431743383407593, 1.3733248710632324], [-0.15370918810367584, 0.4583223760128021]]


def test_more_rows_change_none_before() -> None:
    few, many = drawn(1, 4, 7, 5), drawn(1, 4, 7, 50)
    assert torch.equal(few[0], many[0])
    assert torch.equal(few[1], many[1][:5])
    assert not torch.equal(few[0], drawn(2, 4, 7, 5)[0])


def test_a_file_holds_what_is_trained_and_gives_the_same_bits(tmp_path: Path) -> None:
    backbone = Backbone(tiny("bert"))
    delta = moved(Delta.build(VeRA(r=6, key=7), backbone, name="it"))
    delta.save(str(tmp_path / "it"))
    held = load_file(tmp_path / "it" / "delta.safetensors")
    assert {name.rpartition(".")[2] for name in held} == {"b", "d"}
    assert sum(t.numel() for t in held.values()) == delta.trainable() == 4 * (6 + 32)
    projections.cache_clear()
    loaded = Delta.load(str(tmp_path / "it"), backbone)
    outputs = []
    for one in (delta, loaded):
        with adapt(backbone, one) as adapted, torch.no_grad():
            outputs.append(adapted(**inputs("bert"))[0])
    assert torch.equal(*outputs)


def test_deltas_of_one_key_and_shape_share_one_pair() -> None:
    backbone = Backbone(tiny("bert"))
    layers = [layer for seed in (0, 1) for _, layer in Delta.build(VeRA(r=6), backbone, seed=seed).at_sites()]
    assert len({layer.frozen(torch.zeros(1))[0].data_ptr() for layer in layers}) == 1


def test_training_takes_what_inference_mode_drew() -> None:
    projections.cache_clear()
    with adapt(Backbone(tiny("bert")), VeRA(r=6)) as adapted:
        with torch.inference_mode():
            adapted(**inputs("bert"))
        adapted(**inputs("bert"))[0].square().sum().backward()
        assert all(p.grad is not None for p in adapted.bank.parameters())


def test_sites_of_several_widths_take_columns_of_the_widest() -> None:
    backbone = Backbone(tiny("bert"))
    delta = Delta.build(VeRA(r=6, at="attn.q ffn.down"), backbone)
    narrow, wide = (next(la for s, la in delta.at_sites() if s.name == name) for name in ("attn.q", "ffn.down"))
    like = torch.zeros(1)
    assert torch.equal(narrow.frozen(like)[0], wide.frozen(like)[0][:, :32])
    alone = Delta.build(VeRA(r=6, at="attn.q", width=48), backbone).at_sites()[0][1]
    assert torch.equal(alone.frozen(like)[0], narrow.frozen(like)[0])
    with pytest.raises(SiteError, match="width=40 is less than the 48 inputs"):
        Delta.build(VeRA(r=6, at="attn.q ffn.down", width=40), backbone)
