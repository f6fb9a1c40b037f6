"""Laws about many deltas in one batch: nobody notices who else is there."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.delta.adapted import Adapted
from deltatune.delta.delta import Delta
from deltatune.delta.method import Composition, Spec
from deltatune.laws.subject import (
    Row,
    Subject,
    agree,
    agree_gradients,
    agree_rows,
    alone_only,
    demand,
    gradients,
    made,
    prefix,
    prompt,
    same_bits,
    score,
)
from deltatune.methods.addition.adapter import Adapter
from deltatune.methods.reparameterization.lora import LoRA

NAMES = ("one", "two", "lora", "joined", "prefix", "prompt")
# `one` and `two` stand together with as many rows each, so they run as one product where they can.
ROUTE: tuple[str | None, ...] = ("one", "two", "joined", None, "one", "lora", "prompt", "two", "prefix", None)


def company(subject: Subject, backbone: Backbone, dropout: float = 0.0) -> dict[str, Delta]:
    """The subject twice, the subject joined to an adapter, and other methods to share a batch with."""
    joined: Spec = Composition((Adapter(m=3),)) | subject.spec
    specs: dict[str, Spec] = {
        "one": subject.spec,
        "two": subject.spec,
        "lora": LoRA(r=2, at="attn.{v,o} ffn.{up,down}", dropout=dropout),
        "joined": joined,
        "prefix": prefix(backbone, 3),
        "prompt": prompt(backbone, 2),
    }
    return {name: made(spec, backbone, name, seed=seed) for seed, (name, spec) in enumerate(specs.items())}


def many_is_alone(
    subject: Subject,
    route: Sequence[str | None] = ROUTE,
    *,
    dtype: torch.dtype | None = None,
    training: bool = True,
    seed: int = 0,
) -> None:
    """Each row's output and each delta's gradient is what it would be without the other rows."""
    backbone = subject.fresh(dtype)
    deltas = company(subject, backbone)
    rows = subject.rows(len(route), seed=seed)
    together = Adapted(backbone, [copy.deepcopy(delta) for delta in deltas.values()])
    together.bank.train(training)
    outputs = subject.run(together, rows, list(route))
    loss = score(outputs, rows)
    if loss.requires_grad:
        loss.backward()
    for name in dict.fromkeys(route):
        own = [i for i, other in enumerate(route) if other == name]
        alone = Adapted(subject.fresh(dtype), [deltas[name]] if name else [])
        alone.bank.train(training)
        wanted = subject.run(alone, [rows[i] for i in own], name)
        agree_rows([outputs[i] for i in own], wanted, f"{name} in {list(route)} against alone")
        if name is not None and deltas[name].trainable():
            score(wanted, [rows[i] for i in own]).backward()
            agree_gradients(gradients(together.bank[name]), gradients(deltas[name]), f"{name} in {list(route)}")
    for name in set(NAMES) - set(route):
        demand(all(g is None for g in gradients(together.bank[name]).values()), f"{name} has no row, but a gradient")


def padding_left_out_changes_nothing(subject: Subject) -> None:
    """Hidden states of rows of different lengths, run without padding where that can be, are each row's own.

    Gradients too; `one` and `two` have different numbers of tokens.
    """
    route: list[str | None] = ["one", "two", "two", None, "one", "one", "two"]
    backbone = subject.fresh()
    deltas = [made(subject.spec, backbone, name, seed=seed) for seed, name in enumerate(("one", "two"))]
    if alone_only(deltas[0]):
        route = ["one"] * len(route)
    rows = subject.rows(len(route))
    with Adapted(backbone, deltas) as adapted:
        adapted.bank.train()
        together = _states(adapted, subject, rows, route)
        learns = deltas[0].trainable() > 0
        if learns:
            score(together, rows).backward()
        wanted = {name: gradients(adapted.bank[name]) for name in adapted.bank.names}
        adapted.bank.zero_grad()
        alone = [_states(adapted, subject, [row], [name])[0] for row, name in zip(rows, route, strict=True)]
        agree_rows(together, alone, "without padding against alone")
        if learns:
            score(alone, rows).backward()
        for name in adapted.bank.names:
            agree_gradients(wanted[name], gradients(adapted.bank[name]), f"{name} without padding")


def _states(adapted: Adapted, subject: Subject, rows: Sequence[Row], route: Sequence[str | None]) -> list[Tensor]:
    batch = {name: value for name, value in subject.batch(rows).items() if not name.startswith("decoder")}
    hidden = adapted.encode(batch, deltas=list(route))
    return [hidden[i, : row.length] for i, row in enumerate(rows)]


def trained_together_is_trained_alone(subject: Subject, steps: int = 50) -> None:
    """Fifty steps of AdamW in one batch end at the weights of fifty steps alone, a delta's dropout included."""
    backbone = subject.fresh()
    deltas = company(subject, backbone, dropout=0.3)
    shares = {"one": 2, "two": 2, "lora": 3, "joined": 1, "prompt": 1}
    kept = {name: copy.deepcopy(deltas[name]) for name in shares}
    together = Adapted(backbone, [deltas[name] for name in shares])
    optimisers = [_optimiser(deltas[name]) for name in shares]
    together.bank.train()
    for step in range(steps):
        rows, names = _shuffled(subject, shares, step)
        losses = score(subject.run_drawn(together, rows, names, step), rows)
        _advance(losses, optimisers)
    for name in ("one", "joined", "lora"):
        if not kept[name].trainable():
            continue
        alone = Adapted(subject.fresh(), [kept[name]])
        optimiser = _optimiser(kept[name])
        alone.bank.train()
        for step in range(steps):
            rows, names = _shuffled(subject, shares, step)
            own = [row for row, other in zip(rows, names, strict=True) if other == name]
            _advance(score(subject.run_drawn(alone, own, [name] * len(own), step), own), [optimiser])
        for key, parameter in kept[name].named_parameters():
            agree(deltas[name].get_parameter(key), parameter, f"{name} after {steps} steps together: {key}")


