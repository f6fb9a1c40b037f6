"""Every verb explains itself, with an example that its own parser takes."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest
from typer.main import get_command

import deltatune
from deltatune.cli.app import app

from .conftest import Run

VERBS = [
    *(
        "demo",
        "tune",
        "fit",
        "predict",
        "eval",
        "compare",
        "sites",
        "methods",
        "inspect",
        "doctor",
        "merge",
        "export",
        "import",
        "push",
        "pull",
        "check",
        "report",
    ),
    "reproduce",
]


def test_all_verbs_are_there() -> None:
    assert list(get_command(app).commands) == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example(run: Run, verb: str) -> None:
    said = run(f"{verb} --help")
    assert (said.status, said.err) == (0, "")
    after = said.out.split("Example:")[1]
    assert after.split("\n")[1].strip().startswith(f"deltatune {verb}")


@pytest.mark.parametrize("verb", VERBS)
def test_examples_parse(verb: str) -> None:
    name = f"{verb}_" if verb == "import" else verb
    module = __import__(f"deltatune.cli.{name}", fromlist=["EXAMPLE"])
    command = get_command(app).commands[verb]
    for line in module.EXAMPLE.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        assert words[:2] == ["deltatune", verb]
        command.make_context(verb, words[2:])  # raises for an unknown option or a missing value


def test_no_verb_shows_the_verbs(run: Run) -> None:
    said = run("")
    assert said.status == 0
    assert all(verb in said.out for verb in VERBS)


def test_version(run: Run) -> None:
    assert run("--version").out == f"deltatune {deltatune.__version__}\n"


def test_help_loads_nothing_heavy() -> None:
    probe = (
        "import sys; from deltatune.cli import main; status = main(['fit', '--help']); "
        "sys.exit(status or 'torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [("deltatune si", "sites"), ("deltatune sites min", "minilm"), ("deltatune fit --del", "--delta")],
)
def test_completion(typed: str, wanted: str) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1), "_DELTATUNE_COMPLETE": "complete_bash"}
    command = [sys.executable, "-c", "from deltatune.cli import main; main()"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **words}, check=False)
    assert wanted in done.stdout.split()
