"""Rows, deltas and calls that do not fit together are refused; what `using` says ends where it should."""

from __future__ import annotations

import threading

import pytest
import torch
from tests.laws.subjects import backbone, subject

import deltatune.delta.adapted as module
from deltatune.backbone.load import Backbone
from deltatune.delta.adapted import Adapted, adapt
from deltatune.errors import RoutingError, UnknownName
from deltatune.laws.families import FAMILIES, tiny
from deltatune.laws.subject import Subject, made
from deltatune.methods.addition.prompt import Prompt
from deltatune.methods.baseline.full import Full
from deltatune.methods.reparameterization.lora import LoRA


def pair(spec: LoRA | Prompt = LoRA(r=2), family: str = "bert") -> tuple[Subject, Adapted]:  # noqa: B008
    held = subject("lora", family)
    fresh = held.fresh()
    return held, Adapted(fresh, [made(spec, fresh, name, seed=seed) for seed, name in enumerate(("french", "german"))])


def test_number_of_deltas_is_the_number_of_rows() -> None:
    held, adapted = pair()
    with pytest.raises(RoutingError, match="deltas names 2 rows, the batch has 3"):
        held.run(adapted, held.rows(3), ["french", "german"])


def test_unknown_delta_names_the_nearest() -> None:
    held, adapted = pair()
    for route in ("frenh", ["french", "frenh"]):
        with pytest.raises(UnknownName, match="unknown delta 'frenh'; nearest: french"):
            held.run(adapted, held.rows(2), route)


def test_route_must_be_said_where_several_are_attached() -> None:
    held, adapted = pair()
    with pytest.raises(RoutingError, match=r"2 deltas are attached \(french, german\): say which one acts"):
        adapted(**held.batch(held.rows(2)))


def test_two_deltas_of_one_name_are_refused() -> None:
    with pytest.raises(RoutingError, match="two deltas are called 'lora'"):
        adapt(Backbone(tiny("bert")), LoRA(), LoRA())


def test_compiled_backbone_is_refused() -> None:
    for compiled in (torch.compile(tiny("bert")), tiny("bert")):
        if not hasattr(compiled, "_orig_mod"):
            compiled.compile()
        with pytest.raises(RoutingError, match="compiled"):
            adapt(compiled, LoRA())


def test_adapted_is_not_adapted_again() -> None:
    _, adapted = pair()
    with pytest.raises(RoutingError, match="adapted already"):
        adapt(adapted, LoRA())


def test_removed_deltas_do_not_run() -> None:
    held, adapted = pair()
    adapted.remove()
    with pytest.raises(RoutingError, match="were removed"):
        held.run(adapted, held.rows(2), "french")


def test_delta_of_weights_takes_whole_calls_only() -> None:
    held = subject("full", "bert")
    fresh = held.fresh()
    adapted = Adapted(fresh, [made(Full(), fresh, "full"), made(LoRA(), fresh, "lora")])
    with pytest.raises(RoutingError, match="'full' changes the weights themselves"):
        held.run(adapted, held.rows(2), ["full", "lora"])


def test_call_made_before_must_fit() -> None:
    held, adapted = pair()
    _, other = pair()
    batch = held.batch(held.rows(2))
    with pytest.raises(RoutingError, match="the call routes 3 rows, the batch has 2"):
        adapted.run(adapted.call(3, "french"), **batch)
    with pytest.raises(RoutingError, match="another Adapted"):
        adapted.run(other.call(2, "french"), **batch)


def test_call_used_twice_sees_the_new_weights() -> None:
    held, adapted = pair()
    rows = held.rows(2)
    call = adapted.call(2, ["french", "german"])
    with torch.no_grad():
        first = held.cut(adapted.run(call, **held.batch(rows)), rows)
        for parameter in adapted.bank.parameters():
            parameter.add_(0.1)
        second = held.cut(adapted.run(call, **held.batch(rows)), rows)
    assert not torch.equal(first[0], second[0])
    assert torch.equal(second[0], held.run(adapted, rows, ["french", "german"])[0])


