"""Each fault that the doctor knows is planted, and found; a healthy delta is called so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import deltatune as dt
from deltatune.cli.saved import read

from .conftest import Run


def codes(run: Run, place: object, *words: str) -> set[str]:
    """The findings of a delta; they have a fix each, and "healthy" says whether there are any."""
    found = run(f"doctor {place} --json", *words).json()
    assert found["healthy"] == (not found["findings"])
    assert all(one["what"] and one["fix"] for one in found["findings"])
    return {one["code"] for one in found["findings"]}


def test_healthy(run: Run, lora: Path) -> None:
    assert codes(run, lora) == set()
    found = run(f"doctor {lora} --json").json()
    assert found["effect"]["largest"] > 0
    assert found["effect"]["relative"] > 1e-3
    assert [site["site"] for site in found["sites"]] == [f"encoder.{b}.attn.{x}" for b in (0, 1) for x in "qv"]
    assert all(site["effect"] > 0 for site in found["sites"])
    assert "healthy" in run(f"doctor {lora}").out


def test_effect_is_that_of_the_backbone_run_by_hand(run: Run, lora: Path, encoder: Path) -> None:
    from deltatune.cli.diagnosis import SENTENCES

    backbone = dt.load(str(encoder))
    inputs = backbone.processor(list(SENTENCES), return_tensors="pt", padding=True)
    with dt.adapt(backbone, read(lora)) as adapted, torch.no_grad():
        apart = adapted(**inputs).last_hidden_state - adapted(**inputs, deltas=None).last_hidden_state
    assert run(f"doctor {lora} --json").json()["effect"]["largest"] == pytest.approx(float(apart.abs().max()), rel=1e-4)


def test_untrained(run: Run, encoder: Path) -> None:
    dt.Delta.build(dt.LoRA(), dt.load(str(encoder))).save("fresh")
    assert codes(run, "fresh") == {"no-head", "at-identity"}
    shown = run("doctor fresh").out
    assert "B of a LoRA" in shown
    assert "→" in shown


@pytest.mark.parametrize("text", ["lora(at='embed')", "trainabletokens(tokens='-2:')"])
def test_a_table_is_tried_with_every_token(run: Run, encoder: Path, text: str) -> None:
    delta = dt.Delta.build(dt.parse(text), dt.load(str(encoder)))
    delta.save("fresh")
    assert "at-identity" in codes(run, "fresh")
    with torch.no_grad():
        for parameter in delta.layers.parameters():
            parameter.add_(0.1)
    delta.save("trained")
    assert "at-identity" not in codes(run, "trained")


def test_partly_untrained(run: Run, lora: Path) -> None:
    delta = read(lora)
    delta.layers["0/encoder:1:attn:v"].B.data.zero_()  # type: ignore[union-attr, operator]
    delta.save("half")
    assert codes(run, "half") == {"partly-at-identity"}


def test_not_a_number(run: Run, lora: Path) -> None:
    delta = read(lora)
    next(iter(delta.layers.parameters())).data[0, 0] = torch.nan
    delta.save("nan")
    assert codes(run, "nan") == {"not-a-number"}


def test_head_alone(run: Run, fitted: Path) -> None:
    assert codes(run, fitted / "named" / "head-only" / "0") == {"no-layers"}


def test_another_backbone(run: Run, lora: Path, encoder: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    shutil.copytree(encoder, tmp_path / "other")
    model = AutoModel.from_pretrained(encoder)
    model.embeddings.word_embeddings.weight.data[5, 5] += 0.5
    model.save_pretrained(tmp_path / "other")
    assert codes(run, lora, "--backbone", "other") == {"other-backbone"}


def test_backbone_without_the_sites(run: Run, lora: Path, decoder: Path) -> None:
    assert {"other-backbone", "sites"} <= codes(run, lora, "--backbone", str(decoder))


def test_backbone_that_is_gone(run: Run, lora: Path) -> None:
    delta = read(lora)
    delta.backbone_name = "gone"
    delta.save("lost")
    assert codes(run, "lost") == {"no-backbone"}
    assert "unknown backbone 'nowhere'" in run("doctor lost --backbone nowhere").mistake()


def test_never_routed(run: Run, decoder: Path) -> None:
    """A head reads hidden states, and the language-model head lies behind them."""
    from deltatune.heads.classification import SequenceClassification

    delta = dt.Delta.build(dt.LoRA(at="lm_head"), dt.load(str(decoder)))
    delta.layers["0/decoder:lm_head"].B.data.normal_()  # type: ignore[union-attr, operator]
    delta.head = SequenceClassification(32, ["a", "b"], "last", False)
    delta.save("behind")
    assert codes(run, "behind") == {"never-routed", "no-effect"}
    delta.head = None
    delta.save("used")
    assert codes(run, "used") == {"no-head"}


@pytest.mark.parametrize(("factor", "code"), [(1e-6, "tiny-effect"), (1e5, "huge-effect")])
def test_size(run: Run, lora: Path, factor: float, code: str) -> None:
    delta = read(lora)
    for name, parameter in delta.layers.named_parameters():
        if name.endswith(".B"):
            parameter.data *= factor
    delta.save("scaled")
    assert codes(run, "scaled") == {code}


def test_one_site_far_from_its_kind() -> None:
    from transformers import BertConfig, BertModel

    from deltatune.cli.diagnosis import diagnose

    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=8)
    delta = dt.Delta.build(dt.BitFit(), dt.load(BertModel(config)))
    for parameter in delta.layers.parameters():
        parameter.data.fill_(0.01)
    assert not diagnose(delta, None).has("uneven-norms")
    delta.layers["0/encoder:2:ffn:up"].bias.data.fill_(5.0)  # type: ignore[union-attr, operator]
    found = next(one for one in diagnose(delta, None).findings if one.code == "uneven-norms")
    assert "encoder.2.ffn.up" in found.what


def test_prefix_is_tried_as_a_whole(run: Run, encoder: Path, lora: Path) -> None:
    delta = dt.Delta.build(dt.Prefix(n=4, std=1.0), dt.load(str(encoder)))
    delta.head = read(lora).head
    delta.save("prefix")
    assert codes(run, "prefix") == set()