def _optimiser(delta: Delta) -> torch.optim.Optimizer | None:
    if not delta.trainable():
        return None
    # At the default of 1e-8 Adam makes steps of 1e-9 of what rounding leaves of a gradient near zero.
    return torch.optim.AdamW(delta.parameters(), lr=2e-3, weight_decay=0.01, eps=1e-6)


def _advance(loss: torch.Tensor, optimisers: Sequence[torch.optim.Optimizer | None]) -> None:
    for optimiser in filter(None, optimisers):
        optimiser.zero_grad()
    loss.backward()
    for optimiser in filter(None, optimisers):
        optimiser.step()


def _shuffled(subject: Subject, shares: dict[str, int], step: int) -> tuple[list[Row], list[str]]:
    """The rows of one step, deltas interleaved in an order that changes."""
    names = [name for name, share in shares.items() for _ in range(share)]
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(step)).tolist()
    return subject.rows(len(names), seed=step), [names[i] for i in order]


def order_does_not_matter(subject: Subject) -> None:
    """Rows in another order give the same outputs in that order, and the same gradients."""
    backbone = subject.fresh()
    deltas = company(subject, backbone)
    adapted = Adapted(backbone, list(deltas.values()))
    rows = subject.rows(len(ROUTE))
    outputs = subject.run(adapted, rows, list(ROUTE))
    before = _backward(adapted, outputs, rows)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3)).tolist()
    mixed = [rows[i] for i in order]
    shuffled = subject.run(adapted, mixed, [ROUTE[i] for i in order])
    agree_rows(shuffled, [outputs[i] for i in order], "in another order")
    agree_gradients(_backward(adapted, shuffled, mixed), before, "in another order")


