"""The twelve calls: each is wrong in the version of the page, and ours is right or refused, by the page's own figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from silent import adapters_calls, peft_calls  # noqa: E402
from silent.case import Case, Measured, attempted, counted, with_changes  # noqa: E402

STORED = json.loads((ROOT / "docs" / "silent_dozen.json").read_text())
KEPT: dict[str, Any] = {case["name"]: case for case in STORED["cases"]}
CALLS = (*peft_calls.CASES, *adapters_calls.CASES)
REFUSED = {"other_weights", "fewer_blocks", "lost_tensor", "taken_name"}


def same(found: Measured, stored: dict[str, Any]) -> bool:
    """The verdict, and both figures but for rounding, which another processor does otherwise."""
    near = all(getattr(found, name) == pytest.approx(stored[name], rel=0.02, abs=2e-5) for name in ("off", "scale"))
    return near and (found.verdict, found.warned) == (stored["verdict"], stored["warned"])


def test_the_page_has_twelve_calls_that_are_wrong_without_a_word() -> None:
    assert [case["name"] for case in STORED["cases"]] == [case.name for case in CALLS]
    assert len(CALLS) == 12
    for case in STORED["cases"]:
        theirs, ours = case["theirs"], case["ours"]
        assert theirs["verdict"] == "wrong" and theirs["warned"] == 0
        assert theirs["off"] > 0.2 * theirs["scale"] > 0.1
        assert ours["verdict"] == ("refused" if case["name"] in REFUSED else "right")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", peft_calls.CASES, ids=lambda case: case.name)
def test_a_call_of_peft_gives_what_the_page_says(case: Case) -> None:
    here = {"peft": peft.__version__, "transformers": transformers.__version__}
    there = {name: STORED["versions"]["peft"][name] for name in here}
    if here != there:
        pytest.skip(f"the page is of {there}, installed are {here}")
    assert case.theirs is not None
    assert same(case.theirs(), KEPT[case.name]["theirs"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CALLS, ids=lambda case: case.name)
def test_ours_is_right_or_refused(case: Case) -> None:
    found = attempted(case.ours)
    stored = KEPT[case.name]["ours"]
    assert same(found, stored)
    assert found.refused == stored["refused"]
    if not found.refused:
        assert found.off <= 1e-5 < 0.1 < found.scale  # the delta does something, and the right thing


@pytest.mark.slow
def test_a_call_of_adapters_gives_what_the_page_says() -> None:
    place = adapters_calls.place()
    if not (place / "complete").exists():
        pytest.skip("benchmarks/silent_dozen.py --adapters makes the environment of adapters")
    found, versions = adapters_calls.theirs()
    assert versions == STORED["versions"]["adapters"]
    assert set(found) == {case.name for case in adapters_calls.CASES}
    for name, measured in found.items():
        assert same(measured, KEPT[name]["theirs"])


def test_warnings_and_distances_are_counted() -> None:
    import logging
    import warnings

    def speak() -> int:
        warnings.warn("to the user", UserWarning, stacklevel=1)
        warnings.warn("to developers", FutureWarning, stacklevel=1)
        logging.getLogger("peft.tuners").warning("to the user, too")
        return 3

    assert counted(speak) == (3, 2)
    changed = with_changes("bert", {"encoder.layer.0.attention.self.query.weight": torch.ones(32, 32)})
    assert not torch.equal(changed, with_changes("bert", {}))
    assert [Measured(off=0.5).verdict, Measured(off=0.5, warned=1).verdict, Measured(off=1e-5).verdict] == [
        "wrong", "warned", "right",
    ]  # fmt: skip
