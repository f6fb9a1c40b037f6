"""A fault of this program is a short line and exit status 1; where it happened is shown when asked for."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

import deltatune.backbone.load as loading
import deltatune.recipes.ledger as ledger

from .conftest import Run


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("no such\nthing")

    monkeypatch.setattr(loading, "load", fail)


@pytest.mark.usefixtures("broken")
def test_fault_is_one_line(run: Run) -> None:
    said = run("sites minilm --json")
    assert (said.status, said.out) == (1, "")
    (line,) = said.err.splitlines()
    assert line.startswith("this is a bug in deltatune: KeyError: ")
    assert line.endswith("see where with: deltatune --traceback sites minilm --json")


@pytest.mark.usefixtures("broken")
def test_traceback_when_asked_for(run: Run) -> None:
    said = run("--traceback sites minilm")
    assert said.status == 1
    assert "Traceback (most recent call last)" in said.err
    assert 'raise KeyError("no such' in said.err


def test_place_that_may_not_be_read_is_no_fault(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "/secret")

    monkeypatch.setattr(ledger, "load_systems", refuse)
    assert run("reproduce --list").mistake() == "error: /secret: Permission denied"


def test_interrupted_verb_says_how_to_start_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ledger, "load_systems", stop)
    said = run("reproduce --list")
    assert (said.status, said.out) == (130, "")
    assert said.err == "interrupted; start again with: deltatune reproduce --list\n"


def test_reader_that_goes_away_is_no_fault() -> None:
    line = f"{sys.executable} -c 'import sys; from deltatune.cli import main; sys.exit(main())' reproduce --list --json"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line} | head -c 10"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout) == 10


def test_exit_status_reaches_the_shell() -> None:
    code = "import sys; from deltatune.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, "sitse"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: unknown verb 'sitse'")
