"""Run all laws on one method."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deltatune.backbone.load import Backbone
from deltatune.delta.method import Method
from deltatune.laws import copies, effect, generation, removal, rows, training
from deltatune.laws.subject import Subject

Law = Callable[[Subject], None]

LAWS: dict[str, Law] = {
    law.__name__: law
    for law in (
        effect.identity_at_init,
        effect.only_the_delta_learns,
        effect.mode_and_mask_change_nothing,
        effect.count_is_real,
        effect.stands_or_refuses,
        effect.scales_as_declared,
        effect.weighs_as_declared,
        effect.merges_as_declared,
        copies.saved_is_loaded,
        copies.copies_are_independent,
        copies.pickles_are_independent,
        copies.other_backbones_are_refused,
        rows.many_is_alone,
        rows.padding_left_out_changes_nothing,
        rows.trained_together_is_trained_alone,
        rows.order_does_not_matter,
        rows.batched_is_loop,
        rows.absent_rests,
        rows.nan_stays_at_home,
        rows.threads_do_not_meet,
        removal.removal_restores,
        removal.removal_restores_after,
        training.checkpointing_recalls,
        training.reentrant_is_refused,
        generation.generates_as_alone,
        generation.cached_is_recomputed,
    )
}


@dataclass(frozen=True)
class LawResult:
    """How one law went for one method on one backbone; `fault` is empty if it holds."""

    law: str
    method: str
    backbone: str
    fault: str
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether the law holds."""
        return not self.fault


def check_method(cls: type[Method], backbones: Sequence[Backbone]) -> list[LawResult]:
    """Run all laws on a method with its default fields, on each backbone.

    A law that raises, whatever it raises, is broken; nothing is raised from here. The backbones stay as they are.
    """
    return [_held(law, cls, backbone) for backbone in backbones for law in LAWS.values()]


def _held(law: Law, cls: type[Method], backbone: Backbone) -> LawResult:
    start, fault = time.perf_counter(), ""
    try:
        law(Subject(cls(), backbone))
    except Exception as error:
        fault = f"{type(error).__name__}: {error}".splitlines()[0]
    return LawResult(law.__name__, cls.name(), backbone.name, fault, time.perf_counter() - start)
