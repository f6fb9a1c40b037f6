"""`deltatune check`: a method of one's own in under 50 lines passes; one that breaks a law is told which."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Run

GAIN = '''
"""A gain for each feature."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from deltatune.backbone.sites import Site
from deltatune.delta.layer import Layer, Params, constant
from deltatune.delta.method import Family, Method


class Gain(Method):
    """Scale the feed-forward's output: h <- g * h."""

    family: ClassVar[Family] = "addition"
    paper: ClassVar[str] = "none"
    rate: ClassVar[float] = 1e-2

    at: str = "ffn"

    def layer(self, site: Site, generator: torch.Generator) -> Layer:
        return GainLayer(site.d_out)


class GainLayer(Layer):
    """g * h."""

    reads_input: ClassVar[bool] = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = constant((width,), START)

    def forward(self, p: Params, x: Tensor | None, h: Tensor) -> Tensor:
        return h * p.gain
'''


def test_method_that_keeps_the_laws(run: Run, tmp_path: Path) -> None:
    source = GAIN.replace("START", "1.0")
    assert len(source.splitlines()) < 50
    (tmp_path / "gain.py").write_text(source)
    said = run("check gain.py --family bert --json")
    assert "unknown method 'gain'" in run("methods gain").mistake()  # it was not installed by that
    found = said.json()
    assert found["holds"] is True
    assert len(found["laws"]) > 15
    assert {(law["method"], law["backbone"], law["holds"], law["fault"]) for law in found["laws"]} == {
        ("gain", "bert", True, None)
    }


def test_method_that_breaks_one(run: Run, tmp_path: Path) -> None:
    (tmp_path / "gain.py").write_text(GAIN.replace("START", "1.5"))
    said = run("check gain.py --family bert")
    assert said.status == 2
    assert "identity_at_init" in said.out
    assert said.err.splitlines()[-1].startswith("error: gain breaks identity_at_init on bert: declared the identity")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x = (", "line 1: SyntaxError"),
        ("\nimport nowhere_at_all\n", "line 2: ModuleNotFoundError"),
        ("x = 1", "defines no method"),
        (GAIN.replace("START", "1.0").replace("Gain(", "LoRA("), "'lora' is taken by deltatune.methods"),
        (GAIN.replace('    paper: ClassVar[str] = "none"\n', ""), "Gain lacks paper"),
    ],
)
def test_file_that_is_no_method(run: Run, tmp_path: Path, source: str, said: str) -> None:
    (tmp_path / "mine.py").write_text(source)
    assert said in run("check mine.py").mistake()


def test_unknown_family(run: Run, tmp_path: Path) -> None:
    (tmp_path / "gain.py").write_text(GAIN.replace("START", "1.0"))
    assert "unknown family 'brt'; nearest: bert" in run("check gain.py --family brt").mistake()
