"""Law of removal: the backbone comes back exactly, whatever happened in between."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from deltatune.delta.adapted import Adapted
from deltatune.laws.subject import Subject, demand, made, prefix, prompt, score

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
Snapshot = dict[str, Any]


def snapshot(module: nn.Module) -> Snapshot:
    """Everything about a network that an attachment could change, by place."""
    seen: Snapshot = {}
    for path, part in module.named_modules(remove_duplicate=False):
        seen[f"{path} is"] = (id(part), type(part))
        seen[f"{path} trains"] = part.training
        seen[f"{path} children"] = [(name, id(child)) for name, child in part._modules.items()]
        for name in HOOKS:
            seen[f"{path}.{name}"] = [(number, id(hook)) for number, hook in getattr(part, name).items()]
        for name, value in part.__dict__.items():
            seen[f"{path}.{name} identity"] = id(value)
            if isinstance(value, (bool, int, float, str, type(None))):
                seen[f"{path}.{name}"] = value
        seen[f"{path} attributes"] = sorted(part.__dict__)
        config = part.__dict__.get("config")
        if config is not None:
            seen[f"{path} config"] = {k: repr(v) for k, v in vars(config).items()}
        settings = part.__dict__.get("generation_config")
        if settings is not None:
            seen[f"{path} generation_config"] = {k: repr(v) for k, v in vars(settings).items()}
    for name, tensor in itertools.chain(
        module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    ):
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        seen[f"tensor {name}"] = hashlib.blake2b(values.tobytes()).hexdigest()
        seen[f"tensor {name} is"] = (id(tensor), tensor.data_ptr(), tensor.requires_grad, tensor.grad is None)
    return seen


def compare(before: Snapshot, after: Snapshot, when: str) -> None:
    """Demand that two snapshots agree."""
    differing = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    shown = "; ".join(f"{k}: {str(before.get(k))[:80]} -> {str(after.get(k))[:80]}" for k in differing[:3])
    demand(not differing, f"{when}: the backbone differs in {len(differing)} places: {shown}")


def removal_restores(subject: Subject) -> None:
    """After attaching up to three banks and removing them in any order, nothing of the backbone has changed."""
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0), (1, 0)):
        _in_order(subject, order)


def _in_order(subject: Subject, order: tuple[int, ...]) -> None:
    backbone = subject.fresh()
    _mixed_flags(backbone.module)
    rows = subject.rows(2)
    bare = backbone.module(**subject.batch(rows))
    before = snapshot(backbone.module)
    specs = [subject.spec, subject.spec, prompt(backbone, 2)]
    banks = [
        Adapted(backbone, [made(spec, backbone, "a"), made(prefix(backbone, 2), backbone, "b")])
        for spec in specs[: len(order)]
    ]
    for number in order:
        outputs = subject.run(banks[number], rows, "a")
        if outputs[0].requires_grad:
            score(outputs, rows).backward()
        banks[number].remove()
        banks[number].remove()  # a second time changes nothing
    compare(before, snapshot(backbone.module), f"removed in order {order}")
    again = backbone.module(**subject.batch(rows))
    demand(all(map(torch.equal, subject.cut(again, rows), subject.cut(bare, rows))), "the bare output changed")


def _mixed_flags(module: nn.Module) -> None:
    """Flags as a user may have set them: some parameters frozen, one part in training mode."""
    for number, parameter in enumerate(module.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    next(iter(module.children())).train()


class _Planted(Exception):
    """Raised inside a forward by the law below."""


def removal_restores_after(subject: Subject) -> None:
    """The same after training mode, an exception inside a forward, checkpointing, and generation."""
    rows = subject.rows(2)

    def fail(adapted: Adapted) -> None:
        def broken(*_: object) -> None:
            raise _Planted

        last = [site.exit for site in subject.backbone.anatomy.sites if site.name == "block"][-1]
        handle = adapted.backbone.get_submodule(last).register_forward_hook(broken)
        try:
            subject.run(adapted, rows, "a")
        except _Planted:
            pass
        else:
            demand(False, "the planted exception was swallowed")
        finally:
            handle.remove()

    def train(adapted: Adapted) -> None:
        adapted.train()
        subject.run(adapted, rows, "a")

    def checkpoint(adapted: Adapted) -> None:
        adapted.train()
        adapted.gradient_checkpointing_enable()
        outputs = subject.run(adapted, rows, "a")
        if outputs[0].requires_grad:
            score(outputs, rows).backward()

    def generate(adapted: Adapted) -> None:
        adapted.generate(**subject.prompted(subject.rows(2, length=4)), deltas="a", max_new_tokens=3)

    events: dict[str, Callable[[Adapted], None]] = {
        "an exception": fail,
        "training mode": train,
    }
    if getattr(subject.backbone.module, "supports_gradient_checkpointing", False):
        events["checkpointing"] = checkpoint
    if subject.backbone.kind != "encoder":
        events["generation"] = generate
    for when, event in events.items():
        backbone = subject.fresh()
        backbone.module(**subject.batch(rows))  # what the bare backbone keeps for itself at its first run is not ours
        if when == "generation":
            backbone.module.generate(**subject.prompted(rows), max_new_tokens=1)  # type: ignore[operator]
        _mixed_flags(backbone.module)
        before = snapshot(backbone.module)
        adapted = Adapted(backbone, [made(subject.spec, backbone, "a")])
        event(adapted)
        adapted.remove()
        compare(before, snapshot(backbone.module), f"removed after {when}")
