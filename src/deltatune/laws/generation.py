"""Law of generation: each row of a batch generates what it generates alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltatune.delta.adapted import Adapted
from deltatune.errors import RoutingError
from deltatune.laws.subject import Subject, agree, demand, made, prefix
from deltatune.methods.reparameterization.lora import LoRA

MODES: dict[str, dict[str, Any]] = {
    "greedy with cache": {},
    "greedy without cache": {"use_cache": False},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "total length, no pair twice": {"max_new_tokens": None, "max_length": 14, "no_repeat_ngram_size": 2},
}
ROUTE = ("one", "lora", "two", "one", None, "prefix")


def generates_as_alone(subject: Subject) -> None:
    """Different deltas in one left-padded batch generate the tokens that each generates alone, in every mode."""
    if subject.backbone.kind == "encoder":
        return
    backbone = subject.fresh()
    specs = {"one": subject.spec, "two": subject.spec, "lora": LoRA(r=2), "prefix": prefix(backbone, 3)}
    deltas = [made(spec, backbone, name, seed=seed) for seed, (name, spec) in enumerate(specs.items())]
    adapted = Adapted(backbone, deltas)
    rows = subject.rows(len(ROUTE), seed=4)
    batch = subject.prompted(rows)
    for mode, options in MODES.items():
        together = _generate(adapted, batch, list(ROUTE), options)
        each = len(together) // len(ROUTE)
        for i, name in enumerate(ROUTE):
            one = {key: value[i : i + 1] for key, value in batch.items()}
            alone = _generate(adapted, one, name, options)
            got = together[i * each : (i + 1) * each]
            same = _trimmed(got, subject) == _trimmed(alone, subject)
            demand(same, f"{mode}: row {i} ({name}) gives {got.tolist()}, alone {alone.tolist()}")


def cached_is_recomputed(subject: Subject) -> None:
    """Generation with a cache gives the tokens of repeated forwards without one; so do forwards in two parts.

    A method may refuse the second part with a RoutingError.
    """
    if subject.backbone.kind == "encoder":
        return
    backbone = subject.fresh()
    adapted = Adapted(backbone, [made(subject.spec, backbone)])
    rows = subject.rows(2, length=5)
    batch = subject.batch(rows)
    made_tokens = _generate(adapted, subject.prompted(rows), "subject", {})
    both = subject.backbone.kind == "encoder-decoder"
    config: Any = backbone.module.config
    tokens = torch.full((2, 1), config.decoder_start_token_id) if both else batch["input_ids"]
    for _ in range(6):
        inputs = {**batch, "decoder_input_ids": tokens} if both else {"input_ids": tokens}
        logits = adapted(**inputs, deltas="subject").logits[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    if both and bool((made_tokens[:, 0] != config.decoder_start_token_id).any()):
        tokens = tokens[:, 1:]  # Whisper leaves the start out of what it returns
    demand(_trimmed(made_tokens, subject) == _trimmed(tokens, subject), f"{made_tokens.tolist()} != {tokens.tolist()}")
    if not both:
        _in_parts(adapted, batch["input_ids"])


def _in_parts(adapted: Adapted, ids: Tensor) -> None:
    whole = adapted(input_ids=ids, deltas="subject").logits
    for training in (False, True):
        adapted.bank.train(training)
        first = adapted(input_ids=ids[:, :2], deltas="subject", use_cache=True)
        try:
            rest = adapted(input_ids=ids[:, 2:], deltas="subject", past_key_values=first.past_key_values).logits
        except RoutingError:
            return
        agree(torch.cat([first.logits, rest], dim=1), whole, "in two parts with a cache")


def _generate(adapted: Adapted, batch: dict[str, Tensor], route: Any, options: dict[str, Any]) -> Tensor:
    settings = {"max_new_tokens": 6, "do_sample": False, **options}
    found: Tensor = adapted.generate(**batch, deltas=route, **settings)
    return found


def _trimmed(tokens: Tensor, subject: Subject) -> list[list[int]]:
    """Token lists up to the first end of text after the start; what follows is filling."""
    end = getattr(subject.backbone.module.config, "eos_token_id", None)
    lists = []
    for row in tokens.tolist():
        stops = [i for i, token in enumerate(row) if token == end and i > 0]
        lists.append(row[: stops[0]] if stops else row)
    return lists
