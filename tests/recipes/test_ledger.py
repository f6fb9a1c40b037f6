"""The ledger is complete, unchanged and in its honest state."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltatune import recipes
from deltatune.errors import DeltatuneError
from deltatune.recipes import ledger

DATA = Path(ledger.__file__).parent
# Criteria are fixed before any run. A hash here changes only together with a new row under a new id and an entry in
# CHANGELOG.md that says why; never because a run came out otherwise.
FIXED = {
    "claims.tsv": "d1529a14f5d2443c8f8e08be2aec02f7747f7fc359ca6a45dd38f537e076f150",
    "protocol.txt": "c00293def216267daf144e1248a31ad42d2769cb4aab0f703b470251da49ee57",
    "systems.tsv": "19214a85aa7d433531c81fe061751ed29452946378f7d2ae56e79f725ad4ec22",
}


@pytest.mark.parametrize("name", FIXED)
def test_criteria_are_those_that_were_fixed_before_any_run(name: str) -> None:
    assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == FIXED[name]


def test_ledger_counts_are_those_of_the_published_abstracts() -> None:
    systems, claims = ledger.load_systems(), ledger.load_claims()
    assert (len(systems), len(claims)) == (36, 169)
    assert len({c.id for c in claims}) == 169
    assert Counter(c.testable.partition(":")[0] for c in claims) == {
        "yes": 136,
        "mechanism only": 26,
        "not at this size": 7,
    }
    assert Counter(c.kind for c in claims) == {
        "quality": 77, "analysis": 40, "capability": 18, "cost": 13, "speed": 8, "robustness": 7, "ordering": 6,
    }  # fmt: skip


def test_every_field_is_filled_and_names_no_machine() -> None:
    rows = [*ledger.load_claims(), *ledger.load_systems()]
    cells = [(row.id, cell) for row in rows for cell in vars(row).values()]
    assert [i for i, cell in cells if not cell] == []
    assert [i for i, cell in cells if re.search(r"(^|\s)(/\w|\.\./|shared/|reports/)", str(cell))] == []


def test_every_system_has_claims_and_a_reference() -> None:
    owners = Counter(c.system for c in ledger.load_claims())
    for system in ledger.load_systems():
        assert owners.pop(system.id) > 0
        assert re.search(r"\(20[12]\d\)\. .+\. arXiv \d{4}\.\d{5}", system.source), system.source
        assert system.summary.count(". ") == 0
        assert system.summary.endswith(".")
    assert not owners


def test_the_survey_is_one_system_of_two_pages() -> None:
    survey = next(row for row in ledger.reproduce_list() if row["system"] == "delta-survey")
    assert {c["id"].partition("/")[0] for c in survey["claims"]} == {"delta-survey-methods", "delta-survey-study"}
    assert len(survey["claims"]) == 10


def test_protocol_states_every_state_that_a_claim_can_have() -> None:
    for name in {state for claim in ledger.load_claims() for state in claim.possible_states}:
        assert re.search(rf"^  {name} {{2,}}", ledger.protocol(), re.MULTILINE), name


def test_rows_have_exactly_the_keys_of_the_command_line() -> None:
    rows = json.loads(json.dumps(ledger.reproduce_list()))
    assert len(rows) == 36
    for row in rows:
        assert list(row) == ["system", "source", "claims", "state"]
        for claim in row["claims"]:
            assert list(claim) == ["id", "claim", "kind", "criterion", "testable", "state"]


def test_a_system_without_a_recipe_is_not_built_whatever_results_lie_about(tmp_path: Path) -> None:
    missing = [s for s in ledger.load_systems() if not (DATA / f"{s.id.replace('-', '_')}.py").exists()]
    for system in missing:
        (tmp_path / f"{system.id}.json").write_text(results_of(system.id, "shown"))
    found = ledger.states(tmp_path)
    assert missing
    assert {found[s.id] for s in missing} == {ledger.NOT_BUILT}


def test_a_recipe_is_present_then_counted(recipe: None, tmp_path: Path) -> None:
    assert ledger.states(tmp_path)["vpt"] == ledger.PRESENT
    ids = [c.id for c in ledger.load_claims() if c.system == "vpt"]
    (tmp_path / "vpt.json").write_text(results_of("vpt", "reversed", ids[:1]))
    row = next(row for row in ledger.reproduce_list(tmp_path) if row["system"] == "vpt")
    assert [c["state"] for c in row["claims"]] == ["reversed", "not run", "not run"]
    assert row["state"] == "2 not run, 1 reversed"
    assert ledger.states(tmp_path)["unipelt"] == ledger.NOT_BUILT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["claims"][0].update(id="vpt/none"), "unknown claim 'vpt/none'"),
        (lambda r: r["claims"][0].update(state="proved"), "expected one of shown, not shown"),
        (lambda r: r["claims"][0].update(state="mechanism shown"), "expected one of shown, not shown"),
        (lambda r: r["claims"][0].update(criterion="easier"), "a criterion that is not the ledger's"),
        (lambda r: r.update(system="unipelt"), "results of 'unipelt'"),
        (lambda r: r["claims"][0].pop("state"), "not what `deltatune reproduce vpt --json` prints"),
    ],
)
def test_results_that_do_not_fit_the_ledger_are_refused(
    recipe: None, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    content = json.loads(results_of("vpt", "shown"))
    change(content)
    (tmp_path / "vpt.json").write_text(json.dumps(content))
    with pytest.raises(DeltatuneError, match=re.escape(message)):
        ledger.reproduce_list(tmp_path)


def test_a_claim_beyond_this_size_is_said_so_before_any_run() -> None:
    beyond = {c.id for c in ledger.load_claims() if c.testable.startswith("not at this size")}
    listed = {c["id"]: c["state"] for row in ledger.reproduce_list() for c in row["claims"]}
    assert len(beyond) == 7
    assert {listed[i] for i in beyond} == {"not testable here"}


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Add the module `deltatune.recipes.vpt` from outside the package."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "vpt.py").write_text("")
    monkeypatch.setattr("deltatune.recipes.__path__", [*recipes.__path__, str(folder)])


def results_of(system: str, state: str, only: list[str] | None = None) -> str:
    claims = [c for c in ledger.load_claims() if c.system == system and (only is None or c.id in only)]
    rows = [{"id": c.id, "criterion": c.criterion, "measured": {}, "state": state} for c in claims]
    return json.dumps({"system": system, "claims": rows, "seconds": 1.0})
