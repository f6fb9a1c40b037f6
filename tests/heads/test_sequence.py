"""Writing with encoder-decoders: teacher forcing as the networks do it, and what they then write."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
import transformers as hf
from tests.fit.tiny import QUICK, VOCABULARY, furthest, jobs_of, plan, task, tensors, tokenizer
from tests.fit.tiny import backbone as family_of

from deltatune.backbone.load import Backbone
from deltatune.compose.expression import parse
from deltatune.delta.adapted import Adapted
from deltatune.delta.delta import Delta
from deltatune.errors import TaskError
from deltatune.heads import language
from deltatune.heads.base import collate
from deltatune.heads.choose import head_for
from deltatune.heads.sequence import SequenceToSequence
from deltatune.studies.verbs import run_plans
from deltatune.training.engine import Engine
from deltatune.training.evaluate import predict
from deltatune.training.job import Plan, batch_of

WRITTEN = task("generation")


def backbone(family: str, dtype: torch.dtype = torch.float32) -> Backbone:
    if family == "t5":
        return family_of("t5", dtype)
    torch.manual_seed(0)
    config = hf.BartConfig(
        vocab_size=len(VOCABULARY), d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2, dropout=0.0, init_std=0.3,
    )  # fmt: skip
    module = hf.BartForConditionalGeneration(config).eval()
    with torch.no_grad():  # a bias that a pass through the words alone would miss
        module.final_logits_bias.normal_()
    return Backbone(module.to(dtype), tokenizer(True), "tiny-bart")


@pytest.mark.parametrize("chunk", [3, 1024])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_loss_and_gradients_are_the_networks_own(family: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "CHUNK", chunk)
    on = backbone(family, torch.float64)
    head = head_for(WRITTEN, on, 0)
    assert isinstance(head, SequenceToSequence) and head.arguments["template"] == "{source}"
    (job,) = jobs_of([plan("lora(at='attn.{q,v}, cross.{q,v}')", WRITTEN, batch=6)], on)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in job.delta.layers.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=draw))
    examples = job.logical_batch(0)
    batch = batch_of(job, on)
    longest = max(len(e.target) for e in examples)
    labels = torch.tensor([[*e.target, *[-100] * (longest - len(e.target))] for e in examples])
    engine = Engine([job], on)
    inputs = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
    parameters = list(job.delta.layers.parameters())
    (ours,) = engine.losses([job], [batch])
    theirs = engine.adapted(**inputs, labels=labels, deltas=job.name).loss
    gradients = [torch.autograd.grad(loss, parameters) for loss in (ours, theirs)]
    with torch.no_grad():
        bare = float(engine.adapted(**inputs, labels=labels, deltas=None).loss)
    engine.close()
    ours, theirs = ours.detach(), theirs.detach()
    assert float(ours) == pytest.approx(float(theirs), rel=0, abs=1e-9) and abs(float(ours) - bare) > 1e-4
    for own, other in zip(*gradients, strict=True):
        assert float((own - other).abs().max()) <= 1e-9 and float(own.abs().max()) > 1e-6
    words = on.processor.convert_ids_to_tokens(list(examples[0].target))
    assert words[-1] == "[SEP]" and (words[0] == "[CLS]") == (family == "bart")


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_words_are_scored_only_where_labels_are(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "CHUNK", 5)
    on = backbone(family)
    rows = [{"source": f"w{i}", "target": " ".join(["w1"] * (1 + 4 * i))} for i in range(3)]
    (job,) = jobs_of([plan("lora", dataclasses.replace(WRITTEN, train=rows), batch=3)], on)
    batch = batch_of(job, on)
    labels = sum(len(text.target) for text in batch.sequences)
    assert labels < len(batch.sequences) * batch.positions
    seen: list[int] = []
    handle = on.output.register_forward_hook(lambda *call: seen.append(call[2].shape[:-1].numel()))
    engine = Engine([job], on)
    engine.losses([job], [batch])
    engine.close()
    handle.remove()
    assert sum(seen) == labels and max(seen) == 5


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_together_is_alone_beside_a_classifier_of_the_encoder(family: str) -> None:
    if family == "t5":
        other = plan("adapter", task())
    else:
        other = plan("lora", dataclasses.replace(task("generation", "long", longest=14), template="Label: {source}"))
    some = [plan("lora(dropout=0.2)", WRITTEN), plan("prefix(n=2)", WRITTEN, 1), other]

    def trained(plans: list[Plan]) -> list[tuple[list[float], dict[str, torch.Tensor]]]:
        on = backbone(family, torch.float64)
        jobs = jobs_of(plans, on)
        engine = Engine(jobs, on)
        for _ in range(8):
            engine.step(jobs)
        engine.close()
        return [(job.losses, tensors(job)) for job in jobs]

    for one, (losses, found) in zip(some, trained(some), strict=True):
        ((lonely, own),) = trained([one])
        assert len(set(lonely)) > 6
        assert losses == pytest.approx(lonely, rel=0, abs=1e-6)
        assert furthest(found, own) <= 1e-6


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_it_learns_to_write_and_writes_as_generate_does(family: str, tmp_path: Path) -> None:
    on = backbone(family)
    data = dataclasses.replace(WRITTEN, train=[{"source": f"w{i}", "target": "good w7"} for i in range(40)])
    settings = dataclasses.replace(QUICK, steps=60, lr=2e-2, batch=8)
    runs = run_plans(
        on,
        [Plan(parse("lora(at='attn.{q,v}, cross.{q,v}, ffn.up') | bitfit"), data, 0, settings, "d")],
        out=tmp_path / "out",
    )
    curve = runs.trained[0].curve
    assert curve[-1].loss < 0.5 * curve[0].loss and not math.isnan(curve[-1].loss)
    delta = Delta.load(str(tmp_path / "out"), on)
    rows = [{"source": "w1"}, {"source": "w3 w5 w7 w9"}, {"source": "w30 w31"}]
    with Adapted(on, [delta]) as adapted:
        adapted.eval()
        found = predict(adapted, delta, delta.head, rows, 64).values
        for row, text in zip(rows, found, strict=True):
            ids = on.processor(row["source"], return_tensors="pt")
            made = adapted.generate(ids["input_ids"], max_new_tokens=delta.head.new_tokens, do_sample=False)
            assert text == on.processor.decode(made[0], skip_special_tokens=True).strip()
    assert "good w7" in found


def test_an_encoder_decoder_without_words_says_so() -> None:
    whole = backbone("bart")
    bare = Backbone(whole.module.model, whole.processor, "bare")
    with pytest.raises(TaskError, match="a generation task needs a model that writes; bare has no words to write with"):
        head_for(WRITTEN, bare, 0)


def test_long_targets_are_cut_and_end() -> None:
    on = backbone("t5")
    head = SequenceToSequence("{source}", 100)
    (example,) = head.encode([{"source": "w1 " * 50, "target": "w2 " * 50}], on, 10)
    assert len(example.ids) == 10 == len(example.target) == len(example.decoder)
    assert on.processor.convert_ids_to_tokens(list(example.target))[-1] == "[SEP]"
    batch = collate([example, copy.copy(example)], on)
    assert batch.inputs["decoder_input_ids"].shape == (2, 10) and batch.positions == 10
