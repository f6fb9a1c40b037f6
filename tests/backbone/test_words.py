"""Logits of hidden states by the network's own way, and hidden states without logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from tests.fit.tiny import VOCABULARY, jobs_of, plan, task, tokenizer
from tests.fit.tiny import backbone as tiny_backbone

from deltatune.backbone.load import Backbone
from deltatune.backbone.words import body_of, without_logits
from deltatune.training.engine import Engine
from deltatune.training.job import batch_of

ONE = dict(
    vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
TWO = dict(
    vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=2,
)  # fmt: skip
T5 = dict(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
CONFIGS: dict[str, Any] = {
    "scaled and capped": lambda: hf.Gemma2Config(**ONE, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0),
    "multiplied": lambda: hf.CohereConfig(**ONE, logit_scale=0.3),
    "divided": lambda: hf.GraniteConfig(**ONE, num_key_value_heads=2, logits_scaling=3.0),
    "transformed before": lambda: hf.BertConfig(**ONE, is_decoder=True),
    "an inner body": lambda: hf.OPTConfig(
        vocab_size=99, hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64,
    ),
    "a bias behind": lambda: hf.MarianConfig(**TWO),
    "more outputs": lambda: hf.LEDConfig(**TWO, attention_window=4),
    "scaled before": lambda: hf.T5Config(**T5),
    "experts": lambda: hf.SwitchTransformersConfig(**T5, num_sparse_encoder_layers=0, num_sparse_decoder_layers=0),
    "streams": lambda: hf.ProphetNetConfig(
        vocab_size=99, hidden_size=32, num_encoder_layers=1, num_decoder_layers=1, num_encoder_attention_heads=4,
        num_decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_networks_own(name: str) -> None:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    auto = hf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else hf.AutoModelForCausalLM
    network = auto.from_config(config).eval()
    with torch.no_grad():
        for value in [*network.parameters(), *(b for n, b in network.named_buffers() if n == "final_logits_bias")]:
            value.add_(0.1 * torch.randn_like(value))
    ids = torch.randint(3, 99, (3, 8))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :5]
    on, before = Backbone(network), dict(network._modules)
    body = body_of(network)
    with torch.no_grad():
        wanted = network(**inputs).logits
        if body is None:
            states = wanted
        elif config.is_encoder_decoder:
            made, kept = without_logits(network, body)
            assert made(**inputs).logits.numel() == 0 and kept.states is not None
            states = kept.states
        else:
            states = on.trunk(**inputs).last_hidden_state
        found = on.logits(states.flatten(0, 1)).view_as(wanted)
    assert (body is None) == (name == "streams")
    assert torch.allclose(found, wanted, rtol=0, atol=1e-6) and float(wanted.std()) > 1e-3
    assert network._modules == before and "forward" not in network.__dict__


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_full_tuning_learns_by_the_words_it_changes(family: str) -> None:
    on = tiny_backbone(family, torch.float64)
    if family == "llama":
        on.module.lm_head.weight = on.module.model.embed_tokens.weight
    assert on.output.weight is on.embeddings.weight
    (job,) = jobs_of([plan("full", task("generation"))], on)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in job.delta.layers.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=draw))
    batch = batch_of(job, on)
    target = [list(e.target) if family == "t5" else [-100, *e.target[:-1]] for e in batch.examples]
    longest = max(map(len, target))
    labels = torch.tensor([[*row, *[-100] * (longest - len(row))] for row in target])
    inputs = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
    parameters = list(job.delta.layers.parameters())
    engine = Engine([job], on)
    losses = [engine.losses([job], [batch])[0], engine.adapted(**inputs, labels=labels, deltas=job.name).loss]
    ours, theirs = (torch.autograd.grad(loss, parameters, allow_unused=True) for loss in losses)
    engine.close()
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=0, abs=1e-6)
    assert sum(own is not None for own in ours) > 10
    for own, other in zip(ours, theirs, strict=True):
        assert (own is None) == (other is None) and (own is None or float((own - other).abs().max()) <= 1e-6)


def test_a_language_model_learns_by_its_own_logits() -> None:
    torch.manual_seed(0)
    network = hf.AutoModelForCausalLM.from_config(CONFIGS["scaled and capped"]()).eval()
    with torch.no_grad():
        for value in network.parameters():
            value.mul_(4.0)
    on = Backbone(network.double(), tokenizer(False), "capped")
    (job,) = jobs_of([plan("lora", task("generation"))], on)
    batch = batch_of(job, on)
    labels = torch.full_like(batch.inputs["input_ids"], -100)
    for row, example in enumerate(batch.examples):
        # The network shifts labels itself.
        labels[row, 1 : len(example.target)] = torch.tensor(example.target[:-1])
    engine = Engine([job], on)
    ours = float(engine.losses([job], [batch])[0].detach())
    with torch.no_grad():
        theirs = float(engine.adapted(**batch.inputs, labels=labels, deltas=job.name).loss)
    engine.close()
    # Its own loss is computed in float32.
    assert ours == pytest.approx(theirs, rel=0, abs=1e-6)
