"""Networks that read sound, or images beside text: what goes in first is no token id."""

from __future__ import annotations

import pytest
import torch
from tests.backbone.families import build, inputs

from deltatune.backbone.load import Backbone
from deltatune.data.task import Task
from deltatune.delta.adapted import adapt
from deltatune.errors import BackboneError, RoutingError, TaskError
from deltatune.heads.choose import head_for
from deltatune.laws.subject import moved
from deltatune.methods.reparameterization.lora import LoRA


@pytest.mark.parametrize("family", ["whisper", "speech_to_text"])
@torch.no_grad()
def test_generation_goes_on_from_features_by_place_or_name(family: str) -> None:
    adapted = adapt(Backbone(build(family), name=family), LoRA(at="attn.{q,v} cross.{q,v}"))
    moved(adapted.bank["lora(at='attn.{q,v} cross.{q,v}')"], size=2.0)
    features = inputs(family)["input_features"]
    first = adapted.generate(features, max_new_tokens=5, do_sample=False)
    again = adapted.generate(input_features=features, max_new_tokens=5, do_sample=False)
    bare = adapted.generate(features, deltas=None, max_new_tokens=5, do_sample=False)
    assert torch.equal(first, again)
    assert first.tolist() != bare.tolist()


def test_whisper_repeats_rows_for_sequences_and_beams() -> None:
    """It repeats them for the sequences itself, before the encoder runs, and for the beams after it."""
    adapted = adapt(Backbone(build("whisper"), name="whisper"), LoRA())
    features = inputs("whisper")["input_features"]
    made = adapted.generate(features, deltas=[None, *adapted.bank.names, None], num_beams=2, num_return_sequences=2)
    assert len(made) == 6


@pytest.mark.parametrize(("family", "reads"), [("wav2vec2", "sound"), ("whisper", "sound"), ("vit", "images")])
def test_a_task_of_texts_is_refused(family: str, reads: str) -> None:
    backbone = Backbone(build(family), name=family)
    words = Task("words", "classification", "accuracy", [], [], [], ("a", "b"))
    with pytest.raises(TaskError, match=f"task words has text, {family} reads {reads}"):
        head_for(words, backbone, 0)


def test_a_network_without_tokens_says_that_it_has_no_table() -> None:
    backbone = Backbone(build("wav2vec2"), name="wav2vec2")
    assert backbone.device == torch.device("cpu")
    with pytest.raises(BackboneError, match="'wav2vec2' reads sound and has no table of token embeddings"):
        _ = backbone.embeddings


def test_texts_and_images_of_one_call_are_pairs() -> None:
    batch = inputs("clip")
    adapted = adapt(Backbone(build("clip"), name="clip"), LoRA(at="attn.{q,v}"))
    assert adapted(**batch).logits_per_text.shape == (3, 3)
    with pytest.raises(RoutingError, match=r"vision.0.attn.q got 2 rows, the call routes 3"):
        adapted(**{**batch, "pixel_values": batch["pixel_values"][:2]})
