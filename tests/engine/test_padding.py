"""Padding, windows, caches and prompts of different lengths: a row's result does not depend on how it is laid out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from tests.backbone.families import build
from tests.engine.subjects import SPECS, adapted, close
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.compose.expression import parse
from deltatune.delta.adapted import Adapted
from deltatune.laws.families import IDS, SMALL, tiny
from deltatune.laws.subject import Row, Subject, made

GROUPED: dict[str, Any] = dict(SMALL, **IDS, num_key_value_heads=2)
MIXED = ["sliding_attention", "full_attention"]
WINDOWED: dict[str, Callable[[], Any]] = {
    "mistral": lambda: hf.MistralConfig(**GROUPED, sliding_window=4),
    "gemma3": lambda: hf.Gemma3TextConfig(**GROUPED, sliding_window=4, head_dim=8, layer_types=MIXED),
    "modernbert": lambda: hf.ModernBertConfig(
        **dict(SMALL, num_hidden_layers=4), local_attention=4, global_attn_every_n_layers=3, cls_token_id=1,
        sep_token_id=2, **IDS,
    ),
}  # fmt: skip
LEFT = (*WINDOWED, "llama", "gpt2", "t5", "bert")
GENERATING = ("mistral", "gemma3", "llama", "gpt2", "t5", "bart")
# Sorting it by delta takes a cycle of three, so an order in place of its inverse gives rows to other deltas.
ROUTE = ("one", "two", None, "two", "one", "one")


@cache
def model(family: str) -> Backbone:
    if family not in WINDOWED:
        return Backbone(build(family) if family == "bart" else tiny(family), name=family)
    torch.manual_seed(0)
    config = WINDOWED[family]()
    auto = hf.AutoModel if family == "modernbert" else hf.AutoModelForCausalLM
    module = auto.from_config(config)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)  # at the default size the blocks do next to nothing
    return Backbone(module.eval(), name=family)


def pair(text: str, family: str) -> tuple[Subject, Adapted, list[Row]]:
    """Two deltas of one kind, and rows of which some are longer than the windows."""
    held = Subject(parse(text), model(family))
    return held, adapted(text, held.fresh(), "one", "two"), [*held.rows(4, seed=2), *held.rows(2, length=13, seed=3)]


def laid_out(held: Subject, on: Adapted, rows: Sequence[Row], route: Sequence[str | None], left: bool) -> list[Tensor]:
    """Outputs at the real tokens of rows that are padded on one side."""
    batch = held.batch(rows, left=left)
    both = held.backbone.kind == "encoder-decoder"
    if left and not both:  # absolute positions count from the first real token, as generation has them
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    output = on(**batch, deltas=list(route))
    if both:
        output = output.encoder_last_hidden_state
    else:
        output = output.logits if "logits" in output else output.last_hidden_state
    assert output.shape[:2] == batch["input_ids"].shape
    return [output[i, -len(r.ids) :] if left else output[i, : len(r.ids)] for i, r in enumerate(rows)]


@pytest.mark.parametrize("family", LEFT)
@pytest.mark.parametrize("text", SPECS)
@torch.no_grad()
def test_padding_on_either_side_gives_each_row_alone(text: str, family: str) -> None:
    held, on, rows = pair(text, family)
    for mode in (False, True):
        on.bank.train(mode)
        alone = [laid_out(held, on, [r], [name], False)[0] for r, name in zip(rows, ROUTE, strict=True)]
        close(laid_out(held, on, rows, ROUTE, False), alone)
        close(laid_out(held, on, rows, ROUTE, True), alone)


@pytest.mark.parametrize("family", [*LEFT, "bart"])
@torch.no_grad()
def test_prompts_of_different_lengths_in_one_batch(family: str) -> None:
    """Rows of n=3, n=7, both, a prefix and none: each as alone, padded on either side."""
    held, _, rows = pair("prompt", family)
    on = held.fresh()
    specs = {"three": "prompt(n=3)", "seven": "prompt(n=7)", "both": "prompt(n=2) | prompt(n=3)", "prefix": "prefix"}
    deltas = [made(parse(spec), on, name, seed=seed) for seed, (name, spec) in enumerate(specs.items())]
    both = Adapted(on, deltas)
    for route in (("three", "seven", None, "both", "prefix", "three"), ("seven", None, "three", "three", None, "both")):
        alone = [laid_out(held, both, [r], [name], False)[0] for r, name in zip(rows, route, strict=True)]
        for left in (False, True)[: 1 if family == "bart" else 2]:  # BART counts its positions from the padding on
            close(laid_out(held, both, rows, route, left), alone)
        assert float((alone[0] - laid_out(held, both, rows[:1], [None], False)[0]).abs().max()) > 1e-3


def test_gradients_of_prompts_do_not_depend_on_the_side() -> None:
    held, on, rows = pair("prompt(n=3)", "gemma3")

    def gradients(outputs: list[Tensor]) -> list[Tensor]:
        on.bank.zero_grad()
        torch.stack([output.square().sum() for output in outputs]).sum().backward()
        return [p.grad.clone() for p in on.bank.parameters()]

    alone = gradients([laid_out(held, on, [r], [name], False)[0] for r, name in zip(rows, ROUTE, strict=True)])
    assert all(gradient.any() for gradient in alone)
    for left in (False, True):
        close(gradients(laid_out(held, on, rows, ROUTE, left)), alone)


@torch.no_grad()
def test_labels_stay_with_their_tokens() -> None:
    """The loss of a row is that of the bare network with the prompt's vectors before the row's own, on either side."""
    held, on, rows = pair("prompt(n=3)", "gemma3")
    prompt = next(on.bank["one"].parameters())
    for row in rows:
        ids = row.ids[None]
        embedded = torch.cat([prompt[None], held.backbone.embeddings(ids).double()], dim=1)
        labels = torch.cat([torch.full((1, 3), -100), ids], dim=1)
        wanted = on.backbone(inputs_embeds=embedded, labels=labels).loss
        for left in (False, True):
            batch = held.batch([row, rows[-1]], left=left)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            labels[1] = -100
            positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
            got = on(**batch, position_ids=positions, labels=labels, deltas=["one", "two"]).loss
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)  # transformers computes losses in float32


@torch.no_grad()
def test_a_prefix_is_seen_beyond_the_window() -> None:
    """It has no position: every query attends to it, however far it is, as to a cache that the mask always shows."""
    held, on, _ = pair("prefix(n=1)", "mistral")
    rows = held.rows(1, length=13)
    for name, parameter in on.bank["one"].named_parameters():
        if name.endswith("values"):
            parameter.add_(1.0)
    cache = hf.DynamicCache()
    for number, (site, layer) in enumerate(on.bank["one"].at_sites()):
        assert site.block == number
        held_there = [layer.get_parameter(name).reshape(1, 1, 2, 8).transpose(1, 2) for name in ("keys", "values")]
        cache.update(*held_there, number)
    far = torch.arange(13)[:, None] - torch.arange(13)
    seen = torch.cat([torch.ones(13, 1, dtype=torch.bool), (far >= 0) & (far < 4)], dim=1)[None, None]
    batch = {"input_ids": rows[0].ids[None], "position_ids": torch.arange(13)[None]}
    wanted = on.backbone(**batch, attention_mask=seen, past_key_values=cache).logits
    close(on(**batch, deltas="one").logits, wanted)
    bare = on.backbone(**batch).logits
    assert bool(((wanted - bare).abs().amax(-1) > 1e-2).all())


@pytest.mark.parametrize("family", GENERATING)
@pytest.mark.parametrize("text", SPECS)
def test_static_caches_generate_what_dynamic_ones_do(text: str, family: str) -> None:
    """Tokens and the scores behind them: those of many steps in a cache, of whole rows at once, of each row alone."""
    held, on, rows = pair(text, family)
    batch = held.batch(rows, left=held.backbone.kind == "decoder")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    settings: dict[str, Any] = dict(
        max_new_tokens=6, min_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True
    )

    def generated(rows: dict[str, Tensor], route: Any, **options: Any) -> tuple[list[list[int]], Tensor]:
        """New tokens and, of one beam, the logits [rows, steps, vocabulary] of each; of several, the scores [rows]."""
        made = on.generate(**rows, deltas=route, **settings, **options)
        scores = made.sequences_scores if "sequences_scores" in made else torch.stack(made.logits, dim=1)
        return made.sequences[:, -6:].tolist(), scores

    for beams in (1, 3):
        tokens, scores = generated(inputs, list(ROUTE), num_beams=beams)
        for options in ({"cache_implementation": "static"}, {"use_cache": False}):
            others = generated(inputs, list(ROUTE), num_beams=beams, **options)
            assert others[0] == tokens
            close(others[1], scores, 1e-6)  # which transformers keeps in float32
    tokens, scores = generated(inputs, list(ROUTE))
    for number, (row, name) in enumerate(zip(rows, ROUTE, strict=True)):
        alone = generated({"input_ids": row.ids[None], "attention_mask": torch.ones(1, len(row.ids))}, name)
        assert alone[0] == [tokens[number]]
        close(alone[1], scores[number : number + 1], 1e-6)
