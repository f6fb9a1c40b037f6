"""The pages are what the code says, and the commands in the README exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_generated_tables_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_command_of_the_readme_is_a_verb_with_those_options() -> None:
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"(?:^    |`)deltatune ([a-z]+)([^#\n`]*)", text, flags=re.MULTILINE)
    assert len(commands) >= 4
    for verb, rest in commands:
        shown = subprocess.run(
            [sys.executable, "-c", "import sys; from deltatune.cli import main; sys.exit(main())", verb, "--help"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert shown.returncode == 0, f"{verb}: {shown.stderr}"
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in shown.stdout, f"deltatune {verb} has no {option}"


def test_links_between_the_pages_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_files_that_a_page_names_exist(page: str) -> None:
    for name in re.findall(r"`((?:docs|benchmarks|[a-z]+)/[\w/]+\.(?:py|md|tsv))`", (ROOT / page).read_text()):
        assert (ROOT / name).exists() or (ROOT / "src" / "deltatune" / name).exists(), f"{page} names {name}"


def test_default_rates_are_the_measured_ones() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import learning_rates

    from deltatune.compose.expression import parse
    from deltatune.delta.catalogue import catalogue

    best = learning_rates.best_rates(learning_rates.measured())
    assert {name for name in best if "(" not in name} == set(catalogue())
    assert {name: parse(name).lr for name in best} == best
