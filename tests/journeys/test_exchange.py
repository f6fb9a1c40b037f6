"""Into other libraries and back: merged models that transformers loads, PEFT folders, what vLLM is told."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.oracles import opendelta
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

from .conftest import Run, rows, write_jsonl

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reviews in which the last word is tagged."""
    folder = tmp_path_factory.mktemp("tagged")
    content = []
    for row in rows():
        words = row["review"].split()
        content.append({"tokens": words, "tags": ["O"] * (len(words) - 1) + [f"B-{row['stars']}"]})
    return write_jsonl(folder / "tagged.jsonl", content)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reviews to be answered in a word."""
    folder = tmp_path_factory.mktemp("spoken")
    return write_jsonl(
        folder / "spoken.jsonl", [{"source": r["review"].rpartition(" ")[0], "target": r["stars"]} for r in rows()]
    )


def fit(run: Run, task: Path, backbone: Path, delta: str, out: Path) -> Path:
    said = run(
        f"fit --steps 20 --batch 8 --lr 0.01 --precision float32 --task {task} --backbone {backbone}",
        *("--delta", delta, "--out", out),
    )
    assert said.status == 0, said.err
    return next(out.rglob("delta.json")).parent


def test_a_merged_tagger_is_a_token_classifier_of_transformers(
    run: Run, tagged: Path, encoder: Path, tmp_path: Path
) -> None:
    saved = fit(run, tagged, encoder, "lora | bitfit", tmp_path / "fitted")
    found = run(f"merge {saved} --to hf --out merged --json").json()
    assert found["model"] == "BertForTokenClassification"
    assert found["apart"] < 1e-4
    assert len(found["changes"]) > 8
    # What was zero has no size to measure a change by.
    assert all((change["size"] is None or change["size"] > 0) and change["lost"] < 1e-3 for change in found["changes"])
    use = pipeline("token-classification", model=str(tmp_path / "merged"))
    text = "the film number 3 is lovely"
    tags = {one["word"]: one["entity"] for one in use(text) if one["entity"] != "O"}
    assert set(tags) <= set(text.split())
    given = tmp_path / "rows.jsonl"
    content = [{"tokens": row["review"].split()} for row in rows()[:12]]
    write_jsonl(given, content)
    predicted = run(f"predict {saved} {given} --json").json()["predictions"]
    for row, ours in zip(content, predicted, strict=True):
        words = row["tokens"]
        theirs = {one["index"] - 1: one["entity"] for one in use(" ".join(words))}
        assert [theirs.get(i, "O") for i in range(len(words))] == ours["tags"]


def test_a_merged_language_model_says_what_the_delta_says(
    run: Run, spoken: Path, decoder: Path, tmp_path: Path
) -> None:
    saved = fit(run, spoken, decoder, "lora(r=4)", tmp_path / "fitted")
    found = run(f"merge {saved} --out merged --json").json()
    assert (found["model"], found["apart"] < 1e-4) == ("LlamaForCausalLM", True)
    assert found["use"] == 'transformers.pipeline("text-generation", model="merged")'
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(decoder)
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("the film", return_tensors="pt").input_ids
    with torch.no_grad():
        assert float((model(ids).logits - base(ids).logits).abs().max()) > 1e-3
    assert pipeline("text-generation", model=str(tmp_path / "merged"))("the film", max_new_tokens=3)


def test_what_no_class_of_transformers_scores_is_refused_and_goes_without_its_head(
    run: Run, lora: Path, tmp_path: Path
) -> None:
    line = run(f"merge {lora} --out merged").mistake()
    assert "no class of transformers scores as SequenceClassification does" in line
    assert "--no-head" in line
    assert list(tmp_path.iterdir()) == []
    said = run(f"merge {lora} --out merged --no-head")
    assert said.status == 0 and 'transformers.pipeline("feature-extraction", model="merged")' in said.out
    assert pipeline("feature-extraction", model=str(tmp_path / "merged"))("the film")


def test_the_way_to_gguf_is_said(run: Run, lora: Path, tmp_path: Path) -> None:
    assert "convert_hf_to_gguf.py merged" in run(f"merge {lora} --to gguf --out merged").mistake()
    assert not (tmp_path / "merged").exists()


def test_what_is_no_change_of_weights_is_not_merged(run: Run, adapter: Path, tmp_path: Path) -> None:
    assert "cannot be merged" in run(f"merge {adapter} --out merged --no-head").mistake()
    assert list(tmp_path.iterdir()) == []


def test_to_peft_and_back(run: Run, lora: Path, encoder: Path, tmp_path: Path) -> None:
    found = run(f"export {lora} --to peft --out theirs --json").json()
    assert found["left_out"] == "its head, SequenceClassification, has no equal there and stays behind"
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    said = run(f"import theirs --backbone {encoder} --out ours")
    assert said.status == 0 and "cannot be verified" in said.err
    ours, mine = (run(f"inspect {folder} --json").json() for folder in ("ours", lora))
    assert (ours["trainable"], ours["sites"]) == (mine["trainable"], mine["sites"])
    assert run("export ours --to peft --out again --json").json()["left_out"] is None
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert theirs.keys() == again.keys() and all(torch.equal(theirs[key], again[key]) for key in theirs)


def test_from_opendelta(run: Run, encoder: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(encoder)
    paths = [f"encoder.layer.{block}.output.dense" for block in (0, 1)]
    opendelta.adapter(model, paths, 32, 5)
    options = {
        "bottleneck_dim": 5,
        "non_linearity": "gelu_new",
        "modified_modules": ["ff@.w2@"],
        "common_structure": True,
    }
    opendelta.save(model, lambda name: "adapter" in name, tmp_path / "theirs", "adapter", **options)
    said = run(f"import theirs --backbone {encoder} --out ours")
    assert said.status == 0 and "cannot be verified" in said.err
    found = run("inspect ours --json").json()
    assert (found["delta"], found["trainable"]) == (
        "adapter(at='ffn', m=5, act='gelu_tanh')",
        2 * (2 * 5 * 32 + 5 + 32),
    )
    assert "is a folder of OpenDelta" in run("inspect theirs").mistake()
    (tmp_path / "theirs" / "config.json").unlink()
    line = run(f"import theirs --backbone {encoder} --out again").mistake()
    assert "theirs is no folder of PEFT or OpenDelta" in line
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "verb", ["merge {lora} --no-head", "export {lora} --to peft", "import {peft} --backbone {encoder}"]
)
def test_an_existing_folder_is_left_alone(run: Run, verb: str, lora: Path, encoder: Path, tmp_path: Path) -> None:
    assert run(f"export {lora} --to peft --out peft").status == 0
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    line = verb.format(lora=lora, encoder=encoder, peft="peft")
    assert "there" in run(f"{line} --out there").mistake()
    assert [file.name for file in (tmp_path / "there").iterdir()] == ["mine.txt"]


def test_vllm_is_told_how_and_gets_one_rank_and_one_scale(
    run: Run, spoken: Path, decoder: Path, tmp_path: Path
) -> None:
    spec = 'lora(r=2, alpha=8, at="attn.q") | lora(r=5, alpha=5, at="attn.v ffn.up")'
    saved = fit(run, spoken, decoder, spec, tmp_path / "fitted")
    found = run(f"export {saved} --to vllm --out served --json").json()
    words = shlex.split(found["use"])
    assert words[:3] == ["vllm", "serve", str(decoder)]
    assert words[3:] == ["--enable-lora", "--lora-modules", "served=served", "--max-lora-rank", "8"]
    config: dict[str, Any] = json.loads((tmp_path / "served" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (5, {}, {})
    tensors = load_file(tmp_path / "served" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {5}
    run(f"export {saved} --to peft --out plain")
    ids = torch.arange(5, 17).reshape(2, 6)
    with torch.no_grad():
        one, other = (
            peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(decoder), str(tmp_path / name))(
                ids
            ).logits
            for name in ("plain", "served")
        )
        bare = AutoModelForCausalLM.from_pretrained(decoder)(ids).logits
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert float((one - bare).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("delta", "said"),
    [("adapter", "vLLM serves LoRA alone; .* holds adapter"), ("lora(r=600)", "ranks up to 512; .* has 600")],
)
def test_what_vllm_cannot_serve_is_refused_with_the_reason(
    run: Run, delta: str, said: str, spoken: Path, decoder: Path, tmp_path: Path
) -> None:
    import re

    saved = fit(run, spoken, decoder, delta, tmp_path / "fitted")
    assert re.search(said, run(f"export {saved} --to vllm --out served").mistake())
    assert not (tmp_path / "served").exists()


def test_an_encoder_is_nothing_for_vllm(run: Run, lora: Path) -> None:
    assert "vLLM serves LoRAs on decoders" in run(f"export {lora} --to vllm --out served").mistake()
