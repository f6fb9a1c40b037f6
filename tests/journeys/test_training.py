"""Fitting lands where it should, goes on after an interruption, and leaves nothing half-written."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import deltatune.cli.progress as shown
import deltatune.training.checkpoint as checkpoint

from .conftest import Run

DELTA = {"delta.json", "delta.safetensors"}


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_one_run_lands_in_its_folder(run: Run, encoder: Path, named: Path, tmp_path: Path) -> None:
    line = f"fit --task {named} --delta lora --steps 2 --batch 4 --backbone {encoder} --out 'my run'"
    said = run(line)
    assert said.status == 0
    assert files(tmp_path / "my run") == DELTA | {"result.json", "runs.json", "report.html"}
    assert "deltatune predict 'my run' \"...\"" in said.out
    assert json.loads((tmp_path / "my run" / "result.json").read_text())["command"] == f"deltatune {line}"


def test_several_runs_land_in_a_tree(run: Run, encoder: Path, named: Path, reviews: Path, tmp_path: Path) -> None:
    copy = tmp_path / "other.csv"
    copy.write_text(named.read_text())
    line = f"fit --task {named} {copy} --delta lora 'adapter(m=2) | bitfit' --seeds 2 --steps 2 --batch 4"
    said = run(f"{line} --backbone {encoder} --out out --json")
    runs = said.json()["runs"]
    assert len(runs) == 8
    assert {(r["task"], r["delta"], r["seed"]) for r in runs} == {
        (task, delta, seed)
        for task in ("named", "other")
        for delta in ("lora", "adapter(m=2) | bitfit")
        for seed in (0, 1)
    }
    for one in runs:
        folder = tmp_path / one["saved"]
        assert folder.parent.parent.name == one["task"]
        assert folder.name == str(one["seed"])
        assert files(folder) == DELTA
    assert json.loads((tmp_path / "out" / "runs.json").read_text())["runs"] == runs
    assert (tmp_path / "out" / "other" / "report.html").is_file()
    assert run("report out --json").json() == {"written": ["out/named/report.html", "out/other/report.html"]}


def test_finished_run_is_not_written_over(run: Run, encoder: Path, named: Path, tmp_path: Path) -> None:
    line = f"fit --task {named} --delta lora --steps 2 --batch 4 --backbone {encoder} --out out"
    assert run(line).status == 0
    before = {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")}
    assert "out exists already" in run(line).mistake()
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")} == before


def test_nothing_is_saved_without_a_place(run: Run, encoder: Path, named: Path, tmp_path: Path) -> None:
    said = run(f"fit --task {named} --delta lora --steps 2 --batch 4 --backbone {encoder}")
    assert "Nothing was saved" in said.out
    assert list(tmp_path.iterdir()) == []


class TestInterrupted:
    """Ctrl-C in the middle of a fit."""

    @pytest.fixture
    def line(self, encoder: Path, named: Path) -> str:
        return f"fit --task {named} --delta lora --steps 12 --batch 4 --backbone {encoder}"

    @pytest.fixture
    def interrupted(self, run: Run, line: str, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Stop the fit at its seventh step, checkpoints being written at every evaluation."""
        monkeypatch.setattr(checkpoint, "EVERY", 0.0)
        heard = []

        def stop(self: Any, jobs: Any, event: str) -> None:
            heard.append(event)
            if len(heard) == 7:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(shown.Progress, "hear", stop)
            return run(f"{line} --out out")

    def test_says_how_to_go_on(self, interrupted: Any, line: str) -> None:
        assert (interrupted.status, interrupted.out) == (130, "")
        assert interrupted.err.splitlines()[-1] == f"interrupted; resume with: deltatune {line} --out out"

    def test_goes_on_and_ends_as_one_that_was_not_stopped(
        self, run: Run, interrupted: Any, line: str, tmp_path: Path
    ) -> None:
        assert (tmp_path / "out" / ".checkpoint").is_dir()
        resumed = run(f"{line} --out out --json")
        assert "step 12/12" in resumed.err
        assert "step 2/12" not in resumed.err
        whole = run(f"{line} --out whole --json")
        assert resumed.json()["runs"][0]["metrics"] == whole.json()["runs"][0]["metrics"]
        tensors = [(tmp_path / place / "delta.safetensors").read_bytes() for place in ("out", "whole")]
        assert tensors[0] == tensors[1]
        assert not (tmp_path / "out" / ".checkpoint").exists()

    def test_another_command_does_not_take_it_over(self, run: Run, interrupted: Any, line: str, tmp_path: Path) -> None:
        before = files(tmp_path / "out")
        assert "another --out" in run(f"{line} --out out --lr 0.5").mistake()
        assert files(tmp_path / "out") == before

    def test_without_a_place_it_starts_again(self, run: Run, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(shown.Progress, "hear", stop)
        said = run(line)
        assert said.status == 130
        assert f"nothing was saved; start again with: deltatune {line}" in said.err


LIMITED = """
import resource, signal, sys
from deltatune.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("size", [100, 12_000])
def test_full_disk(encoder: Path, named: Path, tmp_path: Path, size: int) -> None:
    """A file that cannot grow is what a full disk looks like: at the first file, and at a later one."""
    line = f"fit --task {named} --delta lora --steps 2 --batch 4 --backbone {encoder} --out out"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED.format(size=size), *shlex.split(line)],
        capture_output=True, text=True, cwd=tmp_path, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: cannot write "), done.stderr
    assert "Traceback" not in done.stderr
    left = files(tmp_path)
    assert not {name for name in left if name.startswith("out/delta.") or name.endswith("runs.json")}, left


def test_full_disk_under_predictions(run: Run, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    mistake = run(f"predict {lora} hello --out answers.csv").mistake()
    assert mistake == "error: cannot write answers.csv: No space left on device"
    assert list(tmp_path.iterdir()) == []
