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


def killed(folder: Path, seed: int, **attempts: int) -> dict[str, list[str]]:
    """Do kinds of work whole and killed: five times while a checkpoint is written, then at random; return the kills."""
    wanted = [f"{what}={number}" for what, number in attempts.items()]
    words = [sys.executable, "-m", "tests.fit.killed", str(folder), str(seed), *wanted]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kills: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return kills


def found(folder: Path):
    """What came out, after asserting that the killed work ended with the tensors, curves, scores of the whole one."""
    whole, again = folder / "whole", folder / "killed"
    said = json.loads((whole / "found.json").read_text())
    assert json.loads((again / "found.json").read_text()) == said
    assert same_bits(load_file(whole / "found.safetensors"), load_file(again / "found.safetensors"))
    return said


def files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(tmp_path):
    kills = killed(tmp_path, 0, fit=6, tune=3, verb=0)
    assert len(kills["fit"]) == 11 and len(kills["tune"]) == 8 and len(kills["verb"]) == 5
    assert sum("further" in kill and "no further" not in kill for kill in kills["fit"]) >= 2

    runs, _ = found(tmp_path / "fit")
    assert sorted(run[2] for run in runs.values()) == ["done", "done", "done", "done", "nan", "stopped"]

    _, (candidates, chosen, _) = found(tmp_path / "tune")
    assert [candidate[0] for candidate in candidates if candidate[-1] == "chosen"] == [chosen]

    # From its first write on the folder counts as an unfinished fit of ours, and nothing is left over in the end.
    found(tmp_path / "verb")
    assert files(tmp_path / "verb/whole/out") == files(tmp_path / "verb/killed/out")
    assert not [name for name in files(tmp_path / "verb/killed/out") if Path(name).name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_at_many_more_instants(seed, tmp_path):
    kills = killed(tmp_path, 10 + seed, fit=16, tune=16)
    assert all(len(some) == 21 for some in kills.values())
    for what in kills:
        found(tmp_path / what)
