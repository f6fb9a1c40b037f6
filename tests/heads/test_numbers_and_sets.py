"""Numbers and sets of labels: from a file to a prediction, with the metrics held against scikit-learn."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.fit.tiny import QUICK, WORDS, backbone

from deltatune.compose.expression import parse
from deltatune.data.load import load_task
from deltatune.data.metrics import constant, majority, references, score
from deltatune.data.task import Task
from deltatune.delta.delta import Delta
from deltatune.errors import TaskError
from deltatune.heads.choose import head_for
from deltatune.heads.classification import MultiLabel
from deltatune.heads.regression import Regression
from deltatune.studies.verbs import run_plans
from deltatune.training.job import Plan


def write(folder: Path, kind: str, number: int = 90) -> Path:
    """Rows whose answer is the number of words of the first twenty, or which of three groups of words occur."""
    rng = random.Random(0)
    lines = []
    for _ in range(number):
        words = [rng.choice(WORDS) for _ in range(rng.randrange(4, 9))]
        groups = [words.count(word) for word in words]
        assert groups
        counts = [sum(word in WORDS[20 * i : 20 * i + 20] for word in words) for i in range(3)]
        row: dict[str, object] = {"text": " ".join(words)}
        if kind == "multi_label":
            row["labels"] = [name for name, count in zip("abc", counts, strict=True) if count]
        else:
            row["value"] = counts[0] + 0.25
        if kind == "pair_regression":
            row["text_b"] = rng.choice(WORDS)
        lines.append(json.dumps(row))
    file = folder / f"{kind}.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(params=["regression", "pair_regression", "multi_label"])
def task(request: pytest.FixtureRequest, tmp_path: Path) -> Task:
    return load_task(write(tmp_path, request.param))


def test_a_file_becomes_a_task_of_its_kind(task: Task) -> None:
    assert task.kind == task.name
    assert task.metric == ("micro_f1" if task.kind == "multi_label" else "pearson")
    assert task.labels == (("a", "b", "c") if task.kind == "multi_label" else ())
    assert len(task.train) > 60 and len(task.dev) == len(task.test) == 9
    guess = majority(task)
    gold = references(task.kind, task.test)
    assert 0 <= score(task.metric, constant(guess, task, task.test), gold, task.labels) < 1


def test_it_is_fitted_beside_its_baselines_and_saved_with_its_head(task: Task, tmp_path: Path) -> None:
    on = backbone()
    plans = [Plan(parse("lora"), task, 0, QUICK, "lora"), Plan(parse("bitfit"), task, 0, QUICK, "bitfit")]
    runs = run_plans(on, plans, out=tmp_path / "out")
    result = runs.results[0]
    assert {row["delta"] for row in result["summary"]} == {"lora", "bitfit", "head-only"}
    assert (tmp_path / "out" / "report.html").exists() or list((tmp_path / "out").rglob("report.html"))
    first = next(t for t in runs.trained if t.plan.label == "lora")
    assert first.test is not None and len(first.test.values) == len(task.test)
    folder = next((tmp_path / "out").rglob("delta.json")).parent
    again = Delta.load(str(folder), on)
    assert isinstance(again.head, MultiLabel if task.kind == "multi_label" else Regression)
    assert repr(again.head.arguments) == repr(head_for(task, on, 0).arguments)


def test_a_regression_learns_numbers_in_their_own_unit(tmp_path: Path) -> None:
    task = load_task(write(tmp_path, "regression"))
    on = backbone()
    head = head_for(task, on, 0)
    assert isinstance(head, Regression)
    values = [row["value"] for row in task.train]
    assert head.centre == pytest.approx(np.mean(values)) and head.spread == pytest.approx(np.std(values))
    made, sure = head.decode(torch.tensor([[0.0], [1.0]]), None)  # type: ignore[arg-type]
    assert made == pytest.approx([head.centre, head.centre + head.spread]) and sure == [1.0, 1.0]


def test_metrics_are_those_of_scikit_learn() -> None:
    from scipy.stats import spearmanr
    from sklearn.metrics import accuracy_score, f1_score, r2_score
    from sklearn.preprocessing import MultiLabelBinarizer

    rng = random.Random(0)
    gold = [sorted(rng.sample("abcd", rng.randrange(4))) for _ in range(50)]
    made = [sorted(rng.sample("abcd", rng.randrange(4))) for _ in range(50)]
    binary = MultiLabelBinarizer(classes=list("abcd"))
    y, p = binary.fit_transform(gold), binary.transform(made)
    for average in ("micro", "macro"):
        assert score(f"{average}_f1", made, gold) == pytest.approx(f1_score(y, p, average=average, zero_division=0))
    assert score("subset_accuracy", made, gold) == pytest.approx(accuracy_score(y, p))
    y, p = np.array([rng.random() for _ in range(40)]), np.array([rng.random() for _ in range(40)])
    assert score("pearson", list(p), list(y)) == pytest.approx(np.corrcoef(y, p)[0, 1])
    assert score("spearman", list(p), list(y)) == pytest.approx(spearmanr(y, p).statistic)
    assert score("r2", list(p), list(y)) == pytest.approx(r2_score(y, p))
    assert score("pearson", [1.0] * 40, list(y)) == score("spearman", [1.0] * 40, list(y)) == 0.0


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "a b", "value": "many"}] * 9, "value is 'many' .*; expected a number"),
        ([{"text": f"w{i}", "value": 2.0} for i in range(30)], "every value is 2; expected two different"),
        (
            [{"text": f"w{i}", "labels": ["a"]} for i in range(30)],
            "two different labels or more over all rows, got only 'a'",
        ),
    ],
)
def test_what_is_no_such_task_is_refused(rows: list[dict[str, object]], said: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    with pytest.raises(TaskError, match=said):
        load_task(file)


def test_columns_of_stars_are_labels_unless_numbers_are_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "reviews.csv"
    lines = [f"text number {i},{1 + i % 5}" for i in range(60)]
    file.write_text("review,stars\n" + "\n".join(lines) + "\n")
    assert load_task(file, columns={"text": "review", "label": "stars"}).kind == "classification"
    made = load_task(file, columns={"text": "review", "value": "stars"})
    assert made.kind == "regression" and {row["value"] for row in made.train} <= {1.0, 2.0, 3.0, 4.0, 5.0}
    tags = tmp_path / "tags.csv"
    tags.write_text("text,labels\n" + "\n".join(f"w{i},{'a; b' if i % 2 else 'b' if i % 3 else ''}" for i in range(60)))
    assert load_task(tags).labels == ("a", "b")
