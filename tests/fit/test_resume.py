"""Killed at any moment, a fit goes on and ends as one that was never killed, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.fit.tiny import same_bits

ROOT = Path(__file__).parents[2]


def killed(what: str, folder: Path, seed: int, attempts: int) -> list[str]:
    """Run the work whole and killed; return the kills."""
    words = [sys.executable, "-m", "tests.fit.killed", what, str(folder), str(seed), str(attempts)]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kills: list[str] = json.loads(done.stdout.splitlines()[-1])
    return kills


def assert_same(folder: Path) -> None:
    """Assert that both ended with the same tensors, curves, scores and predictions."""
    whole, again = folder / "whole", folder / "killed"
    assert json.loads((whole / "found.json").read_text()) == json.loads((again / "found.json").read_text())
    assert same_bits(load_file(whole / "found.safetensors"), load_file(again / "found.safetensors"))


def files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def test_a_fit(tmp_path):
    kills = killed("fit", tmp_path, 0, 6)
    assert len(kills) >= 8 and sum("further" in kill and "no further" not in kill for kill in kills) >= 2
    assert_same(tmp_path)
    runs, _ = json.loads((tmp_path / "whole/found.json").read_text())
    assert sorted(run[2] for run in runs.values()) == ["done", "done", "done", "done", "nan", "stopped"]


def test_what_lands_in_the_folder_of_a_verb(tmp_path):
    """From the first write on the folder counts as an unfinished fit of ours, and nothing is left behind in the end."""
    killed("verb", tmp_path, 1, 2)
    assert_same(tmp_path)
    assert files(tmp_path / "whole/out") == files(tmp_path / "killed/out")
    assert not [name for name in files(tmp_path / "killed/out") if Path(name).name.startswith(".")]


def test_a_search(tmp_path):
    kills = killed("tune", tmp_path, 2, 4)
    assert len(kills) >= 6
    assert_same(tmp_path)
    _, (candidates, chosen, _) = json.loads((tmp_path / "whole/found.json").read_text())
    assert chosen in [candidate[0] for candidate in candidates if candidate[-1] == "chosen"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("what", ["fit", "tune"])
def test_at_many_more_instants(what, seed, tmp_path):
    assert len(killed(what, tmp_path, 10 + seed, 16)) >= 12
    assert_same(tmp_path)
