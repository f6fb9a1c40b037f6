"""What a script or a notebook gets from the verbs: one line in, a sentence, a table and a delta out."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from tests.fit.tiny import backbone, task

import deltatune as dt
from deltatune.errors import UnknownName

QUICK = {"steps": 6, "batch": 4, "evaluations": 2, "precision": "float32", "max_length": 32}


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """A file as people have them: columns of their own names, one of them of no use."""
    file = tmp_path / "reviews.csv"
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "review", "stars"])
        writer.writerows(
            [i, row["text"], row["label"]] for i, row in enumerate([*task().train, *task().dev, *task().test])
        )
    return file


def test_fit_says_mean_and_interval_and_gives_the_delta(
    reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on, data = backbone(), dt.task(reviews, text="review", label="stars")
    runs = dt.fit(on, dt.LoRA(r=2, at="attn.{q,v}"), data, seeds=3, **QUICK)
    said = capsys.readouterr().out
    (result,) = runs.results
    test = result["summary"][0]["test"]
    spread = f"({100 * test['mean']:.1f} % accuracy on test (95 % interval {100 * test['low']:.1f} to {100 * test['high']:.1f}"
    assert spread[1:] in said and "over 3 seeds" in said and "head-only" in said
    page = runs._repr_html_()
    assert page.count("<tr>") == 1 + len(result["summary"]) and f"{100 * test['mean']:.1f} ± " in page
    assert "LoRA" in page or "lora" in page
    runs.delta.save(str(tmp_path / "out"))
    loaded = dt.Delta.load(str(tmp_path / "out"), on)
    inputs = dict(on.processor("w1 w2", return_tensors="pt"))
    with torch.no_grad(), dt.adapt(on, loaded) as adapted:
        one = adapted(**inputs).last_hidden_state
    with torch.no_grad(), dt.adapt(on, runs.delta) as adapted:
        assert torch.equal(one, adapted(**inputs).last_hidden_state)


def test_fit_many_trains_pairs_together_and_tells_each(capsys: pytest.CaptureFixture[str]) -> None:
    pair = task("pair_classification")
    runs = dt.fit_many(backbone(), [("lora(r=2)", task()), (dt.BitFit() | dt.Adapter(m=4), pair)], **QUICK)
    said = capsys.readouterr().out.strip().splitlines()
    assert [r["task"]["name"] for r in runs.results] == ["classification", "pair_classification"]
    assert len(said) == 2 and said[0].startswith("Take lora(r=2): ") and len(runs.trained) == 2


def test_tune_gives_candidates_a_choice_and_a_delta() -> None:
    runs = dt.tune(backbone(), task(), budget="150steps", seeds=1, batch=4, precision="float32")
    assert runs.json()["chosen"] == runs.results[0]["chosen"] and len(runs.json()["candidates"]) >= 7
    assert repr(runs).startswith(f"Take {runs.json()['chosen']}: ") and "over 12 test rows; one seed)" in repr(runs)
    assert runs.delta is runs.best.delta and "<table>" in runs._repr_html_()


def test_names_are_escaped_in_a_notebook() -> None:
    runs = dt.fit_many(backbone(), [("lora", task())], **QUICK)
    runs.results[0]["summary"][0]["delta"] = "<b>x</b>"
    runs.results[0]["sentence"] = "a < b"
    assert "<b>x" not in runs._repr_html_() and "a &lt; b" in runs._repr_html_()


def test_an_unknown_setting_is_named_with_its_nearest() -> None:
    with pytest.raises(UnknownName, match="unknown setting 'batchsize'; nearest: batch"):
        dt.fit(backbone(), "lora", task(), batchsize=4)
