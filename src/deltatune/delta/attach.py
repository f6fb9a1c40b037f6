"""Attachment: the hooks of a bank on a backbone, and what is needed to give the backbone back exactly.

Several banks may be attached to one backbone and come off in any order. What they share (frozen flags, the functions of
attention and experts) is kept in one ledger on the backbone, which goes away with the last of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltatune.backbone.fingerprint import compare
from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Site, rank
from deltatune.backbone.weights import linear_at
from deltatune.delta import attention, experts
from deltatune.delta.bank import Bank
from deltatune.delta.call import Swap, current, outside
from deltatune.delta.delta import Delta
from deltatune.delta.inserted import check_takes_tokens
from deltatune.delta.layer import ExpertLayer, Layer, Params, WeightLayer
from deltatune.delta.patches import Patches
from deltatune.delta.quantised import GradientHook, let_gradients_pass, refuse_unwritable
from deltatune.delta.tokens import own_positions
from deltatune.errors import BackboneMismatch, RoutingError, SiteError, nearest

LEDGER = "_deltatune_ledger"
ENTRY = "hidden_states"
# What training mode and checkpointing write on a module.
SWITCHES = (
    "training", "gradient_checkpointing", "_gradient_checkpointing_func", "_require_grads_hook", "_require_grads_hooks"
)  # fmt: skip


class SiteHook:
    """Acts on one module during a call of its own bank; otherwise the module runs as if nothing were there."""

    def __init__(self, bank: Bank, opens: list[Site], inputs: list[Site], exits: list[Site]) -> None:
        self.bank, self.opens, self.inputs, self.exits = bank, opens, inputs, exits

    @outside
    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Keep the inputs of the spans that open here, and run the layers of input ports."""
        call = current()
        if call is None or call.bank is not self.bank:
            return None
        for site in self.opens:
            if call.runs(site):
                call.spans[site.key] = _entry(args, kwargs)
        if not self.inputs:
            return None
        h = _entry(args, kwargs)
        for site in self.inputs:
            if call.runs(site):
                h = self.bank.execute(call, site, "input", None, h)
        return ((h, *args[1:]), kwargs) if args else (args, {**kwargs, ENTRY: h})

    @outside
    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Run the layers of the spans that close here, inner before outer."""
        call = current()
        if call is None or call.bank is not self.bank:
            return None
        h = output if isinstance(output, Tensor) else output[0]
        for site in self.exits:
            if not call.runs(site):
                continue
            x = _entry(args, kwargs) if site.entry == site.exit else call.spans.pop(site.key, None)
            h = self.bank.execute(call, site, "output", x, h)
        return h if isinstance(output, Tensor) else (h, *output[1:])


class ShiftHook:
    """Moves the text's positions on, for the rows of deltas that ask for it, wherever the trunk is called."""

    def __init__(self, bank: Bank, source: Backbone) -> None:
        self.bank, self.source = bank, source
        deltas = [bank[name] for name in bank.names]
        self.shifts = {delta.name: max((layer.shift for _, layer in delta.at_sites()), default=0) for delta in deltas}

    @outside
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give the trunk the positions that it would use, moved on."""
        call = current()
        if call is None or call.bank is not self.bank:
            return None
        own = [self.shifts[s.delta] if s.delta is not None and s.scale else 0 for s in call.segments]
        if not any(own):
            return None
        ids = args[0] if args else kwargs.get("input_ids")
        like = ids if ids is not None else kwargs["inputs_embeds"]
        times = call.expansion(like.shape[0], "the positions")
        moved = torch.tensor(own, device=like.device).repeat_interleave(
            torch.tensor([s.rows * times for s in call.segments], device=like.device)
        )
        order = call.permutation(times, like.device)
        cache = kwargs.get("past_key_values")
        start = cache.get_seq_length() if cache is not None else 0
        limit = self.source.positions
        if limit is not None and start + like.shape[1] + max(own) > limit:
            raise RoutingError(
                f"{start + like.shape[1]} tokens after a prefix of {max(own)} exceed the {limit} positions of "
                f"{self.source.name}"
            )
        positions = own_positions(self.source, ids, like, kwargs.get("position_ids"), start)
        kwargs["position_ids"] = positions + (moved[order[1]] if order else moved)[:, None]
        return args, kwargs


class RunCounter:
    """Counts, in the call, how often a block that serves as several has begun."""

    def __init__(self, bank: Bank, site: Site) -> None:
        self.bank, self.site = bank, site

    @outside
    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Say that the block begins once more."""
        call = current()
        if call is not None and call.bank is self.bank:
            call.begun[self.site.exit] = call.begun.get(self.site.exit, 0) + 1


HOOKS = (SiteHook, RunCounter, ShiftHook, GradientHook, Patches)


