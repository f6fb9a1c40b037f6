"""Keys and values inside attention: one attention function that stands before whatever the backbone uses.

While a delta is attached, the backbone's attention is called through `deltatune_<its own>`. A prefix is put before
keys and values there and never enters the cache, so caches, beams and recomputation agree. Short rows on a CPU are
computed as plain products: the fused kernel's backward is the largest single cost of a training step there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.backbone.sites import Site
from deltatune.delta.call import Call, current, outside
from deltatune.delta.layer import KeyValueLayer
from deltatune.delta.patches import over_patches
from deltatune.errors import RoutingError, SiteError

PREFIX = "deltatune_"
# Static rule: at or below this many keys, training on a CPU uses plain products (measured; see docs/log.md).
PLAIN_LENGTH = 128

Attention = Callable[..., tuple[Tensor, Tensor | None]]


def registered(implementation: str) -> str:
    """Register our attention in front of `implementation` and return its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    if implementation not in ("sdpa", "eager"):
        raise SiteError(
            f"attention implementation {implementation!r} takes no delta inside attention; "
            f"load the backbone with attn_implementation='sdpa' or 'eager'"
        )
    name = PREFIX + implementation
    AttentionInterface.register(name, sdpa if implementation == "sdpa" else eager)
    AttentionMaskInterface.register(name, sdpa_mask if implementation == "sdpa" else eager_mask)
    return name


@outside
def sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    """Attention of a backbone that uses the fused kernel."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return _attend(sdpa_attention_forward, module, query, key, value, mask, **kwargs)


@outside
def eager(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    """Attention of a backbone that uses plain products: its masks are never left out, so none means none."""
    call = current()
    if mask is None and (call is None or call.packed is None):
        kwargs = {**kwargs, "is_causal": False}
    return _attend(plain, module, query, key, value, mask, **kwargs)


def _attend(
    inner: Attention,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    call = current()
    if call is None:
        return inner(module, query, key, value, mask, **kwargs)
    if call.packed is not None:
        return _packed(inner, call, module, query, key, value, kwargs), None
    return _by_rows(inner, call, module, query, key, value, mask, kwargs)


def _packed(
    inner: Attention,
    call: Call,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: dict[str, Any],
) -> Tensor:
    """Attention of rows without padding, bucket by bucket; query, key and value are [1, heads, tokens, width].

    A prefix is laid before whole rows in their order, so there all rows make one bucket.
    """
    assert call.packed is not None
    if options.get("position_bias") is not None:
        raise RoutingError("a position bias is given for rows, and these have no padding")
    site = _site_of(call, module)
    prefixed = site is not None and call.plan.rounds((site.key, "kv"))
    grid = call.packed.rows if prefixed else call.packed.buckets
    ordered = _ordered(module, options.get("is_causal"))
    cells = [grid.spread(t.squeeze(0).transpose(0, 1)) for t in (query, key, value)]
    sizes = [rows * length for rows, length in grid.shapes]
    found = []
    for shape, seen, *parts in zip(
        grid.shapes, grid.masks(query.device), *(c.split(sizes) for c in cells), strict=True
    ):
        q, k, v = (part.unflatten(0, shape).transpose(1, 2) for part in parts)
        # Where a query sees nothing after itself, it does not see the padding either.
        out, _ = _by_rows(inner, call, module, q, k, v, None if ordered else seen, options)
        found.append(out.flatten(0, 1))
    return grid.collect(torch.cat(found)).unsqueeze(0)


def _ordered(module: nn.Module, is_causal: bool | None) -> bool:
    """Whether a query sees nothing after itself; a module that does not say does so, as in transformers."""
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _site_of(call: Call, module: nn.Module) -> Site | None:
    """The site as which a module of attention runs now, if deltas stand there."""
    return next((site for site in call.bank.attention_sites.get(module, ()) if call.runs(site)), None)


def _by_rows(
    inner: Attention,
    call: Call,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    mask = over_patches(call, mask, key.shape[2])
    site = _site_of(call, module)
    if site is not None and call.plan.rounds((site.key, "kv")):
        key, value, mask, bias = with_prefix(call, site, module, query, key, value, mask, kwargs)
        kwargs = {**kwargs, "is_causal": False}
        if bias is not None:
            kwargs["position_bias"] = bias
    if call.training and key.device.type == "cpu" and key.shape[2] <= PLAIN_LENGTH:
        inner = plain
    return inner(module, query, key, value, mask, **kwargs)


def plain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention by batched products.

    query [rows, heads, queries, width], key and value [rows, kv heads, keys, width]; returns the result [rows, queries,
    heads, width] and the weights [rows, heads, queries, keys].
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query * scale, key.transpose(2, 3))
    if position_bias is not None:
        scores = scores + position_bias
    if mask is None and query.shape[2] > 1 and _ordered(module, is_causal):
        mask = causal(query, key)
    if mask is not None:
        if mask.dtype == torch.bool:
            # The least finite number and not -inf: a row that sees nothing must not become NaN. Added and not filled
            # in: the mask has one head, the scores have many.
            mask = torch.zeros(mask.shape, dtype=scores.dtype, device=mask.device).masked_fill_(
                ~mask, torch.finfo(scores.dtype).min
            )
        scores = scores + mask
    weights = nn.functional.softmax(scores, dim=-1)
    if dropout:
        weights = nn.functional.dropout(weights, dropout)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def causal(query: Tensor, key: Tensor) -> Tensor:
    """Mask [1, 1, queries, keys]: the last query sees all keys."""
    queries, keys = query.shape[2], key.shape[2]
    return torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)[None, None]


def with_prefix(
    call: Call,
    site: Site,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Put each row's prefix before its keys and values; return key, value, mask and position bias.

    A row with a shorter prefix, or none, has the rest masked. The prefix has no position: its bias is zero.
    """
    keys, values, seen = _prefixes(call, site, key)
    length = keys.shape[2]
    if mask is None and query.shape[2] > 1 and _ordered(module, options.get("is_causal")):
        mask = causal(query, key)
    if mask is not None or seen is not None:
        rows, queries = key.shape[0], query.shape[2]
        if mask is None:
            mask = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=key.device)
        front = torch.ones(rows, length, dtype=torch.bool, device=key.device) if seen is None else seen
        front = front[:, None, None, :]
        if mask.dtype != torch.bool:
            front = torch.zeros(front.shape, dtype=mask.dtype, device=key.device).masked_fill(
                ~front, torch.finfo(mask.dtype).min
            )
        heads = mask.shape[1]
        mask = torch.cat(
            [front.expand(rows, heads, queries, length), mask.expand(rows, heads, queries, mask.shape[-1])], dim=-1
        )
    bias = options.get("position_bias")
    if bias is not None:
        bias = torch.cat([bias.new_zeros(*bias.shape[:-1], length), bias], dim=-1)
    return torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2), mask, bias


