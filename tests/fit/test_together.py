"""Training together equals training alone: losses to 1e-4 in float32, weights to 1e-9 in float64 after 50 steps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.fit.running import alone, run
from tests.fit.tiny import QUICK, furthest, plan, same_bits, task

# "auto" leaves a float64 backbone as it is.
SETTINGS = dataclasses.replace(QUICK, steps=50, precision="auto")
METHODS = ("lora(dropout=0.3)", "adapter", "prefix(n=3)")
SHORT, LONG = task(name="short", longest=5), task(name="long", longest=14)
MANY = [plan(method, on, seed, SETTINGS) for method in METHODS for on in (SHORT, LONG) for seed in (0, 1, 2)]
# One of each way to act: tokens in the input, an input port, biases, all weights, none at all; other kinds of task.
KINDS = [
    plan("prompt(n=2)", SHORT, 0, SETTINGS),
    plan("ia3", task("token_classification"), 1, SETTINGS),
    plan("bitfit | prompt(n=1)", task("pair_classification"), 0, SETTINGS),
    plan("full", task("pair_classification"), 0, SETTINGS, lr=1e-3),
    plan("head", LONG, 0, SETTINGS),
    plan('lora(at="ffn.{up,down}", dropout=0.2)', LONG, 3, SETTINGS, batch=3, tokens=60),
]


def assert_equal(mine, other, tolerance):
    assert mine.steps == other.steps and mine.state == other.state
    assert mine.losses == pytest.approx(other.losses, rel=0, abs=1e-12)
    assert furthest(mine.tensors, other.tensors) <= tolerance


def test_losses_in_float32_agree_at_every_step():
    together, groups = run(MANY, torch.float32)
    assert groups[0] < len(MANY)  # they did share physical batches
    for one in MANY[::2]:
        lonely = alone(one, torch.float32)
        assert len(lonely.losses) == 50 and len(set(lonely.losses)) > 40
        assert together[one.name].losses == pytest.approx(lonely.losses, rel=0, abs=1e-4)


def test_weights_in_float64_agree_after_50_steps():
    together, _ = run(MANY)
    for one in MANY:
        assert_equal(together[one.name], alone(one), 1e-9)


def test_every_way_to_act_agrees_beside_every_other():
    together, _ = run(KINDS)
    for one in KINDS:
        assert_equal(together[one.name], alone(one), 1e-9)


@pytest.mark.parametrize("tokens", [1, 40, 90])
def test_how_batches_are_packed_changes_nothing(tokens):
    some = MANY[::4]
    whole, few = run(some, steps=15)
    split, many = run([dataclasses.replace(p, settings=dataclasses.replace(p.settings, tokens=tokens)) for p in some],
                      steps=15)  # fmt: skip
    assert sum(many) > sum(few)  # the budget did split them
    for one in some:
        assert_equal(split[one.name], whole[one.name], 1e-9)


@pytest.mark.parametrize("kind", ["generation", "classification"])
def test_a_language_model_agrees(kind):
    on = [dataclasses.replace(task(kind, name, longest=longest), template=template)
          for name, longest, template in (("a", 5, None), ("b", 12, "{source} Answer:"))]  # fmt: skip
    if kind == "classification":
        on = [dataclasses.replace(one, template="{text} Label:") for one in on]
    some = [plan(method, one, seed, SETTINGS) for seed, method in enumerate(METHODS) for one in on]
    together, _ = run(some, family="llama", steps=20)
    for one in some:
        # The scores over words are float32 whatever the backbone is.
        lonely = alone(one, family="llama", steps=20)
        assert together[one.name].losses == pytest.approx(lonely.losses, rel=0, abs=1e-6)
        assert furthest(together[one.name].tensors, lonely.tensors) <= 1e-6


def test_a_neighbour_that_ends_or_diverges_changes_nothing():
    short = dataclasses.replace(SETTINGS, steps=9)
    ends, breaks = plan("adapter", LONG, 5, short), plan("lora", SHORT, 6, SETTINGS, lr=1e160, clip=1e300)
    some = [MANY[0], MANY[7], MANY[14]]
    together, _ = run([some[0], ends, some[1], breaks, some[2]])
    assert together[ends.name].steps == 9 and together[breaks.name].state == "nan"
    for one in (*some, ends):
        assert_equal(together[one.name], alone(one), 1e-9)


def test_a_job_that_has_ended_is_not_moved_by_those_that_go_on():
    ends = plan("adapter", SHORT, 0, SETTINGS, steps=5, weight_decay=0.1)
    goes = plan("adapter", SHORT, 1, SETTINGS)
    at_its_end, _ = run([ends, goes], steps=5)
    later, _ = run([ends, goes], steps=30)
    assert (later[ends.name].steps, later[goes.name].steps) == (5, 30)
    assert same_bits(at_its_end[ends.name].tensors, later[ends.name].tensors)


def test_the_order_of_the_jobs_changes_nothing():
    some = [*MANY[::5], *KINDS[:3]]
    forwards, _ = run(some, steps=10)
    backwards, _ = run(some[::-1], steps=10)
    for one in some:
        assert_equal(forwards[one.name], backwards[one.name], 1e-9)


def test_a_prompt_at_the_length_limit_trains_beside_rows_of_full_length():
    long = task(name="overlong", longest=90)
    # With dropout a LoRA runs padded, so that nothing but the length keeps the two apart.
    some = [plan("prompt(n=6)", long, 0, SETTINGS), plan("lora(dropout=0.1)", long, 0, SETTINGS)]
    shorter = [dataclasses.replace(one, task=SHORT) for one in some]
    assert run(shorter, steps=1)[1] == [1]
    together, groups = run(some, steps=5)
    assert groups[0] == 2  # together they would not fit the positions
    for one in some:
        assert_equal(together[one.name], alone(one, steps=5), 1e-9)