def test_prompt_longer_than_the_positions_is_refused() -> None:
    held, adapted = pair(Prompt(n=60))
    with pytest.raises(RoutingError, match="exceed the 64 positions"):
        held.run(adapted, held.rows(2, length=9), "french")


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_number_of_rows_inside_is_refused(family: str) -> None:
    """A tensor at a site whose rows are not the call's rows is never routed by guess."""
    _held, adapted = pair(family=family)
    call = adapted.call(2, ["french", "german"])
    site = next(site for site, _ in adapted.bank["french"].at_sites())
    h = torch.zeros(3, 4, site.d_out if site.view is None else 3 * site.d_out, dtype=torch.float64)
    with pytest.raises(RoutingError, match=r"got 3 rows, the call routes 2"):
        adapted.bank.execute(call, site, "output", torch.zeros(3, 4, site.d_in, dtype=torch.float64), h)


def test_using_ends_with_its_block_and_after_an_exception() -> None:
    held, adapted = pair()
    batch = held.batch(held.rows(2))
    with adapted.using("french"):
        inside = adapted(**batch).last_hidden_state
        with adapted.using("german"):
            other = adapted(**batch).last_hidden_state
        assert torch.equal(adapted(**batch).last_hidden_state, inside)
    assert not torch.equal(inside, other)
    with pytest.raises(ZeroDivisionError), adapted.using("german"):
        _ = 1 / 0
    with pytest.raises(RoutingError, match="say which one acts"):
        adapted(**batch)
    assert not module._using.get()


def test_using_of_one_says_nothing_about_another() -> None:
    held, adapted = pair()
    fresh = held.fresh()
    other = Adapted(fresh, [made(LoRA(r=2), fresh, "only")])
    batch = held.batch(held.rows(2))
    with adapted.using("french"):
        assert torch.equal(other(**batch).last_hidden_state, other(**batch, deltas="only").last_hidden_state)


def test_using_in_one_thread_is_unknown_in_another() -> None:
    held, adapted = pair()
    batch = held.batch(held.rows(2))
    found: list[BaseException] = []

    def work() -> None:
        try:
            adapted(**batch)
        except RoutingError as error:
            found.append(error)

    with adapted.using("french"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert "say which one acts" in str(found[0])


def test_exception_inside_a_forward_leaves_no_call_behind() -> None:
    held, adapted = pair()
    rows = held.rows(2)
    wanted = held.run(adapted, rows, None)

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    handle = adapted.backbone.encoder.layer[1].register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        held.run(adapted, rows, "french")
    handle.remove()
    bare = held.cut(adapted.backbone(**held.batch(rows)), rows)
    assert all(map(torch.equal, bare, wanted))


def test_moved_parameters_are_seen_by_the_batched_execution() -> None:
    """Whatever ends a stack (another bank, assigned or replaced values, another dtype) is noticed."""
    held, adapted = pair()
    rows = held.rows(4)
    route = ["french", "german", "french", "german"]
    held.run(adapted, rows, route)

    def both() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        batched = held.run(adapted, rows, route)
        adapted.batched = False
        loop = held.run(adapted, rows, route)
        adapted.batched = True
        return batched, loop

    def second_bank() -> None:
        fresh = held.fresh()
        other = Adapted(fresh, [adapted.bank["french"], made(LoRA(r=2), fresh, "third")])
        held.run(other, rows[:2], ["french", "third"])
        with torch.no_grad():
            adapted.bank["french"].layers["0/encoder:0:attn:q"].B.add_(1.0)

    def vector() -> None:
        own = list(adapted.bank["german"].parameters())
        torch.nn.utils.vector_to_parameters(2 * torch.nn.utils.parameters_to_vector(own), own)

    def assigned() -> None:
        adapted.load_state_dict({k: 0.5 * v for k, v in adapted.state_dict().items()}, assign=True)

    def converted() -> None:
        adapted.bank["german"].to(torch.bfloat16).to(torch.float64)

    before = held.run(adapted, rows, route)
    for change in (second_bank, vector, assigned, converted):
        change()
        batched, loop = both()
        assert all(torch.allclose(a, b, atol=1e-12, rtol=0) for a, b in zip(batched, loop, strict=True)), (
            change.__name__
        )
        assert not torch.equal(batched[1], before[1]) or not torch.equal(batched[0], before[0]), change.__name__
        before = batched


def test_encoder_of_t5_gives_one_position_per_token() -> None:
    held = Subject(Prompt(n=3), backbone("t5"))
    fresh = held.fresh()
    adapted = Adapted(fresh, [made(Prompt(n=3), fresh)])
    batch = held.batch(held.rows(2, length=6))
    del batch["decoder_input_ids"]
    assert adapted.encode(batch).shape == (2, 6, 32)
    whole = adapted(**held.batch(held.rows(2, length=6)))
    assert torch.allclose(adapted.encode(batch), whole.encoder_last_hidden_state)
