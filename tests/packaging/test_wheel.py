"""The wheel holds the whole package and works outside the repository."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from .conftest import REPOSITORY, Run

SOURCE = REPOSITORY / "src"


def test_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    files = {
        p.relative_to(SOURCE).as_posix()
        for p in (SOURCE / "deltatune").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert {"deltatune/py.typed", "deltatune/recipes/claims.tsv", "deltatune/recipes/systems.tsv"} <= files
    with zipfile.ZipFile(wheel) as archive:
        held = {n for n in archive.namelist() if n.startswith("deltatune/")}
        licences = [n for n in archive.namelist() if n.endswith("/licenses/LICENSE")]
    assert held == files
    assert len(licences) == 1


def test_package_is_the_installed_one(run: Run, installed: Path) -> None:
    done = run("python", "-c", "import deltatune; print(deltatune.__file__)")
    assert Path(done.stdout.strip()).is_relative_to(installed.parent), done.stdout + done.stderr


def test_help_of_the_installed_command(run: Run) -> None:
    done = run("deltatune", "--help")
    assert done.returncode == 0, done.stderr
    assert "reproduce" in done.stdout
    assert "Traceback" not in done.stderr


def test_ledger_of_the_installed_command(run: Run) -> None:
    done = run("deltatune", "reproduce", "--list", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == 36
    assert sum(len(row["claims"]) for row in rows) == 169
    assert {key for row in rows for key in row} == {"system", "source", "claims", "state"}
