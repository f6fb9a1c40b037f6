"""The bank: the deltas attached to one backbone, their parameters stacked, and the engine that runs them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.backbone.sites import Site
from deltatune.backbone.weights import read_linear
from deltatune.delta.call import Call, Segment
from deltatune.delta.delta import Delta, generator
from deltatune.delta.inserted import Reserved, renew
from deltatune.delta.layer import DeepTokenLayer, ExpertLayer, Layer, Params, SpanningLayer
from deltatune.delta.plan import Place, Plan, Run
from deltatune.errors import RoutingError, UnknownName

PLANS_KEPT = 64
_building = threading.RLock()  # plans and stacks are made by one thread at a time


class _Stacked(torch.autograd.Function):
    """Read rows of a stack as one tensor, and hand each leaf its own gradient.

    The leaves are views of the stack, so nothing is copied; an absent leaf gets no gradient at all, so no optimiser
    moves it.
    """

    @staticmethod
    def forward(ctx: Any, stack: Tensor, rows: slice | Tensor, dtype: torch.dtype, *leaves: Tensor) -> Tensor:
        return stack[rows].to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, None, *gradients[0].unbind(0))


class Stack:
    """The parameters of all layers of one kind at one place: [deltas, ...] tensors that the leaves are views of."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.position = {id(layer): i for i, layer in enumerate(layers)}
        self.tensors: dict[str, Tensor] = {}
        for name in layers[0].names():
            if name in layers[0].tied:
                continue  # a leaf cannot be a view of the stacks of several places
            leaves = [layer.get_parameter(name) for layer in layers]
            stack = torch.stack([leaf.detach() for leaf in leaves])
            for leaf, row in zip(leaves, stack.unbind(0), strict=True):
                leaf.data = row
            self.tensors[name] = stack

    def rows(self, layers: Sequence[Layer]) -> slice | Tensor:
        """Return where these layers stand: a slice if they follow each other, else an index."""
        found = [self.position[id(layer)] for layer in layers]
        if found == list(range(found[0], found[0] + len(found))):
            return slice(found[0], found[0] + len(found))
        return torch.tensor(found, device=next((t.device for t in self.tensors.values()), None))


