"""The call rewriter: put trained tokens into the input and take their positions out of the output again.

BERT-likes get them after the first token, since their pooler reads position 0; all others before it. The first token is
the first that is no padding. Tokens of one row stand together: sliding windows and relative positions count what lies
between, so what a row lacks of its neighbours' tokens is put at its end or before its text. Heads never see the added
positions, so no index of theirs moves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltatune.backbone.load import Backbone
from deltatune.backbone.synonyms import EMBEDDED
from deltatune.delta.call import Call, outside
from deltatune.delta.inserted import Inserted, Reserved, Tokens, column_of, place
from deltatune.delta.layer import TokenLayer
from deltatune.delta.patches import InsertedPatches, reserve
from deltatune.errors import RoutingError


@outside
def rewrite(
    call: Call, backbone: Backbone, inputs: dict[str, Any], *, generating: bool = False
) -> Inserted | InsertedPatches | None:
    """Put the call's tokens into `inputs` (changed in place); None if no row has any.

    Rows may have different numbers of tokens: what a row lacks is masked, and its positions do not move. RoutingError
    if the inputs hold no token ids, or if a row gets longer than the backbone's positions.
    """
    found = _tokens(call, backbone)
    if found is None:
        return None
    if not backbone.takes_embeddings:
        return reserve(call, found)
    added, seen, own, _ = found
    cache = inputs.get("past_key_values")
    if cache is not None and not generating and cache.get_seq_length() > 0:
        raise RoutingError("the cache holds the prompt already and it would be put in again; use `generate`")
    ids, embeds = inputs.pop("input_ids", None), inputs.pop("inputs_embeds", None)
    if ids is None and embeds is None:
        raise RoutingError("a prompt needs input_ids or inputs_embeds, given by name")
    if embeds is None:
        embeds = _table(backbone)(ids)
    rows, length = embeds.shape[:2]
    number = added.shape[1]
    limit = backbone.positions
    if limit is not None and length + number > limit:
        raise RoutingError(f"{length} tokens and a prompt of {number} exceed the {limit} positions of {backbone.name}")
    mask = inputs.get("attention_mask")
    mask = torch.ones(rows, length, dtype=torch.long, device=embeds.device) if mask is None else mask
    if mask.ndim != 2:
        raise RoutingError(f"a prompt needs an attention mask [rows, tokens], got shape {tuple(mask.shape)}")

    first = _first(mask)
    after = backbone.kind == "encoder"
    # An encoder counts its positions from the left and need not be told; generation goes on from the right.
    to_end = backbone.kind != "decoder"
    placed = place(first, seen, length, int(after), to_end=to_end and len(set(own)) > 1)
    call.gathered["inserted"] = Reserved(found, placed, length + number, to_end, cached=generating)
    between = placed.between
    inputs["attention_mask"] = between(mask, seen.to(mask))
    if backbone.kind != "encoder-decoder":
        if not generating:
            own_at, added_at = _positions(backbone, ids, embeds, inputs.get("position_ids"), first, after, seen)
            inputs["position_ids"] = between(own_at, added_at)
            if ids is not None and getattr(backbone.trunk.config, "model_type", "") in EMBEDDED:
                layer: Any = backbone.trunk.embeddings
                embeds = layer(input_ids=ids, attention_mask=mask, position_ids=own_at)
                added = layer(inputs_embeds=added, position_ids=added_at)
        elif "position_ids" in inputs:
            raise RoutingError("a prompt sets position_ids itself during generation; leave them out")
        labels = inputs.get("labels")
        if isinstance(labels, Tensor) and labels.shape == (rows, length):
            inputs["labels"] = between(labels, labels.new_full((rows, number), -100))
    inputs["inputs_embeds"] = between(embeds, added.to(embeds))
    types = inputs.get("token_type_ids")
    if types is not None:
        inputs["token_type_ids"] = between(types, types.gather(1, column_of(first, types)).expand(rows, number))
    return placed


def _table(backbone: Backbone) -> nn.Module:
    """The table that the network itself reads the tokens from, at which layers may stand."""
    site = next(s for s in backbone.anatomy.sites if s.name == "embed")
    return backbone.module.get_submodule(site.exit)


def _first(mask: Tensor) -> Tensor | None:
    """Return where the first token of each row stands [rows, 1]; None if no row has padding before it."""
    return None if bool(mask[:, 0].all()) else mask.bool().long().argmax(dim=1, keepdim=True)


def _tokens(call: Call, backbone: Backbone) -> Tokens | None:
    """Return the tokens that the deltas of a call put into its rows; None if they put in none."""
    site = next((s for s in backbone.anatomy.sites if s.name == "embed"), None)
    rounds = call.plan.rounds((site.key, "tokens")) if site is not None else ()
    if site is None or not rounds:
        return None
    rows: list[list[Tensor]] = [[] for _ in range(call.rows)]
    held = [0] * len(call.segments)
    starts: dict[tuple[int, int], int] = {}
    for runs in rounds:
        for run in runs:
            layer = run.layers[0]
            assert isinstance(layer, TokenLayer)
            if run.scale != 1.0:
                raise RoutingError(f"a prompt cannot act with weight {run.scale}; it takes 0 or 1")
            tokens = layer.tokens(call.bank.params(call, (site.key, "tokens"), run, backbone.dtype))
            each = (run.stop - run.start) // len(run.layers)
            for row in range(run.start, run.stop):
                rows[row].append(tokens[(row - run.start) // each])
            for segment, own in zip(run.segments, run.layers, strict=True):
                starts[segment, own.member] = held[segment]
                held[segment] += tokens.shape[1]
    most = max(held)
    filled, seen = [], torch.zeros(call.rows, most, dtype=torch.bool, device=backbone.device)
    for row, parts in enumerate(rows):
        number = sum(len(t) for t in parts)
        seen[row, most - number :] = True
        tokens = torch.cat(parts) if parts else torch.zeros(0, site.d_out, dtype=backbone.dtype, device=backbone.device)
        filled.append(nn.functional.pad(tokens, (0, 0, most - number, 0)))
    added = torch.stack(filled)
    order = call.permutation(1, added.device)
    if order:
        added, seen = added[order[1]], seen[order[1]]
    return Tokens(added, seen, held, {at: most - held[at[0]] + start for at, start in starts.items()})


def _positions(
    backbone: Backbone,
    ids: Tensor | None,
    embeds: Tensor,
    given: Tensor | None,
    first: Tensor | None,
    after: bool,
    seen: Tensor,
) -> tuple[Tensor, Tensor]:
    """Positions of the text [rows, tokens], moved on by each row's own number of tokens, and of the prompt."""
    base = own_positions(backbone, ids, embeds, given)
    column = column_of(first, base)
    start = base.gather(1, column) + int(after)
    middle = start + (seen.long().cumsum(dim=1) - 1).clamp(min=0)
    behind = torch.arange(base.shape[1], device=base.device) >= column + int(after)
    return base + behind * seen.sum(dim=1, keepdim=True), middle


def own_positions(backbone: Backbone, ids: Tensor | None, like: Tensor, given: Tensor | None, start: int = 0) -> Tensor:
    """Positions [rows, tokens] that the backbone would use for rows shaped as `like`, of which `start` are cached."""
    rows, length = like.shape[:2]
    if given is not None:
        return given.expand(rows, length)
    base = torch.arange(start, start + length, device=like.device).expand(rows, length)
    embeddings: Any = getattr(getattr(backbone.module, "base_model", None), "embeddings", None)
    if hasattr(embeddings, "create_position_ids_from_inputs_embeds"):
        # RoBERTa and its kin (ESM, MPNet) count from after the padding index, and padding has that index itself.
        padding = int(embeddings.padding_idx)
        base = base + padding + 1
        if ids is not None:
            tokens = ids.ne(padding).long()
            base = (tokens.cumsum(dim=1) + start) * tokens + padding
    return base
