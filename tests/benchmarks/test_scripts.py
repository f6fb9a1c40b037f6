"""Every script of benchmarks/ runs to its end on little, goes on where it was stopped, and says what it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.fit.tiny import task

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LITTLE = {
    "r1_train_together": (
        "--rounds", "2", "--steps", "1", "--tasks", "3", "--length", "24", "--gate-steps", "2", "--cells", "1",
        "--settings", "2,three methods",
    ),
    "r3_serve_together": ("--rounds", "2", "--models", "toy", "--k", "2"),
    "equivalence": ("--seeds", "2", "--tasks", "1", "--rows", "32", "--test", "30", "--epochs", "1", "--evaluations", "1"),
}  # fmt: skip


def run(name: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(BENCHMARKS / f"{name}.py"),
        "--results",
        str(folder),
        "--page",
        str(folder / "page.md"),
    ]
    # On the embedded tasks, as on a machine that has no others.
    environment = {**os.environ, "DELTATUNE_TASKS": str(folder / "none"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=280, env=environment, check=False
    )


@pytest.mark.parametrize("name", LITTLE)
def test_a_script_measures_stores_and_tells(name: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("# Page\n\nSaid before.\n")
    first = run(name, tmp_path, *LITTLE[name])
    assert first.returncode == 0, first.stderr[-2000:]
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert result["name"] == name and isinstance(result["gate"]["passed"], bool)
    # Both sides of a speed compute the same, on little, too; whether scores differ, two short trainings do not tell.
    assert result["gate"]["passed"] or name == "equivalence"
    assert {"over_default", "over_tuned", "over_limit", "factors"} <= set(result)
    page = (tmp_path / "page.md").read_text()
    assert (
        page.startswith("# Page\n\nSaid before.\n") and f"written by benchmarks/{name}.py" in page and "| ---" in page
    )
    stored = (tmp_path / f"{name}.rows.jsonl").read_text()
    again = run(name, tmp_path, *LITTLE[name])
    assert again.returncode == 0, again.stderr[-2000:]
    # Nothing is measured twice, and the same rows give the same page.
    assert (tmp_path / f"{name}.rows.jsonl").read_text() == stored
    assert (tmp_path / "page.md").read_text() == page


def test_kinds_are_measured_once_and_told(tmp_path: Path) -> None:
    folder = tmp_path / "tasks" / "xquad_en"
    folder.mkdir(parents=True)
    made = task("extractive_span")
    for split in ("train", "dev", "test"):
        rows = [
            {
                **row,
                "context": f"Before this. {row['context']}. After it.",
                "answers": [answer["text"] for answer in row["answers"]],
            }
            for row in getattr(made, split)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--data", str(tmp_path / "tasks"), "--kinds", "span", "--limits", "16", "8", "12")
    first = run("kinds", tmp_path, *options)
    assert first.returncode == 0, first.stderr[-2000:]
    stored = (tmp_path / "kinds.rows.jsonl").read_text()
    sides = json.loads((tmp_path / "kinds.json").read_text())["kinds"]["span"]["sides"]
    assert list(sides) == ["constant", "head", "a third", "default", "three times"] and len(stored.splitlines()) == 5
    for what, side in sides.items():
        low, mean, high = (side["test"][name] for name in ("low", "mean", "high"))
        assert low <= mean <= high and (what in ("constant", "head") or side["gain"]["mean"] is not None)
    told = (tmp_path / "page.md").read_text()
    again = run("kinds", tmp_path, *options)
    assert again.returncode == 0, again.stderr[-2000:]
    assert (tmp_path / "kinds.rows.jsonl").read_text() == stored and (tmp_path / "page.md").read_text() == told


@pytest.mark.slow
def test_tune_beside_peft_runs(tmp_path: Path) -> None:
    options = ("--seconds", "25", "--repeats", "1", "--rows", "100", "--test", "40", "--resamples", "50")
    done = run("tune_against_peft", tmp_path, *options, "--tasks", "stdlib_pair")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "tune_against_peft.json").read_text())
    assert result["tasks"]["stdlib_pair"]["verdict"] in ("won", "tied", "lost")