class Bank(nn.Module):
    """Deltas by name. Their parameters are leaves of their own, and views of one stack per place and kind."""

    def __init__(self, deltas: Sequence[Delta], sites: Sequence[dict[str, Site]]) -> None:
        super().__init__()
        self.names = [delta.name for delta in deltas]
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise RoutingError(f"two deltas are called {repeated[0]!r}; give each a name of its own")
        self.deltas = nn.ModuleList(deltas)
        # Place -> delta -> its layers there, in the order in which they act.
        self.places: dict[Place, dict[str, tuple[Layer, ...]]] = {}
        self.sites: dict[str, Site] = {}
        # Set by the attachment: what the rest of the engine asks on each call.
        self.attention_sites: dict[nn.Module, tuple[Site, ...]] = {}  # several where a block serves as several
        self.expert_sites: dict[nn.Module, dict[str, Site]] = {}
        self.linears: dict[str, nn.Module] = {}  # site -> the linear whose weight a layer there reads
        self.shared: dict[str, str] = {}  # site -> the block that serves as several
        self.has_tokens, self.two_stacks, self.weights_key = False, False, ""
        for delta, bound in zip(deltas, sites, strict=True):
            for address, layer in delta.layers.items():
                site = bound[address]
                self.sites[site.key] = site
                found = self.places.setdefault((site.key, layer.port), {})  # type: ignore[arg-type]
                found[delta.name] = (*found.get(delta.name, ()), layer)  # type: ignore[arg-type]
        self._forget()

    def _forget(self) -> None:
        self.plans: dict[tuple[Any, ...], Plan] = {}
        self.stacks: dict[tuple[Any, ...], Stack] = {}
        # Delta -> one stacked parameter of it and where its values lie: if they moved, the stacks are of no use.
        self.watched: dict[str, tuple[dict[str, Any], str, int]] = {}

    def __getitem__(self, name: str) -> Delta:
        if name not in self.names:
            raise UnknownName("delta", name, self.names)
        delta = self.deltas[self.names.index(name)]
        assert isinstance(delta, Delta)
        return delta

    def layers_at(self, place: Place) -> dict[str, tuple[Layer, ...]]:
        """Return delta -> its layers at a place."""
        return self.places.get(place, {})

    def plan(self, segments: tuple[Segment, ...], batched: bool = True) -> Plan:
        """Return the plan of a routing; the last few are kept."""
        for values, name, place in tuple(self.watched.values()):
            if values[name].data_ptr() != place:
                self._forget()
                break
        key = (segments, batched)
        found = self.plans.get(key)
        if found is None:
            with _building:
                while len(self.plans) >= PLANS_KEPT:
                    del self.plans[next(iter(self.plans))]
                found = self.plans.setdefault(key, Plan(self, segments, batched))
        return found

    # Stacks are a second view of the same storage, so whatever copies or moves the leaves ends them: `.to`, a copy,
    # another bank that holds the same delta, `load_state_dict(assign=True)`.

    def _apply(self, fn: Any, recurse: bool = True) -> Bank:
        self.release()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        self.release()
        return {**self.__dict__, "plans": {}, "stacks": {}, "watched": {}}

    def release(self) -> None:
        """Give every leaf a storage of its own again."""
        if self.stacks:
            for parameter in self.parameters():
                parameter.data = parameter.data.clone()
        self._forget()

    def params(self, call: Call, place: Place, run: Run, dtype: torch.dtype) -> Params:
        """Return the parameters of a run's layers with a leading axis `deltas`, in the dtype of the computation."""
        layers = run.layers
        reads = layers[0].needs == "weight-read"
        grad = torch.is_grad_enabled() and any(p.requires_grad for layer in layers for p in layer.parameters())
        key = (run, dtype)
        if not grad and key in call.gathered:
            kept: Params = call.gathered[key]
            return kept
        wanted, dtype = dtype, torch.promote_types(dtype, torch.float32) if reads else dtype
        if len(layers) == 1:
            tensors = {name: layers[0].get_parameter(name)[None].to(dtype) for name in layers[0].names()}
        else:
            if not run.stacked:
                stack = self._stack(place, layers[0])
                run.stacked[:] = (stack, stack.rows(layers))  # at once: another thread may do the same
            stack, rows = run.stacked
            read: Callable[..., Tensor] = _Stacked.apply
            tensors = {
                name: read(values, rows, dtype, *(layer.get_parameter(name) for layer in layers))
                if grad
                else values[rows].to(dtype)
                for name, values in stack.tensors.items()
            }
            for name in layers[0].tied:
                tensors[name] = torch.stack([layer.get_parameter(name) for layer in layers]).to(dtype)
        params = Params({name: t[:, None] if t.ndim == 2 else t for name, t in tensors.items()})
        if reads:
            params = self._read(self.sites[place[0]], layers[0], params, wanted)
        if not grad:
            call.gathered[key] = params
        return params

    def _read(self, site: Site, layer: Layer, params: Params, dtype: torch.dtype) -> Params:
        like = next(iter(vars(params).values()))
        weight, bias = read_linear(self.linears[site.key], site)
        with torch.autocast(like.device.type, enabled=False):  # it would round what is summed up here
            made = layer.read(params, weight.to(like), None if bias is None else bias.to(like))
        return Params({name: tensor.to(dtype) for name, tensor in vars(made).items()})

    def _stack(self, place: Place, like: Layer) -> Stack:
        kind = like.kind()
        key = (place, kind)
        stack = self.stacks.get(key)
        if stack is None:
            with _building:
                stack = self.stacks.get(key)
                if stack is None:
                    stack = self._build(place, kind)
                    self.stacks[key] = stack
        return stack

    def _build(self, place: Place, kind: tuple[Any, ...]) -> Stack:
        same = [
            (delta, layer) for delta, found in self.places[place].items() for layer in found if layer.kind() == kind
        ]
        stack = Stack([layer for _, layer in same])
        name = next(iter(stack.tensors), "")  # all tied: nothing is viewed
        for delta, layer in same if name else ():
            self.watched.setdefault(delta, (layer._parameters, name, layer.get_parameter(name).data_ptr()))
        return stack

    def execute(self, call: Call, site: Site, port: str, x: Tensor | None, h: Tensor) -> Tensor:
        """Run all layers of the call at one place and return the new tensor.

        x [rows, ..., d_in] the entry of the span, h [rows, ..., d_out] the tensor that changes; dimension 0 must be the
        call's rows, or those rows expanded, or their parts. RoutingError otherwise.
        """
        place = (site.key, port)
        rounds = call.plan.rounds(place)
        if not rounds:
            return h
        x = x[..., None] if x is not None and site.words else x  # an id stands where others have a vector
        part = site.view.take(h) if site.view is not None and port == "output" else h
        if call.packed is not None:
            shape, part = part.shape, call.packed.flat(part, site.key)
            x = call.packed.flat(x, site.key) if x is not None else None
            for runs in rounds:
                part = self._round(call, place, runs, 1, x, part)
            part = part.reshape(shape)
            return site.view.put(h, part) if site.view is not None and port == "output" else part
        if site.rows == "none" and h.shape[0] != call.rows and h.shape[0] != call.rows * call.expand:
            return self._on_table(call, place, rounds, site, x, h)
        if site.rows == "parts":
            part = part.unflatten(0, (call.rows, -1))
            x = x.unflatten(0, (call.rows, -1)) if x is not None else None
        times = call.expansion(part.shape[0], site.key)
        order = call.permutation(times, h.device)
        if order is not None:
            part = part[order[0]]
            x = x[order[0]] if x is not None else None
        for runs in rounds:
            part = self._round(call, place, runs, times, x, part)
        if order is not None:
            part = part[order[1]]
        part = part.flatten(0, 1) if site.rows == "parts" else part
        return site.view.put(h, part) if site.view is not None and port == "output" else part

    def _on_table(
        self, call: Call, place: Place, rounds: tuple[tuple[Run, ...], ...], site: Site, x: Tensor | None, h: Tensor
    ) -> Tensor:
        """Run the layers of the one delta of all rows on a table that all rows share."""
        if len(call.segments) > 1:
            names = ", ".join(str(segment.delta) for segment in call.segments)
            raise RoutingError(
                f"{site.key} also runs on a table of positions that all rows share, so all rows of a call need one "
                f"delta there; got {names}; run them one after the other, or choose other sites"
            )
        for (run,) in rounds:
            h = self._run(call, place, run, x, h)
        return h

    def _round(
        self, call: Call, place: Place, runs: tuple[Run, ...], times: int, x: Tensor | None, h: Tensor
    ) -> Tensor:
        if len(runs) == 1 and runs[0].start == 0 and call.start(runs[0].stop, times) == h.shape[0]:
            return self._run(call, place, runs[0], x, h)
        bounds = [0]
        for run in runs:
            start, stop = call.start(run.start, times), call.start(run.stop, times)
            bounds += [start, stop] if start > bounds[-1] else [stop]
        if bounds[-1] < h.shape[0]:
            bounds.append(h.shape[0])
        sizes = [stop - start for start, stop in pairwise(bounds)]
        # Not cut out one by one: the backward of a slice fills a tensor as large as the whole.
        pieces = list(h.split(sizes))
        reads = x is not None and any(run.layers[0].reads_input for run in runs)
        rows: Sequence[Tensor | None] = x.split(sizes) if x is not None and reads else [None] * len(sizes)
        where = {start: i for i, start in enumerate(bounds)}
        for run in runs:
            i = where[call.start(run.start, times)]
            pieces[i] = self._run(call, place, run, rows[i], pieces[i])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _run(self, call: Call, place: Place, run: Run, x: Tensor | None, h: Tensor) -> Tensor:
        layer, k = run.layers[0], len(run.layers)
        params = self.params(call, place, run, h.dtype)
        if x is not None and layer.reads_input:
            x = x.to(h.device) if layer.reads_ids else x.to(h)  # a span's entry may be on another device
            if layer.dropout and call.training:
                x = dropped(call, run, place, layer.dropout, x)
        grid = call.packed.parts(run.start, run.stop, k) if call.packed is not None and k > 1 else None
        if grid is not None:  # deltas with different numbers of tokens
            wide = grid.spread(x).unflatten(0, (k, -1)) if x is not None and layer.reads_input else None
            return grid.collect(layer(params, wide, grid.spread(h).unflatten(0, (k, -1))).flatten(0, 1)).to(h.dtype)
        if x is not None and layer.reads_input:
            x = x.reshape(k, -1, x.shape[-1]) if layer.positionwise else x
        before = h.reshape(k, -1, h.shape[-1]) if layer.positionwise else h
        x = x if layer.reads_input else None
        if isinstance(layer, SpanningLayer):
            after = spanned(call, run.deltas[0], layer, params, x, before)
        elif isinstance(layer, ExpertLayer):
            expert = call.gathered["experts"][run.start : run.stop]
            after = layer.pairs(params, x, before, expert.reshape(k, -1))
        elif isinstance(layer, DeepTokenLayer):
            after = renew(call, run, layer.tokens(params)[0], place[0], before)
        else:
            after = layer(params, x, before)
        after = after.reshape(h.shape).to(h.dtype)
        if run.scale == 1.0:
            return after
        if not layer.scalable:
            raise RoutingError(f"{type(layer).__name__} cannot act with weight {run.scale}; it takes 0 or 1")
        return h + run.scale * (after - h)


