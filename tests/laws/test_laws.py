"""Every law for every method on every family; the covering third in `make test`, the product in `make test-all`."""

from __future__ import annotations

import pytest
from tests.laws.subjects import METHODS, Case, covering, exemptions, subject

from deltatune.laws import LAWS
from deltatune.laws.families import FAMILIES

CASES = [Case(law, method, family) for law in LAWS for method in METHODS for family in FAMILIES]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id="-".join(case), marks=() if covering(case) else pytest.mark.slow)
        for case in CASES
        if case not in exemptions()
    ],
)
@pytest.mark.filterwarnings("ignore:delta .* was trained on the same backbone")
def test_law_holds(case: Case) -> None:
    LAWS[case.law](subject(case.method, case.family))
