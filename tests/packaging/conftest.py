"""The wheel, built once and installed into a clean environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
CLEAN = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from a copy, so that neither an old `build/` nor a concurrent test reaches the wheel."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(REPOSITORY / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(source / "dist"),
        str(source),
    ]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return next((source / "dist").glob("deltatune-*.whl"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the commands of a clean environment that holds the wheel.

    The dependencies are those of this environment, through a .pth file: a path line there adds its folder but does not
    run the .pth files inside it, so the editable install of this repository stays out of sight.
    """
    home = tmp_path_factory.mktemp("clean")
    venv.create(home, with_pip=False)
    base = {"base": str(home), "platbase": str(home)}
    site, scripts = (Path(sysconfig.get_path(kind, "venv", base)) for kind in ("purelib", "scripts"))
    command = [sys.executable, "-m", "pip", "--python", str(scripts / "python"), "install", "--no-deps", "--no-index"]
    done = subprocess.run([*command, str(wheel)], capture_output=True, text=True, env=CLEAN, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # Only now: pip would see the editable install through it and find nothing to do.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Run:
    """Return `run(command, *arguments)`: runs a command of the clean environment in an empty folder."""

    def run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        line = [installed / command, *arguments]
        return subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=CLEAN, check=False)

    return run