def spanned(call: Call, delta: str, layer: SpanningLayer, params: Params, x: Tensor | None, h: Tensor) -> Tensor:
    """Run a spanning layer with what its delta wrote at other sites in this call. RoutingError if that is not there."""
    values: dict[str, Tensor] = call.gathered.setdefault(("span", delta), {})
    lacking = [name for name in layer.reads if name not in values]
    if lacking:
        raise RoutingError(
            f"{type(layer).__name__} of {delta!r} reads {lacking[0]!r} before any of its sites wrote it; "
            f"written so far: {', '.join(values) or 'nothing'}"
        )
    after, written = layer.span(params, x, h, {name: values[name] for name in layer.reads})
    values.update({name: written[name] for name in layer.writes})
    return after


def dropped(call: Call, run: Run, place: Place, rate: float, x: Tensor) -> Tensor:
    """Apply dropout to x [rows, ..., width].

    With draws, the mask is drawn from (seed, step, place): neither the neighbours nor the padding change it.
    """
    if call.draws is None:
        return nn.functional.dropout(x, rate)
    draw, segment = call.draws[run.segments[0]], call.segments[run.segments[0]]
    assert segment.delta is not None
    number = [id(layer) for layer in call.bank.layers_at(place)[segment.delta]].index(id(run.layers[0]))
    rows, width = x.shape[0], x.shape[-1]
    length = x.numel() // (rows * width)
    at_end, absent = _absent(call, run.segments[0], place, length)
    # Positions come first, so that padding at the end of a row draws after them and moves nothing.
    random = torch.rand((length - absent, rows, width), generator=generator(draw.seed, draw.step, *place, number))
    keep = (random >= rate).transpose(0, 1)
    if absent:
        at = length - absent if at_end else 0
        keep = torch.cat([keep[:, :at], keep.new_zeros(rows, absent, width), keep[:, at:]], dim=1)
    return x * (keep.reshape(x.shape) / (1 - rate)).to(x)


def _absent(call: Call, segment: int, place: Place, length: int) -> tuple[bool, int]:
    """How many of `length` positions in a row are there for its neighbours' prompts only, and whether at the end."""
    held: Reserved | None = call.gathered.get("inserted")
    site = call.bank.sites[place[0]]
    if held is None or (site.stack == "decoder" and call.bank.two_stacks and site.name not in ("cross.k", "cross.v")):
        return False, 0
    parts = length // held.length  # a token stands once for each of its experts
    return held.to_end, (held.where.number - held.tokens.own[segment]) * parts
