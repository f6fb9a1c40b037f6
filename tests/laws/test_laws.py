"""Every law for every method on every family; a pairwise covering set in `make test`, the product in `make test-all`."""

from __future__ import annotations

import pytest
from tests.laws.subjects import METHODS, Case, covering, exemptions, subject

from deltatune.laws import LAWS
from deltatune.laws.families import FAMILIES

PRODUCT = [Case(law, method, family) for law in LAWS for method in METHODS for family in FAMILIES]
CASES = [case for case in PRODUCT if case not in exemptions()]


def test_the_covering_set_is_pairwise() -> None:
    chosen = [case for case in CASES if covering(case)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        wanted, found = ({(case[one], case[other]) for case in some} for some in (CASES, chosen))
        assert wanted == found


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id="-".join(case), marks=() if covering(case) else pytest.mark.slow) for case in CASES],
)
@pytest.mark.filterwarnings("ignore:delta .* was trained on the same backbone")
def test_law_holds(case: Case) -> None:
    LAWS[case.law](subject(case.method, case.family))
