"""torch.compile: the outputs and gradients of uncompiled calls, and graphs that no routing makes anew."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.engine.subjects import SPECS, adapted, backward, close, subject
from torch import nn
from torch._dynamo.utils import counters

from deltatune.backbone.load import Backbone
from deltatune.compose.expression import parse
from deltatune.delta.adapted import Adapted, adapt
from deltatune.errors import RoutingError
from deltatune.laws.families import tiny
from deltatune.laws.subject import Row, Subject, made

ROUTES: tuple[tuple[str | None, ...], ...] = (
    ("one",) * 4, ("two",) * 4, ("one", "one", "two", "two"), ("one", "two", "two", "two"), ("two", None, "one", "two"),
    (None,) * 4,
)  # fmt: skip
# Other numbers of rows, one delta's and mixed.
SIZES: tuple[tuple[str | None, ...], ...] = (
    ("one",) * 3, ("two", "one"), ("one", "two", "one", None, "two"), ("one",) * 5,
)  # fmt: skip
# Other routings of the same numbers of rows.
OTHERS: tuple[tuple[str | None, ...], ...] = (
    ("two", "two", "two", "one"), (None, "one", "two"), ("two", "two"), ("two",) * 5, ("two", "one", None, "one", "one"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def compiled(model: Adapted, backend: str = "eager") -> Any:
    return torch.compile(model, backend=backend)


def outputs(held: Subject, model: Any, rows: list[Row], route: Any) -> list[torch.Tensor]:
    return held.cut(model(**held.batch(rows), deltas=None if route is None else list(route)), rows)


# One of each port, and all in one; seconds each, so the other methods, which share these ports, are slow tests.
QUICK = (
    ("lora(r=2)", "bert"),
    ("prefix(n=3)", "bert"),
    ("prompt(n=3)", "bert"),
    ("full", "bert"),
    (SPECS[-1], "llama"),
)
SLOW = [*((text, "bert") for text in SPECS if (text, "bert") not in QUICK), (SPECS[-1], "t5")]


@pytest.mark.parametrize(("text", "family"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_compiled_is_uncompiled_and_no_routing_compiles_again(text: str, family: str) -> None:
    """One set of graphs for a number of rows, a second for all others; none for a routing."""
    held = subject(text, family)
    plain = adapted(text, held.fresh(), "one", "two")
    model = compiled(plain)

    def run(route: tuple[str | None, ...]) -> int:
        rows = held.rows(len(route), length=6)
        with torch.no_grad():
            close(outputs(held, model, rows, route), outputs(held, plain, rows, route))
        return graphs()

    mixes = text != "full"  # its rows cannot be mixed
    # Without any prompt rows are shorter, which is another shape.
    found = [run(route) for route in (ROUTES[:2] if not mixes else ROUTES[:-1] if "prompt" in text else ROUTES)]
    assert found[0] > 0
    if family != "t5":  # one code is all of its attentions, and its graphs come apart at the first mixed routing
        assert set(found) == {found[0]}
    # Where a number of rows became a variable, a graph may come apart; then there are as many as there will be.
    settling = SIZES + OTHERS if family == "t5" else SIZES  # with two stacks it takes longer
    most = [run(route) for route in (settling if mixes else SIZES[:1])][-1]
    assert most <= 3 * found[0]
    assert {run(route) for route in (OTHERS if mixes else ROUTES[:1])} == {most}


@pytest.mark.parametrize("text", [SPECS[0], SPECS[-1]])
def test_compiled_training_has_the_gradients_of_uncompiled(text: str) -> None:
    held = subject(text, "llama")
    plain = adapted(text, held.fresh(), "one", "two")
    plain.train()
    model = compiled(plain, "aot_eager")
    rows = held.rows(4, length=6)
    for route in (ROUTES[0], ROUTES[4]):
        wanted = backward(plain, outputs(held, plain, rows, route), rows)
        got = backward(plain, outputs(held, model, rows, route), rows)
        for name, gradient in wanted.items():
            assert (got[name] is None) == (gradient is None), name
            if gradient is not None:
                torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12)


def test_a_delta_that_joins_after_compiling_acts() -> None:
    """Graphs do not look for new hooks, so attaching throws them away."""
    held = subject("lora(r=2)")
    plain = adapted("lora(r=2)", held.fresh(), "one")
    model = compiled(plain)
    rows = held.rows(3, length=6)
    with torch.no_grad():
        outputs(held, model, rows, ["one"] * 3)
        plain.join(made(parse("adapter(m=3) | ia3"), plain.source, "two", seed=1))
        wanted = outputs(held, plain, rows, ["two"] * 3)
        close(outputs(held, model, rows, ["two"] * 3), wanted)
        assert float((wanted[0] - outputs(held, plain, rows, [None] * 3)[0]).abs().max()) > 1e-3
        plain.leave("one")
        close(outputs(held, model, rows, ["two"] * 3), wanted)


def test_a_backbone_whose_forward_was_traced_before_may_be_adapted() -> None:
    held = subject("adapter(m=3)")
    on = held.fresh()
    rows = held.rows(3, length=6)
    forward = torch.compile(on.module.forward, backend="eager")
    with torch.no_grad():
        bare = held.cut(forward(**held.batch(rows)), rows)
        plain = adapted("adapter(m=3)", on)
        close(outputs(held, compiled(plain), rows, ["one"] * 3), outputs(held, plain, rows, ["one"] * 3))
        plain.remove()
        close(held.cut(forward(**held.batch(rows)), rows), bare)


class Plain(nn.Module):
    """Without attention, which adapting changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(torch.tanh(self.first(x)))
        return found