def _entry(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The tensor that a module works on: its first argument, or the one that blocks name so."""
    return args[0] if args else kwargs.get(ENTRY)


class Attachment:
    """The hooks of one bank. `live` until removed."""

    def __init__(self, bank: Bank, source: Backbone) -> None:
        self.bank, self.module, self.live = bank, source.module, True
        refuse_compiled(source.module)
        bank.two_stacks = source.kind == "encoder-decoder"
        ports: dict[str, tuple[list[Site], list[Site], list[Site]]] = {}
        for key, port in sorted(bank.places, key=lambda place: rank(bank.sites[place[0]])):
            site = bank.sites[key]
            if any(layer.needs == "weight-read" for own in bank.places[key, port].values() for layer in own):
                bank.linears[key] = linear_at(source.module, site)
            if site.experts:
                module = source.module.get_submodule(site.exit)
                experts.check_reachable(module, site)
                bank.expert_sites.setdefault(module, {})[site.name] = site
            elif port == "kv":
                assert site.heads is not None
                module = source.module.get_submodule(site.heads.module)
                bank.attention_sites[module] = (*bank.attention_sites.get(module, ()), site)
            elif port == "tokens":
                bank.has_tokens = True
                if not source.takes_embeddings:
                    patches = Patches(bank)
                    last = [s for s in source.anatomy.sites if s.name == "block"][-1]
                    source.module.get_submodule(site.exit).register_forward_hook(patches.enter)
                    source.module.get_submodule(last.exit).register_forward_hook(patches.leave)
            elif port == "weight":
                bank.weights_key = key
            elif port == "input":
                ports.setdefault(site.entry, ([], [], []))[1].append(site)
            else:
                ports.setdefault(site.exit, ([], [], []))[2].append(site)
                if site.entry != site.exit:
                    ports.setdefault(site.entry, ([], [], []))[0].append(site)
        # Code that does not ask transformers for its attention may ask for its name.
        enter_ledger(source.module, any(site.heads is not None for site in source.anatomy.sites))
        let_gradients_pass(source.module, bank)
        for path, site in _shared_blocks(bank, source).items():  # first, so that all hooks of the block see its number
            source.module.get_submodule(path).register_forward_pre_hook(RunCounter(bank, site).before)
        for path, (opens, inputs, exits) in ports.items():
            module = source.module.get_submodule(path)
            hook = SiteHook(bank, opens, inputs, exits)
            if opens or inputs:
                module.register_forward_pre_hook(hook.before, with_kwargs=True)
            if exits:
                module.register_forward_hook(hook.after, with_kwargs=True)
        shift = ShiftHook(bank, source)
        if any(shift.shifts.values()):
            source.trunk.register_forward_pre_hook(shift.before, with_kwargs=True)
        # A compiled graph does not look whether hooks were added since, and would leave these out in silence.
        torch.compiler.reset()

    def remove(self) -> None:
        """Take this bank's hooks off; the last one to go restores flags and the attention function."""
        if not self.live:
            return
        self.live = False
        for module in self.module.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for number, hook in list(hooks.items()):
                    owner = getattr(hook, "__self__", None)
                    if isinstance(owner, HOOKS) and owner.bank is self.bank:
                        del hooks[number]
                        module._forward_pre_hooks_with_kwargs.pop(number, None)
                        module._forward_hooks_with_kwargs.pop(number, None)
        leave_ledger(self.module)


def _shared_blocks(bank: Bank, source: Backbone) -> dict[str, Site]:
    """Map the path of each block that serves as several, and at which the bank acts, to one of its sites."""
    found: dict[str, Site] = {}
    for site in bank.sites.values():
        if site.calls > 1:
            block = source.anatomy.by_key[f"{site.stack}.{site.block}.block"]
            bank.shared[site.key] = block.exit
            found[block.exit] = block
    return found


def enter_ledger(module: nn.Module, attends: bool) -> None:
    """Freeze the backbone and put our attention in front of its own, once for all banks on it."""
    ledger = module.__dict__.get(LEDGER)
    if ledger is None:
        configs = _configs(module)
        ledger = {
            "banks": 0,
            "requires_grad": {name: p.requires_grad for name, p in module.named_parameters()},
            "switches": {part: _switches(part) for part in module.modules()},
            "attention": {path: config._attn_implementation for path, config in configs.items()},
            "experts": {path: getattr(config, "_experts_implementation", None) for path, config in configs.items()},
        }
        for config in configs.values():
            if attends and config._attn_implementation in ("sdpa", "eager"):
                config._attn_implementation_internal = attention.registered(config._attn_implementation)
            own = getattr(config, "_experts_implementation", None)
            if own in experts.KNOWN:
                config._experts_implementation_internal = experts.registered(own)
        module.__dict__[LEDGER] = ledger
        module.requires_grad_(False)
    ledger["banks"] += 1


def leave_ledger(module: nn.Module) -> None:
    """Undo `enter_ledger` when the last bank goes."""
    ledger = module.__dict__[LEDGER]
    ledger["banks"] -= 1
    if ledger["banks"]:
        return
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(ledger["requires_grad"][name])
    for path, config in _configs(module).items():
        config._attn_implementation_internal = ledger["attention"][path]
        config._experts_implementation_internal = ledger["experts"][path]
    for part, switches in ledger["switches"].items():
        # Checkpointing puts hooks on the embeddings that make their output ask for gradients.
        for hook in part.__dict__.get("_require_grads_hooks", []):
            if hook not in switches.get("_require_grads_hooks", []):
                hook.remove()
        for name in SWITCHES:
            if name in switches:
                part.__dict__[name] = switches[name]
            else:
                part.__dict__.pop(name, None)
    del module.__dict__[LEDGER]


def _switches(part: nn.Module) -> dict[str, Any]:
    return {name: part.__dict__[name] for name in SWITCHES if name in part.__dict__}


def _configs(module: nn.Module) -> dict[str, Any]:
    """Return path -> config of every distinct config object that names an attention implementation."""
    found: dict[int, tuple[str, Any]] = {}
    for path, part in module.named_modules():
        config = part.__dict__.get("config")
        if hasattr(config, "_attn_implementation_internal"):
            found.setdefault(id(config), (path, config))
    return dict(found.values())


def refuse_compiled(module: nn.Module) -> None:
    """RoutingError for a network that is compiled, or has a part that is."""
    if any(type(part).__name__ == "OptimizedModule" or part._compiled_call_impl for part in module.modules()):
        raise RoutingError(
            "this backbone is compiled, and hooks added now would be ignored: adapt it first, then compile"
        )


def check_fits(delta: Delta, source: Backbone, *, verify: bool = True) -> dict[str, Site]:
    """Find a delta's sites on a backbone: address -> site.

    BackboneMismatch if the weights are others than those it was trained on or its sites have other widths (the latter
    whatever `verify` says).
    """
    if verify and delta.fingerprint:
        verdict = compare(delta.fingerprint, source.fingerprint())
        if verdict == "different":
            raise BackboneMismatch(
                f"delta {delta.name!r} was trained on other weights than {source.name!r} has (it names "
                f"{delta.backbone_name!r}); load that backbone, or pass verify=False to go on at your own risk"
            )
        if verdict == "same up to dtype":
            import warnings

            warnings.warn(
                f"delta {delta.name!r} was trained on the same backbone in {delta.fingerprint['dtype']}", stacklevel=4
            )
    bound: dict[str, Site] = {}
    for address, site in delta.sites.items():
        here = source.anatomy.by_key.get(site.key)
        if here is None:
            raise BackboneMismatch(
                f"delta {delta.name!r} needs site {site.key!r}, which {source.name!r} lacks"
                f"{nearest(site.key, source.anatomy.by_key)}"
            )
        if (here.d_in, here.d_out, here.shapes) != (site.d_in, site.d_out, site.shapes):
            raise BackboneMismatch(
                f"delta {delta.name!r} needs {site.key!r} of widths {site.d_in}->{site.d_out}, "
                f"{source.name!r} has {here.d_in}->{here.d_out}"
            )
        layer = delta.layers[address]
        if isinstance(layer, Layer) and layer.reads_ids and here.words != site.words:
            raise BackboneMismatch(
                f"delta {delta.name!r} needs a table of {site.words} tokens, {source.name!r} has one of {here.words}"
            )
        if isinstance(layer, ExpertLayer) and here.experts != site.experts:
            raise BackboneMismatch(
                f"delta {delta.name!r} needs {site.key!r} with {site.experts} experts, {source.name!r} has "
                f"{here.experts}"
            )
        if isinstance(layer, Layer) and layer.needs == "weight-write":
            refuse_unwritable(delta.name, source)
        if isinstance(layer, Layer) and layer.port == "kv" and here.heads is None:
            raise SiteError(f"{source.name!r} computes attention at {site.key!r} in a way that takes no prefix")
        if isinstance(layer, Layer) and layer.port == "tokens":
            check_takes_tokens(source)
        bound[address] = here
    return bound


def new_weights(source: Backbone, layer: Layer, params: Params) -> list[Swap]:
    """Return a weight layer's value of every parameter of the trunk, wherever it stands."""
    assert isinstance(layer, WeightLayer)
    replaced: dict[int, Tensor] = {}
    for key, path in source.anatomy.parameters.items():
        parameter = source.module.get_parameter(path)
        replaced[id(parameter)] = layer.weight(params, key, parameter)
    return [  # tied weights stand in several places
        (module, name, replaced[id(parameter)])
        for module in source.module.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in replaced
    ]
