"""A neighbour's prompt moves nothing, on backbones that count positions, tables and experts in a way of their own."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from tests.backbone.families import build
from tests.engine.subjects import backward, close
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.compose.expression import parse
from deltatune.delta.adapted import Adapted
from deltatune.delta.tokens import own_positions
from deltatune.laws.subject import Subject, agree_gradients, made

ROUTE = ["one", "two", None, "one", "two"]
AT_EXPERTS = "lora(r=2, at='ffn.{up,down}', dropout=0.3)"


@cache
def model(family: str) -> Backbone:
    return Backbone(build(family), name=family)


@pytest.mark.parametrize("family", ["bert", "roberta", "esm", "mpnet", "xlm-roberta-xl", "data2vec-text"])
def test_positions_are_those_that_the_backbone_counts_itself(family: str) -> None:
    module: Any = model(family).module
    # ESM's `inputs_embeds` stand behind its embedding layer.
    run = module.embeddings if family == "esm" else module
    table = module.embeddings.position_embeddings
    ids = torch.tensor([[5, 6, 7, 8], [9, 9, table.padding_idx or 0, table.padding_idx or 0]])
    seen: list[Tensor] = []
    handle = table.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run(input_ids=ids)
    run(inputs_embeds=module.get_input_embeddings()(ids))
    handle.remove()
    like = ids[..., None]
    assert len(seen) == 2
    for given, wanted in zip((ids, None), seen, strict=True):
        assert torch.equal(own_positions(model(family), given, like, None), wanted.expand(2, -1))


def test_positions_behind_a_cache_go_on() -> None:
    embeddings: Any = model("roberta").module.embeddings
    padding = embeddings.padding_idx
    ids = torch.tensor([[5, 6, 7], [9, padding, padding]])
    wanted = embeddings.create_position_ids_from_input_ids(ids, padding, 4)
    assert torch.equal(own_positions(model("roberta"), ids, ids[..., None], None, 4), wanted)


@pytest.mark.parametrize("text", ["adapter(m=3)", "parallel_adapter(m=3)"])
def test_a_span_of_attention_begins_where_rows_come_and_no_table_does(text: str) -> None:
    spans = [site for site in model("deberta-v2").anatomy.sites if site.name == "attn"]
    assert spans
    assert all(span.entry.endswith("value_proj") and span.rows == "rows" for span in spans)
    alone_and_together(text, "deberta-v2")


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_dropout_inside_experts_is_drawn_as_alone(family: str) -> None:
    alone_and_together(AT_EXPERTS, family)


def alone_and_together(text: str, family: str) -> None:
    """Outputs and gradients of rows in training, beside a prompt and without."""
    held = Subject(parse(text), model(family))
    backbone = held.fresh()
    deltas = {name: made(parse(text), backbone, name, seed=seed) for seed, name in enumerate(("one", "two"))}
    deltas["prompt"] = made(parse("prompt(n=3)"), backbone, "prompt", seed=2)
    on = Adapted(backbone, list(deltas.values()))
    on.bank.train()
    rows = held.rows(len(ROUTE) + 1, seed=2)
    route = [*ROUTE, "prompt"]
    together = held.run_drawn(on, rows, route, step=4)
    for name in ("one", "two"):
        own = [i for i, other in enumerate(route) if other == name]
        mine = [rows[i] for i in own]
        alone = held.run_drawn(on, mine, [name] * len(own), step=4)
        close([together[i] for i in own], alone)
        number = f"deltas.{on.bank.names.index(name)}."
        beside = backward(on, held.run_drawn(on, rows, route, step=4), rows)
        apart = backward(on, alone, mine)
        mine_only = {key: value for key, value in beside.items() if key.startswith(number)}
        agree_gradients(mine_only, {key: apart[key] for key in mine_only}, f"{name} beside a prompt")
