"""Many deltas in one batch, the batch drawn at random."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.laws.subjects import METHODS, exemptions, subject

from deltatune.laws import rows
from deltatune.laws.families import FAMILIES

MIXING = [m for m in METHODS if not any(c.law == "many_is_alone" and c.method == m for c in exemptions())]
ROUTES = st.lists(st.sampled_from([*rows.NAMES, None]), min_size=1, max_size=9)
EXAMPLES = settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("family", FAMILIES)
@given(method=st.sampled_from(MIXING), route=ROUTES, training=st.booleans(), seed=st.integers(0, 99))
@EXAMPLES
def test_any_batch_is_its_rows_alone(
    family: str, method: str, route: list[str | None], training: bool, seed: int
) -> None:
    rows.many_is_alone(subject(method, family), route, training=training, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", MIXING)
@given(route=ROUTES, training=st.booleans(), seed=st.integers(0, 99))
@settings(EXAMPLES, max_examples=15)
def test_any_batch_of_each_method_is_its_rows_alone(
    method: str, family: str, route: list[str | None], training: bool, seed: int
) -> None:
    rows.many_is_alone(subject(method, family), route, training=training, seed=seed)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", MIXING)
def test_mixed_batch_in_float32(method: str, family: str) -> None:
    rows.many_is_alone(subject(method, family), dtype=torch.float32)


def test_route_of_one_row_each_and_of_one_delta_for_all() -> None:
    for route in (["one"], [None], ["two"] * 5, ["prompt", None], [None, "prompt", "prefix"]):
        rows.many_is_alone(subject("lora", "llama"), route)