def _prefixes(call: Call, site: Site, key: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return keys, values [rows, kv heads, length, width] and which of them a row sees [rows, length] (None: all)."""
    times = call.expansion(key.shape[0], site.key)
    place = (site.key, "kv")
    pieces: list[tuple[int, int, Tensor, Tensor]] = []
    rounds = call.plan.rounds(place)
    for runs in rounds:
        for run in runs:
            layer = run.layers[0]
            assert isinstance(layer, KeyValueLayer)
            if run.scale != 1.0:
                raise RoutingError(f"a prefix cannot act with weight {run.scale}; it takes 0 or 1")
            each = (run.stop - run.start) * times // len(run.layers)
            both = [
                # [deltas, length, heads * width] -> [rows, heads, length, width]
                t.unflatten(-1, (key.shape[1], key.shape[3])).transpose(1, 2).repeat_interleave(each, dim=0)
                for t in layer.keys_values(call.bank.params(call, place, run, key.dtype))
            ]
            pieces.append((run.start * times, run.stop * times, both[0], both[1]))
    rows = key.shape[0]
    order = call.permutation(times, key.device)
    lengths = {piece[2].shape[2] for piece in pieces}
    if len(rounds) == 1 and len(lengths) == 1 and sum(stop - start for start, stop, _, _ in pieces) == rows:
        keys, values = (torch.cat([piece[i] for piece in pieces]) for i in (2, 3))  # type: ignore[misc]
        return (keys[order[1]], values[order[1]], None) if order else (keys, values, None)
    return _ragged(pieces, rows, key, order)


def _ragged(
    pieces: list[tuple[int, int, Tensor, Tensor]], rows: int, key: Tensor, order: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Lay prefixes of different lengths, or several in one row, side by side; what a row lacks is zero and masked."""
    blocks: list[tuple[Tensor, Tensor, Tensor]] = []
    for start, stop, keys, values in pieces:
        around = (0, 0, 0, 0, 0, 0, start, rows - stop)
        seen = torch.zeros(rows, keys.shape[2], dtype=torch.bool, device=key.device)
        seen[start:stop] = True
        blocks.append((nn.functional.pad(keys, around), nn.functional.pad(values, around), seen))
    keys, values = (torch.cat([block[i] for block in blocks], dim=2) for i in (0, 1))
    seen = torch.cat([block[2] for block in blocks], dim=1)
    return (keys[order[1]], values[order[1]], seen[order[1]]) if order else (keys, values, seen)
