"""Adapted: a backbone and a bank of deltas as one ordinary module, for any training loop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.backbone.html import grid
from deltatune.backbone.load import Backbone, load
from deltatune.backbone.words import body_of, without_logits
from deltatune.delta.attach import Attachment, check_fits, new_weights, refuse_compiled
from deltatune.delta.bank import Bank
from deltatune.delta.call import Call, Draw, Segment, entered, outside, segments_of, swapped, within
from deltatune.delta.delta import Delta
from deltatune.delta.inserted import Inserted
from deltatune.delta.loops import Headless, InLoops, spelled_out
from deltatune.delta.method import Spec
from deltatune.delta.packing import Packed, offset_of, pack, unpack
from deltatune.delta.patches import InsertedPatches
from deltatune.delta.tokens import rewrite
from deltatune.errors import RoutingError, UnknownName

Route = str | Delta | None | Sequence["str | Delta | None"]
_UNSET: Any = object()
# What `using` says, for each Adapted by its id: a block of one says nothing about another.
_using: ContextVar[Mapping[int, Any]] = ContextVar("deltatune_using", default=MappingProxyType({}))


class Adapted(InLoops):
    """A backbone with deltas attached.

    `backbone` is the network itself; its weights, names and code stay as they are and `remove` gives it back exactly.
    `bank` holds the deltas, and `state_dict` is the bank's alone. What is asked of an `Adapted` and is not its own is
    asked of the backbone (`config`, `dtype`, ...).
    """

    def __init__(self, source: Backbone, deltas: Sequence[Delta], *, verify: bool = True) -> None:
        super().__init__()
        bound = [check_fits(delta, source, verify=verify) for delta in deltas]
        self.source = source
        self.backbone = source.module
        self.bank = Bank(deltas, bound)
        self.attachment = Attachment(self.bank, source)
        self.batched = True
        # The backbone's own flags stay: parts of it may be in another mode.
        self.training = source.module.training
        self.bank.train(self.training)

    # Joining and leaving

    def join(self, delta: Delta, *, verify: bool = True) -> None:
        """Attach one more delta, also in the middle of a training.

        The others keep their parameters, so optimisers, routes and results stay as they are. RoutingError if the name
        is taken or the deltas were removed, BackboneMismatch or SiteError if it does not fit; then nothing has changed.
        """
        self._hold([*self._held(), delta], verify)

    def leave(self, name: str) -> Delta:
        """Take one delta off, also in the middle of a training, and return it. UnknownName if it is not there."""
        found = self.bank[name]
        self._hold([delta for delta in self._held() if delta is not found], False)
        return found

    def _held(self) -> list[Delta]:
        return [self.bank[name] for name in self.bank.names]

    def _hold(self, deltas: Sequence[Delta], verify: bool) -> None:
        if not self.attachment.live:
            raise RoutingError("the deltas were removed from this backbone; adapt it again")
        bank = Bank(deltas, [check_fits(delta, self.source, verify=verify) for delta in deltas])
        bank.train(self.bank.training)
        attachment = Attachment(bank, self.source)
        self.bank.release()
        self.attachment.remove()
        self.bank, self.attachment = bank, attachment

    # Routing

    @outside
    def call(
        self,
        rows: int,
        route: Route = _UNSET,
        *,
        expand: int = 1,
        draws: tuple[Draw, ...] | None = None,
        scale: float = 1.0,
    ) -> Call:
        """Make the call of one forward of `rows` rows.

        `route` is one delta for all rows (a name, a Delta, None for the bare backbone) or one per row. Left out: what
        `using` says, or the only delta there is. RoutingError if that is unclear or the number of rows differs.
        """
        if route is _UNSET:
            route = _using.get().get(id(self), _UNSET)
        if route is _UNSET:
            if len(self.bank.names) != 1:
                raise RoutingError(
                    f"{len(self.bank.names)} deltas are attached ({', '.join(self.bank.names)}): say which one acts, "
                    f"with deltas=... or `with adapted.using(...)`"
                )
            route = self.bank.names[0]
        if isinstance(route, (str, Delta)) or route is None:
            names = [self._name(route)] * rows
        else:
            names = [self._name(one) for one in route]
            if len(names) != rows:
                raise RoutingError(f"deltas names {len(names)} rows, the batch has {rows}")
        segments, order = segments_of(names)
        if scale != 1.0:
            segments = tuple(Segment(s.delta, s.rows, scale) for s in segments)
        moved = torch.tensor(order, device=self.source.device) if order else None
        return self.routed(segments, order=moved, expand=expand, draws=draws)

    def routed(
        self,
        segments: tuple[Segment, ...],
        *,
        order: Tensor | None = None,
        expand: int = 1,
        draws: tuple[Draw, ...] | None = None,
    ) -> Call:
        """Make the call of rows that stand in segments already."""
        plan = self.bank.plan(segments, self.batched)
        return Call(self.bank, plan, segments, order, expand, self.bank.training, draws)

    def _name(self, delta: str | Delta | None) -> str | None:
        name = delta.name if isinstance(delta, Delta) else delta
        if name is not None and name not in self.bank.names:
            raise UnknownName("delta", name, self.bank.names, "None is the bare backbone")
        return name

    @contextmanager
    def using(self, route: Route) -> Iterator[Adapted]:
        """Let `route` act in this block, in this thread."""
        token = _using.set({**_using.get(), id(self): route})
        try:
            yield self
        finally:
            _using.reset(token)

    # Running

    @within
    def forward(self, *args: Any, deltas: Route = _UNSET, **kwargs: Any) -> Any:
        """Run the backbone with deltas: its own arguments, and `deltas` (one, or one per row).

        RoutingError if rows and deltas do not fit.
        """
        return self._run(self.backbone, args, kwargs, deltas)

    def encode(self, inputs: dict[str, Tensor], *, deltas: Route = _UNSET, call: Call | None = None) -> Tensor:
        """Return the last hidden states [rows, tokens, width] of the trunk (the encoder of an encoder-decoder).

        `call` is a call that was made before; `deltas` makes one. Where many tokens are padding and the backbone allows
        it, they are left out of the computation and come back as zeros.
        """
        call = self.call(_rows(inputs), deltas) if call is None else self._checked(call, inputs)
        made = pack(self.source, self._bare, inputs, call.order) if call.plan.packs(call.training) else None
        if made is None:
            hidden: Tensor = self._run(self.source.trunk, (), inputs, _UNSET, call).last_hidden_state
            return hidden
        packed, short, places = made
        call = dataclasses.replace(call, order=None, packed=packed)
        hidden = self._run(self.source.trunk, (), short, _UNSET, call).last_hidden_state
        return unpack(hidden, places, *inputs["input_ids"].shape)

    def decode(self, inputs: dict[str, Tensor], *, deltas: Route = _UNSET, call: Call | None = None) -> Tensor:
        """Return the last hidden states [rows, target tokens, width] of an encoder-decoder's decoder, and no logits.

        `call` is a call that was made before; `deltas` makes one. `Backbone.logits` makes logits of what is returned.
        """
        call = self.call(_rows(inputs), deltas) if call is None else call
        body = body_of(self.backbone)
        if body is None:
            logits: Tensor = self.run(call, **inputs).logits
            return logits
        network, kept = without_logits(self.backbone, body)
        self._run(network, (), inputs, _UNSET, call)
        assert kept.states is not None
        return kept.states

    def weights_of(self, call: Call) -> AbstractContextManager[None]:
        """Let the backbone have the weights of a call that has run, for what is computed from its hidden states."""
        return swapped(call.swaps)

    @property
    def packs(self) -> bool:
        """Whether the backbone gives the same for a batch without its padding."""
        return offset_of(self.source, self._bare) is not None

    def _bare(self, packed: Packed | None, inputs: dict[str, Tensor]) -> Tensor:
        rows = len(inputs["input_ids"]) if packed is None else len(packed.starts) - 1
        call = dataclasses.replace(self.routed((Segment(None, rows),)), packed=packed)
        hidden: Tensor = self._run(self.source.trunk, (), inputs, _UNSET, call).last_hidden_state
        return hidden

    @within
    def _run(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        route: Route = _UNSET,
        call: Call | None = None,
    ) -> Any:
        if not self.attachment.live:
            raise RoutingError("the deltas were removed from this backbone; adapt it again")
        if args and isinstance(args[0], Tensor):
            name = self._main_input
            if name is not None:
                kwargs, args = {name: args[0], **kwargs}, args[1:]
        # A plain network may take its input by position alone.
        inputs = {**dict(zip(map(str, range(len(args))), args, strict=True)), **kwargs}
        call = self.call(_rows(inputs), route) if call is None else self._checked(call, inputs)
        inserted: Inserted | InsertedPatches | None = None
        with entered(call), self._weights(call):
            if self.bank.has_tokens:
                kwargs = dict(kwargs)
                inserted = rewrite(call, self.source, kwargs)
            if self.backbone.training and getattr(self.backbone, "is_activation_checkpointing", False):
                self._recall()
            output = module(*args, **kwargs)
        if inserted:
            inserted.strip(
                output, encoder_of_two=self.source.kind == "encoder-decoder" and module is not self.source.trunk
            )
        return output

    @outside
    def _checked(self, call: Call, kwargs: dict[str, Any]) -> Call:
        """A call that was made before: for this bank, for so many rows, and with nothing left from an earlier run."""
        if call.bank is not self.bank:
            raise RoutingError("this call was made by another Adapted; make it with this one's `call`")
        if call.packed is None and (rows := _rows(kwargs)) != call.rows:
            raise RoutingError(f"the call routes {call.rows} rows, the batch has {rows}")
        call.gathered.clear()
        call.begun.clear()
        return call

    def run(self, call: Call, **kwargs: Any) -> Any:
        """Run the backbone under a call that was made before."""
        return self._run(self.backbone, (), kwargs, _UNSET, call)

    def generate(self, inputs: Tensor | None = None, *, deltas: Route = _UNSET, **kwargs: Any) -> Any:
        """Generate as the backbone does, with `deltas` (one, or one per row); beams and returned sequences included.

        `inputs` is what the backbone reads first (token ids, or features of sound), which may be given by name, too.
        """
        if not self.attachment.live:
            raise RoutingError("the deltas were removed from this backbone; adapt it again")
        config = kwargs.get("generation_config") or self.backbone.generation_config
        many = [kwargs.get(name) or getattr(config, name, 1) or 1 for name in ("num_beams", "num_return_sequences")]
        given = dict(kwargs) if inputs is None else {str(self._main_input): inputs, **kwargs}
        input_ids = given.get("input_ids")
        call = self.call(_rows(given), deltas, expand=math.prod(many))
        with entered(call), self._weights(call):
            if (
                self.bank.has_tokens
                and rewrite(call, self.source, given, generating=True)
                and self.source.kind == "decoder"
            ):
                given["input_ids"] = input_ids  # what the tokens stand for: returned, and seen by penalties
                for name in ("max_length", "min_length"):
                    length = kwargs.get(name, getattr(config, name, None))
                    if length is not None:  # transformers takes the embedded positions off again
                        given[name] = length + given["inputs_embeds"].shape[1]
            return self.backbone.generate(**given)  # type: ignore[operator]

    @property
    def _main_input(self) -> str | None:
        """Name of what the backbone reads first; None for a plain network, whose inputs keep their places."""
        return getattr(self.backbone, "main_input_name", None if self.source.kind == "plain" else "input_ids")

    @contextmanager
    def _weights(self, call: Call) -> Iterator[None]:
        rounds = call.plan.rounds((self.bank.weights_key, "weight")) if self.bank.weights_key else ()
        if not rounds:
            yield
            return
        run = rounds[0][0]
        if len(call.segments) > 1 or len(rounds) > 1 or run.scale != 1.0:
            raise RoutingError(
                f"{run.deltas[0]!r} changes the weights themselves, so all rows of a call must be its own, and no "
                f"other delta of weights may act with it"
            )
        params = self.bank.params(
            call, (self.bank.weights_key, "weight"), run, torch.promote_types(self.source.dtype, torch.float32)
        )
        call.swaps[:] = new_weights(self.source, run.layers[0], params)
        with swapped(call.swaps):
            yield

    @property
    def base_model(self) -> Headless:
        """The backbone without its head, under the deltas; TRL's trainers run it in place of `forward`."""
        return Headless(self.backbone.base_model, self._run)

    def remove(self) -> nn.Module:
        """Take the deltas off and return the backbone exactly as it was before."""
        self.attachment.remove()
        return self.backbone

    def _repr_html_(self) -> str:
        held = [(delta.name, delta.spec, f"{delta.trainable():,}") for delta in self._held()]
        return f"{self.source._repr_html_()}{grid(['attached', 'delta', 'parameters'], held)}"

    def __enter__(self) -> Adapted:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


