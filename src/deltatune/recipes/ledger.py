"""The ledger: every testable claim of the published systems, its criterion and its state.

`claims.tsv` and `protocol.txt` fix, before any run, what would show each claim; a changed criterion is a new row with a
new id. States are computed from what exists, never written by hand: a system whose recipe module is absent is not
built, one without a results file (`results/<system>.json`, as `deltatune reproduce NAME --json` prints it) is not run.
"""

from __future__ import annotations

import csv
import importlib.util
import json
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from deltatune.errors import DeltatuneError

NOT_RUN = "not run"
NOT_BUILT = "not built yet"
PRESENT = "recipe present, not run"
_HERE = Path(__file__).parent
_RESULTS = _HERE / "results"
_POSSIBLE = {
    "yes": ("shown", "not shown", "reversed", "not testable here"),
    "mechanism only": ("mechanism shown", "not shown", "reversed", "not testable here"),
    "not at this size": ("not testable here",),
}


@dataclass(frozen=True)
class Claim:
    """One separately testable statement of a system's abstract, with the criterion that was fixed before any run."""

    id: str
    system: str
    claim: str
    kind: str
    criterion: str
    data: str
    backbone: str
    testable: str
    unit_check: str

    @property
    def possible_states(self) -> tuple[str, ...]:
        """The states that a run can give this claim, by what the ledger says of its testability."""
        return _POSSIBLE[self.testable.partition(":")[0]]


@dataclass(frozen=True)
class System:
    """One published system; `pages` are the names under which its claims stand in the ledger."""

    id: str
    pages: tuple[str, ...]
    title: str
    authors: str
    year: int
    published: str
    summary: str

    @property
    def module(self) -> str:
        """The full name of its recipe module."""
        return f"deltatune.recipes.{self.id.replace('-', '_')}"

    @property
    def source(self) -> str:
        """The reference in one line."""
        return f"{self.authors} ({self.year}). {self.title}. {self.published}."


@cache
def load_systems() -> tuple[System, ...]:
    """Return the 36 published systems in alphabetical order."""
    return tuple(
        System(
            id=row["system"],
            pages=tuple(row["pages"].split(", ")),
            title=row["title"],
            authors=row["authors"],
            year=int(row["year"]),
            published=row["source"],
            summary=row["summary"],
        )
        for row in _table("systems.tsv")
    )


@cache
def load_claims() -> tuple[Claim, ...]:
    """Return all claims in the order of the ledger; `system` is the id of the system, not the name of its page."""
    owner = {page: system.id for system in load_systems() for page in system.pages}
    return tuple(
        Claim(**{name.replace(" ", "_"): cell for name, cell in row.items()} | {"system": owner[row["system"]]})
        for row in _table("claims.tsv")
    )


def protocol() -> str:
    """Return the standing protocol, which is part of every criterion, and the rule that assigns the states."""
    return (_HERE / "protocol.txt").read_text(encoding="utf-8")


def states(results: Path = _RESULTS) -> dict[str, str]:
    """Return system id -> its state: not built yet; recipe present, not run; or the counts of its claims' states.

    `results` is the folder of the results files. Raises DeltatuneError when one of them does not fit the ledger.
    """
    return {row["system"]: row["state"] for row in reproduce_list(results)}


def reproduce_list(results: Path = _RESULTS) -> list[dict[str, Any]]:
    """Return the rows of `deltatune reproduce --list --json`: `system, source, claims, state`, one per system.

    `results` is the folder of the results files. Raises DeltatuneError when one of them does not fit the ledger.
    """
    return [_row(system, results / f"{system.id}.json") for system in load_systems()]


def _row(system: System, path: Path) -> dict[str, Any]:
    claims = {c.id: c for c in load_claims() if c.system == system.id}
    found = {i: NOT_RUN if len(c.possible_states) > 1 else c.possible_states[0] for i, c in claims.items()}
    if importlib.util.find_spec(system.module) is None:
        state = NOT_BUILT
    elif not path.exists():
        state = PRESENT
    else:
        found |= _measured(path, system, claims)
        state = ", ".join(f"{count} {name}" for name, count in Counter(found.values()).most_common())
    shown = ("id", "claim", "kind", "criterion", "testable")
    return {
        "system": system.id,
        "source": system.source,
        "claims": [{key: getattr(c, key) for key in shown} | {"state": found[c.id]} for c in claims.values()],
        "state": state,
    }


def _measured(path: Path, system: System, claims: dict[str, Claim]) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [(row["id"], row["criterion"], row["state"]) for row in content["claims"]]
        owner = content["system"]
    except (ValueError, KeyError, TypeError) as error:
        raise DeltatuneError(f"{path}: not what `deltatune reproduce {system.id} --json` prints: {error!r}") from error
    if owner != system.id:
        raise DeltatuneError(f"{path}: results of {owner!r}, expected those of {system.id!r}")
    for name, criterion, state in rows:
        claim = claims.get(name)
        if claim is None:
            raise DeltatuneError(f"{path}: unknown claim {name!r}, expected one of {', '.join(claims)}")
        if criterion != claim.criterion:
            raise DeltatuneError(f"{path}: {name!r} was run under a criterion that is not the ledger's; run it again")
        if state not in claim.possible_states:
            raise DeltatuneError(f"{path}: {name!r} is {state!r}, expected one of {', '.join(claim.possible_states)}")
    return {name: state for name, _, state in rows}


def _table(name: str) -> list[dict[str, str]]:
    with (_HERE / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
