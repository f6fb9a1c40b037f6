"""Progress: a row for each delta on a terminal, a line for each evaluation elsewhere."""

from __future__ import annotations

import io
import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from deltatune.cli.progress import Progress, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def job(label: str, seed: int = 0, task: str = "reviews", steps: int = 10, **more: Any) -> Any:
    plan = SimpleNamespace(task=SimpleNamespace(name=task), label=label, spec=label, seed=seed)
    fields = dict(
        step=0, steps=steps, losses=[], curve=[], best_dev=None, seconds=0.0, tokens=0, state="running", active=True
    )
    return SimpleNamespace(plan=plan, **{**fields, **more})


def stepped(jobs: list[Any], loss: float) -> None:
    for one in jobs:
        one.step += 1
        one.losses.append(loss)
        one.seconds += 0.5
        one.tokens += 100


def test_plain_lines() -> None:
    file, clock = io.StringIO(), Clock()
    shown = Progress(file, clock)
    jobs = [job("lora"), job("lora", 1), job("bitfit")]
    for step in range(1, 5):
        clock.now += 2
        stepped(jobs, 1 / step)
        if step == 4:
            for one, dev in zip(jobs, (0.7, 0.9, 0.6), strict=True):
                one.best_dev, one.curve = dev, [SimpleNamespace(loss=0.5, dev=dev)]
        shown.hear(jobs, "evaluated" if step == 4 else "step")
    shown.close()
    first, second = file.getvalue().splitlines()  # the first step, and the evaluation
    assert first == "step 1/10, 3 of 3 trainings going, loss 1.000, 200 tokens/s"
    # Three rounds in 6 s, six to go.
    assert second == (
        "step 4/10, 3 of 3 trainings going, loss 0.521, best dev 0.800 (lora), 200 tokens/s, about 12 s left"
    )


def test_table_has_a_row_for_each_delta() -> None:
    file, clock = Terminal(), Clock()
    shown = Progress(file, clock)
    jobs = [job("lora"), job("lora", 1), job("bitfit", steps=4, state="nan", active=False)]
    shown.hear(jobs, "step")
    clock.now = 4.0
    stepped(jobs[:2], 0.25)
    table = shown.table()
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["lora", "bitfit"]
    assert cells[1] == ["2", "1"]
    assert cells[2] == ["1/10", "0/4"]
    assert cells[3] == ["0.250", "–"]
    assert cells[-1] == ["36 s left", "1 diverged"]
    shown.close()
    assert "bitfit" in file.getvalue()


def test_several_tasks_are_told_apart() -> None:
    shown = Progress(io.StringIO(), Clock())
    shown.hear([job("lora", task="a"), job("lora", task="b")], "step")
    assert list(shown.groups()) == ["a: lora", "b: lora"]


def test_drawn_at_most_four_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    shown = Progress(Terminal(), clock)
    drawn: list[float] = []
    monkeypatch.setattr(Progress, "_draw", lambda self, now: (drawn.append(now), setattr(self, "_drawn", now)))
    jobs = [job("lora")]
    for _ in range(100):
        clock.now += 0.02
        shown.hear(jobs, "step")
    assert 7 <= len(drawn) <= 9
    assert min(after - before for before, after in itertools.pairwise(drawn)) >= 0.25


def test_resumed_fit_does_not_count_what_was_done_before() -> None:
    file, clock = io.StringIO(), Clock()
    shown = Progress(file, clock)
    one = job("lora", step=6)
    shown.hear([one], "step")
    clock.now = 3.0
    one.step = 8
    assert shown.left() == pytest.approx(3.0)  # two steps in 3 s, two to go


def test_terminal_is_given_back_after_a_fault() -> None:
    file = Terminal()

    def fail() -> None:
        with progress(file) as listener:
            listener([job("lora")], "step")
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert file.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is shown again