Adapted.forward.__signature__ = spelled_out(Adapted.forward)  # type: ignore[attr-defined]


def adapt(
    source: Backbone | nn.Module | str,
    *deltas: Spec | Delta,
    seed: int = 0,
    verify: bool = True,
) -> Adapted:
    """Attach deltas to a backbone: fresh ones from methods, or saved ones.

    The backbone is frozen until `remove`. BackboneMismatch if a delta was trained on other weights (`verify=False` goes
    on), SiteError if a selection does not fit.
    """
    if isinstance(source, Adapted):
        raise RoutingError("this is adapted already: give all deltas to one `adapt`, or adapt its `.source` once more")
    backbone = load(source)
    refuse_compiled(backbone.module)  # before its sites are looked for: a compiled block hides them
    made = [d if isinstance(d, Delta) else Delta.build(d, backbone, seed=seed) for d in deltas]
    return Adapted(backbone, made, verify=verify)


def _rows(kwargs: dict[str, Any]) -> int:
    for name in ("input_ids", "inputs_embeds", "pixel_values", "input_features", "decoder_input_ids", "attention_mask"):
        value = kwargs.get(name)
        if isinstance(value, Tensor):
            return int(value.shape[0])
    tensors = [v for v in kwargs.values() if isinstance(v, Tensor)]
    if not tensors:
        raise RoutingError("no tensor among the inputs: the number of rows is unknown")
    return int(tensors[0].shape[0])