def batched_is_loop(subject: Subject) -> None:
    """The batched execution gives what the loop over segments gives, gradients included."""
    backbone = subject.fresh()
    deltas = company(subject, backbone)
    adapted = Adapted(backbone, list(deltas.values()))
    route = ["one", "one", "two", "two", None, "joined", "lora", "prefix"]
    rows = subject.rows(len(route))
    batched = subject.run(adapted, rows, route)
    after = _backward(adapted, batched, rows)
    adapted.batched = False
    loop = subject.run(adapted, rows, route)
    agree_rows(batched, loop, "batched against the loop")
    agree_gradients(after, _backward(adapted, loop, rows), "batched against the loop")


def _backward(adapted: Adapted, outputs: list[torch.Tensor], rows: Sequence[Row]) -> dict[str, torch.Tensor | None]:
    adapted.bank.zero_grad()
    score(outputs, rows).backward()
    return gradients(adapted.bank)


def absent_rests(subject: Subject) -> None:
    """A delta without rows in a step keeps its bits, whatever its optimiser remembers."""
    backbone = subject.fresh()
    deltas = company(subject, backbone)
    adapted = Adapted(backbone, list(deltas.values()))
    optimiser = torch.optim.AdamW(adapted.bank.parameters(), lr=0.1, weight_decay=0.1)
    routes: list[list[str | None]] = [["one", "two", "lora"], ["two", None, "lora"], ["lora", "lora", "two"]]
    for step, route in enumerate(routes):
        rows = subject.rows(3, seed=step)
        kept = {n: p.detach().clone() for n, p in adapted.bank["one"].named_parameters()}
        optimiser.zero_grad()
        score(subject.run(adapted, rows, route), rows).backward()
        optimiser.step()
        for name, p in adapted.bank["one"].named_parameters():
            if "one" in route:
                demand(not same_bits(p, kept[name]), f"{name} has rows and did not move")
            else:
                demand(p.grad is None, f"{name} has no rows in the step, but a gradient")
                demand(same_bits(p, kept[name]), f"{name} has no rows in the step, but moved")


def nan_stays_at_home(subject: Subject) -> None:
    """NaN in one delta's weights leaves the other rows' outputs and gradients as they were."""
    backbone = subject.fresh()
    deltas = company(subject, backbone)
    adapted = Adapted(backbone, list(deltas.values()))
    rows = subject.rows(len(ROUTE))
    healthy = [i for i, name in enumerate(ROUTE) if name != "one"]
    wanted = subject.run(adapted, rows, list(ROUTE))
    before = _backward(adapted, [wanted[i] for i in healthy], [rows[i] for i in healthy])
    with torch.no_grad():
        for parameter in deltas["one"].parameters():
            parameter.fill_(float("nan"))
    outputs = subject.run(adapted, rows, list(ROUTE))
    agree_rows([outputs[i] for i in healthy], [wanted[i] for i in healthy], "beside a delta of NaN")
    adapted.bank.zero_grad()
    score(outputs, rows).backward()
    after = gradients(adapted.bank)
    number = adapted.bank.names.index("one")
    others = [name for name in before if not name.startswith(f"deltas.{number}.")]
    agree_gradients({n: after[n] for n in others}, {n: before[n] for n in others}, "beside a delta of NaN")


def threads_do_not_meet(subject: Subject, turns: int = 6) -> None:
    """Two threads under different deltas at one time get what each gets alone."""
    backbone = subject.fresh()
    adapted = Adapted(backbone, [made(subject.spec, backbone, n, seed=i) for i, n in enumerate(("one", "two"))])
    rows = subject.rows(3)
    routes: tuple[str | None, ...] = ("one", "two", None)
    wanted = {route: subject.run(adapted, rows, route) for route in routes}
    faults: list[BaseException] = []
    start = threading.Barrier(len(routes))

    def work(route: str | None) -> None:
        try:
            start.wait()
            with adapted.using(route), torch.no_grad():
                for _ in range(turns):
                    outputs = subject.cut(adapted(**subject.batch(rows)), rows)
                    agree_rows(outputs, wanted[route], f"{route} beside other threads")
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(route,)) for route in routes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]