def test_a_frozen_network_that_was_traced_before_may_be_adapted() -> None:
    """Adapting changes nothing of it that a graph looks at: neither attention nor flags, hooks alone."""
    network = Plain().double().eval().requires_grad_(False)
    x = torch.randn(3, 4, dtype=torch.float64)
    forward = torch.compile(network.forward, backend="eager")
    with torch.no_grad():
        bare = forward(x)
        plain = adapted("lora(r=2, at='module:*')", Backbone(network))
        wanted = plain(x)
        assert float((wanted - bare).abs().max()) > 1e-3
        close([compiled(plain)(x)], [wanted])
        plain.remove()
        close([forward(x)], [bare])


def test_compiled_in_place() -> None:
    held = subject("lora(r=2)")
    plain = adapted("lora(r=2)", held.fresh(), "one", "two")
    rows = held.rows(4, length=6)
    with torch.no_grad():
        wanted = outputs(held, plain, rows, ROUTES[3])
        plain.compile(backend="eager")
        close(outputs(held, plain, rows, ROUTES[3]), wanted)
    assert graphs() > 0


@pytest.mark.parametrize("part", ["", "encoder.layer.1"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_backbone_is_refused(part: str, in_place: bool) -> None:
    module: Any = tiny("bert")
    if in_place:
        module.get_submodule(part).compile(backend="eager")
    elif part:
        layers = module.get_submodule("encoder.layer")
        layers[1] = torch.compile(layers[1], backend="eager")
    else:
        module = torch.compile(module, backend="eager")
    with pytest.raises(RoutingError, match="this backbone is compiled.*adapt it first, then compile"):
        adapt(module, parse("lora"))


def test_generation_that_transformers_compiles() -> None:
    """With a static cache transformers compiles the decoding step by itself where there is a GPU; here it is asked to."""
    import transformers as hf

    held = subject("lora(r=2) | prefix(n=2)", "llama")
    model = adapted(str(held.spec), held.fresh(), "one", "two")
    batch = held.batch(held.rows(3), left=True)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    settings: dict[str, Any] = dict(
        deltas=["one", None, "two"], max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    config = hf.CompileConfig(backend="eager", fullgraph=False, mode=None)
    config._compile_all_devices = True
    wanted = model.generate(**inputs, **settings)
    got = model.generate(**inputs, **settings, cache_implementation="static", compile_config=config)
    assert got.sequences.tolist() == wanted.sequences.tolist()
    close(got.logits, wanted.logits, 1e-6)  # transformers keeps them in float32
    assert graphs() > 0


@pytest.mark.slow
def test_the_default_compiler() -> None:
    held = subject("lora(r=2)")
    plain = adapted("lora(r=2)", held.fresh(torch.float32), "one", "two")
    rows = held.rows(4, length=6)
    model = compiled(plain, "inductor")
    with torch.no_grad():
        close(outputs(held, model, rows, ROUTES[3]), outputs(held, plain, rows, ROUTES[3]), 1e-5)
