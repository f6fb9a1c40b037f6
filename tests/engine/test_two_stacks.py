"""Encoder-decoders: prefixes in the encoder, the decoder and across, prompts in the encoder, beams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.backbone.families import build
from tests.engine.subjects import adapted, close
from torch import Tensor, nn

from deltatune.backbone.load import Backbone
from deltatune.compose.expression import parse
from deltatune.delta.adapted import Adapted
from deltatune.delta.delta import Delta
from deltatune.laws.subject import Row, Subject, moved

FAMILIES = ("t5", "bart")
PLACES = {"in the encoder": "encoder attn", "in the decoder": "decoder attn", "across": "decoder cross"}


def fresh(family: str) -> Backbone:
    return Backbone(build(family).double().eval(), name=family)


def at(on: Backbone, place: str, name: str, seed: int = 0) -> Delta:
    """A prefix at the sites of one name in one stack."""
    stack, site = PLACES[place].split()
    spec = parse("prefix(n=2)")
    sites = [(0, s) for s in on.anatomy.sites if (s.stack, s.name) == (stack, site)]
    return moved(Delta(spec, sites, seed=seed, name=name).to(torch.float64), seed + 1, size=1.0)


def states(output: Any) -> dict[str, Tensor]:
    return {"encoder": output.encoder_last_hidden_state, "logits": output.logits}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_each_side_changes_its_own(family: str) -> None:
    on = fresh(family)
    held = Subject(parse("prefix"), on)
    rows = held.rows(4)
    model = Adapted(on, [at(on, place, place) for place in PLACES])
    bare = states(model(**held.batch(rows), deltas=None))
    route = [*PLACES, None]
    found = states(model(**held.batch(rows), deltas=route))
    for i, place in enumerate(route):
        length = len(rows[i].ids)
        moved_in = {name: not torch.allclose(found[name][i, :length], bare[name][i, :length]) for name in bare}
        assert moved_in == {"encoder": place == "in the encoder", "logits": place is not None}, place


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_prefix_across_is_two_more_states_of_the_encoder(family: str) -> None:
    """Keys and values that a state of the encoder would have give what that state gives; it has no position there."""
    on = fresh(family)
    held = Subject(parse("prefix"), on)
    rows = held.rows(3)
    batch = held.batch(rows)
    states = torch.randn(2, on.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    delta = at(on, "across", "one")
    for site, layer in delta.at_sites():
        own = {name: on.anatomy.by_key[f"{site.key}.{name}"].exit for name in ("k", "v")}
        for name, parameter in (("k", layer.keys), ("v", layer.values)):
            parameter.copy_(on.module.get_submodule(own[name])(states))
    encoded = on.module.get_encoder()(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    wanted = on.module(
        encoder_outputs=(torch.cat([states.expand(3, -1, -1), encoded], dim=1),),
        attention_mask=nn.functional.pad(batch["attention_mask"], (2, 0), value=1),
        decoder_input_ids=batch["decoder_input_ids"],
    ).logits
    model = Adapted(on, [delta])
    for mode in (False, True):
        model.bank.train(mode)
        close(model(**batch).logits, wanted)


@pytest.mark.parametrize("place", ["in the encoder", "in the decoder"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_prefix_inside_is_keys_and_values_before_the_texts(family: str, place: str) -> None:
    """The first block's attention of one unpadded row, worked out by hand; the text keeps its position bias."""
    on = fresh(family)
    held = Subject(parse("prefix"), on)
    batch = held.batch(held.rows(1, length=5))
    delta = at(on, place, "one")
    model = Adapted(on, [delta])
    site, layer = delta.at_sites()[0]
    attention: Any = on.module.get_submodule(site.heads.module)
    seen: dict[str, Tensor] = {}

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen["x"] = args[0] if args else kwargs["hidden_states"]
        seen["y"] = output[0]

    attention.register_forward_hook(keep, with_kwargs=True)
    model(**batch)
    x = seen["x"]
    module = {name: on.module.get_submodule(on.anatomy.by_key[f"{site.key}.{name}"].exit) for name in "qkvo"}
    # Called under no call, so that nothing of the delta acts in them.
    q, k, v = (module[name](x).unflatten(-1, (site.heads.number, -1)).transpose(1, 2) for name in "qkv")
    front = [t.unflatten(-1, (site.heads.number, -1)).transpose(0, 1)[None] for t in (layer.keys, layer.values)]
    length = x.shape[1]
    scores = q @ k.mT * (1.0 if family == "t5" else q.shape[-1] ** -0.5)
    if family == "t5":
        scores = scores + attention.compute_bias(length, length)
    if place == "in the decoder":
        scores = scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -1e30)
    before = q @ front[0].mT * (1.0 if family == "t5" else q.shape[-1] ** -0.5)
    weights = torch.cat([before, scores], dim=-1).softmax(-1)
    wanted = module["o"]((weights @ torch.cat([front[1], v], dim=2)).transpose(1, 2).flatten(2))
    close(seen["y"], wanted)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_prompt_is_vectors_before_the_encoders_text(family: str) -> None:
    on = fresh(family)
    held = Subject(parse("prompt(n=3)"), on)
    rows = held.rows(3)
    model = adapted("prompt(n=3)", on)
    batch = held.batch(rows)
    prompt = next(model.bank.parameters())
    scale = getattr(on.module.get_encoder(), "embed_scale", 1.0)
    embedded = on.embeddings(batch["input_ids"]) * (scale if not hasattr(on.embeddings, "embed_scale") else 1.0)
    wanted = on.module(
        inputs_embeds=torch.cat([prompt.expand(3, -1, -1), embedded], dim=1),
        attention_mask=nn.functional.pad(batch["attention_mask"], (3, 0), value=1),
        decoder_input_ids=batch["decoder_input_ids"],
    )
    got = model(**batch)
    close(got.logits, wanted.logits)
    for i, row in enumerate(rows):
        close(
            got.encoder_last_hidden_state[i, : len(row.ids)], wanted.encoder_last_hidden_state[i, 3 : 3 + len(row.ids)]
        )


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "num_return_sequences": 3}, {"cache_implementation": "static"}]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_all_of_them_in_one_batch(family: str, options: dict[str, Any]) -> None:
    """Each row generates what it generates alone; the encoder runs once, on rows that are not expanded yet."""
    on = fresh(family)
    held = Subject(parse("prefix"), on)
    rows: list[Row] = held.rows(6)
    prompts = [moved(Delta.build(parse(f"prompt(n={n})"), on, name=f"p{n}").to(torch.float64)) for n in (2, 5)]
    model = Adapted(on, [*(at(on, place, place) for place in PLACES), *prompts])
    route = [*PLACES, "p2", "p5", None]
    batch = held.batch(rows)
    settings: dict[str, Any] = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    together = model.generate(**inputs, deltas=route, **settings)
    each = len(together) // len(route)
    alone = [
        model.generate(
            input_ids=row.ids[None], attention_mask=torch.ones(1, len(row.ids)), deltas=name, **settings
        ).tolist()
        for row, name in zip(rows, route, strict=True)
    ]
    assert [together[i * each : (i + 1) * each].tolist() for i in range(len(route))] == alone
    bare = model.generate(**inputs, deltas=None, **settings)
    different = {i for i in range(len(route)) if together[i * each].tolist() != bare[i * each].tolist()}
    assert different and 5 not in different  # a change may leave the greatest token where it is
