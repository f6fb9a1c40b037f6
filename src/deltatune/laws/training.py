"""Laws about recomputation: a checkpointed block runs again under the call of its forward."""

from __future__ import annotations

from torch import Tensor

from deltatune.delta.adapted import Adapted
from deltatune.errors import RoutingError
from deltatune.laws.subject import Subject, agree_gradients, demand, gradients, made, score


def checkpointing_recalls(subject: Subject) -> None:
    """Gradients with checkpointing equal those without, also with the backward after a call with another delta."""
    if not getattr(subject.backbone.module, "supports_gradient_checkpointing", False):
        return
    rows = subject.rows(3)

    def after(checkpoint: bool) -> dict[str, Tensor | None]:
        backbone = subject.fresh()
        deltas = [made(subject.spec, backbone, name, seed=seed) for seed, name in enumerate(("one", "two"))]
        adapted = Adapted(backbone, deltas)
        adapted.train()
        if checkpoint:
            adapted.gradient_checkpointing_enable()
        with adapted.using("one"):
            outputs = subject.cut(adapted(**subject.batch(rows)), rows)
        with adapted.using("two"):
            others = subject.cut(adapted(**subject.batch(rows)), rows)
        if outputs[0].requires_grad:
            score(outputs, rows).backward()
            (2 * score(others, rows)).backward()
        return gradients(adapted.bank)

    agree_gradients(after(True), after(False), "with checkpointing")


def reentrant_is_refused(subject: Subject) -> None:
    """The reentrant mode, which would lose the delta's gradients in silence, is refused however it is switched on."""
    if not getattr(subject.backbone.module, "supports_gradient_checkpointing", False):
        return
    rows = subject.rows(2)
    for directly in (False, True):
        backbone = subject.fresh()
        adapted = Adapted(backbone, [made(subject.spec, backbone)])
        adapted.train()
        # `activation_checkpointing_enable` is the newer name of the backbone's own switch.
        newer = getattr(backbone.module, "activation_checkpointing_enable", None)
        enable = newer if directly and newer is not None else adapted.gradient_checkpointing_enable
        try:
            enable({"use_reentrant": True})
            subject.run(adapted, rows, "subject")
        except RoutingError:
            continue
        demand(False, f"reentrant checkpointing was taken{' when set on the backbone itself' if directly else ''}")
