"""The report as a text: well-formed, whole, self-contained, escaped, and a sentence for whatever is missing."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.studies.pages import Page
from tests.studies.sample_result import make_result

from deltatune.errors import OutputError, UserError
from deltatune.studies.report import render, write_report

Result = dict[str, Any]
KINDS = ["classification", "pair_classification", "token_classification", "generation"]
PARTS = [
    "decision", "accuracy", "curves", "cost", "tried", "failures", "confusion", "errors", "disagreements", "norms",
    "command",
]  # fmt: skip
CHOSEN, SECOND = "lora(r=8, at=attn.{q,v})", "adapter(d=64)"


@pytest.fixture(scope="module")
def sample() -> Result:
    return make_result(rows=120)


@pytest.fixture(scope="module")
def page(sample: Result) -> Page:
    return Page(render(sample))


def changed(change: Callable[[Result], object]) -> Result:
    result = make_result(rows=60)
    change(result)
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_is_there_and_the_page_is_well_formed(kind: str) -> None:
    page = Page(render(make_result(kind=kind, rows=80)))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(PARTS) <= set(ids)
    assert all(len(page.part(part)) > 20 for part in PARTS)
    targets = {anchor["href"].removeprefix("#") for anchor in page.all("a")}
    assert targets <= set(ids) and len(targets) == 7
    assert {label["for"] for label in page.all("label")} <= set(ids)
    assert {box["data-filter"] for box in page.all("input")} <= set(ids)


def test_the_decision_comes_first(page: Page, sample: Result) -> None:
    assert page.part("decision").index(sample["sentence"]) < page.part("decision").index("trained parameters")
    first_words = " ".join(page.text.split())
    assert first_words.index(sample["sentence"]) < first_words.index("Accuracy against parameters")


def test_scores_are_those_of_the_result(page: Page, sample: Result) -> None:
    for row in sample["summary"]:
        dev = row["dev"]
        assert f"{100 * dev['mean']:.1f} ± {50 * (dev['high'] - dev['low']):.1f}" in page.part("accuracy")
    drawn = next(svg["aria-label"] for svg in page.all("svg") if "aria-label" in svg)
    assert f"{CHOSEN}: dev {100 * sample['summary'][0]['dev']['mean']:.1f} ±" in drawn


def test_nothing_comes_from_outside(sample: Result) -> None:
    source = render(sample)
    assert "://" not in source
    assert "@import" not in source
    page = Page(source)
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            if name in attributes:
                assert attributes[name].startswith(("#", "data:")), (tag, attributes)
    assert re.findall(r"url\((?!#)", source) == []
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv"))
    assert policy.startswith("default-src 'none';") and "script-src 'sha256-" in policy


def test_drawings_keep_text_as_text_and_take_their_colours_from_the_page(sample: Result) -> None:
    source = render(sample)
    drawings = re.findall(r'<svg class="drawing".*?</svg>', source, flags=re.DOTALL)
    assert len(drawings) == 2 + 9
    for drawing in drawings:
        assert re.search(r'aria-label="[^"]{20,}"', drawing) and 'role="img"' in drawing
        assert "<text" in drawing and "var(--first)" in drawing + drawings[0]
        # A colour that is not a variable would not follow dark mode.
        assert re.findall(r"(?:fill|stroke): ?#[0-9a-f]+", drawing) == []
        assert "<style" not in drawing and "DejaVu" not in drawing
    assert f">{CHOSEN}</text>" in drawings[0] and "<title>" in drawings[0]


def test_a_dollar_sign_in_a_delta_is_no_formula() -> None:
    result = changed(lambda result: result["summary"][8].update(delta="full$x$"))
    assert render(result).count(">full$x$</text>") == 2


def test_the_page_is_as_wide_as_the_phone(page: Page) -> None:
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")


def test_the_page_is_the_same_for_the_same_result(sample: Result) -> None:
    assert render(sample) == render(copy.deepcopy(sample))


def test_what_users_wrote_is_escaped_everywhere() -> None:
    attack = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>$x$"
    names = [CHOSEN, SECOND, "bitfit", "negative", "reviews", "minilm", "The film", "best/", "deltatune",
             "attn.q", "bfloat16", "majority", "Take", "batch"]  # fmt: skip
    text = json.dumps(make_result(rows=60))
    for name in names:
        assert name in text
        text = text.replace(json.dumps(name)[1:-1], json.dumps(name + attack)[1:-1])
    result = json.loads(text)
    result["schema"] = "deltatune.result/1"
    page = Page(render(result))
    assert page.all("img") == []
    assert len(page.all("script")) == 1
    for part in PARTS:
        assert "<script>alert(1)</script>" in page.part(part), part
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def no_test(result: Result) -> None:
    for row in result["summary"]:
        row["test"] = None
    for run in result["runs"]:
        run["metrics"].pop("test", None)
    result["examples"] = []


def one_run(result: Result) -> None:
    result["runs"], result["summary"], result["candidates"] = result["runs"][:1], result["summary"][:1], []
    result["baselines"] = []
    result["summary"][0].update(seeds=1, dev={"mean": 0.9, "low": None, "high": None}, test=None)
    for example in result["examples"]:
        example["predictions"].pop(SECOND)


def nan_run(result: Result) -> None:
    run = result["runs"][1]
    run["state"] = "nan"
    run["metrics"] = {"dev": {"accuracy": math.nan}}
    for point in run["curve"][5:]:
        point["loss"] = point["dev"] = math.nan


def all_nan(result: Result) -> None:
    for run in result["runs"]:
        run.update(state="nan", metrics={"dev": {"accuracy": math.nan}})
        run["curve"] = [{"step": 0, "loss": math.nan, "dev": None, "lr": 1.0}]
    for row in result["summary"]:
        row.update(dev={"mean": math.nan, "low": None, "high": None}, test=None)
    result.update(chosen=None, examples=[])


def no_errors(result: Result) -> None:
    for example in result["examples"]:
        example["predictions"] = dict.fromkeys(example["predictions"], example["gold"])


def every(result: Result, what: str, key: str, value: object) -> None:
    for item in result[what]:
        item[key] = value


def strip(result: Result) -> None:
    result.update(runs=[], baselines=[], summary=[], candidates=[], chosen=None, examples=[])
    result["task"]["labels"] = []


DEGENERATE: list[tuple[str, Callable[[Result], object], dict[str, str]]] = [
    ("one run", one_run, {
        "accuracy": "One seed: there is no interval", "tried": "No search was made",
        "disagreements": "There is no second delta", "decision": "head-only was not trained beside it"}),
    ("one delta is said", one_run, {"accuracy": "nothing to compare it with"}),
    ("no baselines", one_run, {"accuracy": "No baseline without training was measured"}),
    ("no test", no_test, {
        "accuracy": "The test split was not opened", "decision": "test was not opened",
        "confusion": "no predictions on test rows were kept", "errors": "no predictions on test rows were kept",
        "disagreements": "No row has predictions of both"}),
    ("no curves", lambda result: every(result, "runs", "curve", []), {"curves": "No learning curve was recorded"}),
    ("no norms", lambda result: every(result, "runs", "norms", {}), {"norms": "No norms were recorded"}),
    ("one NaN run", nan_run, {"decision": "seed 1", "curves": "1 seed diverged"}),
    ("all NaN", all_nan, {
        "decision": "No delta has a score on dev", "accuracy": "There is no score to draw",
        "errors": "No errors to show"}),
    ("no errors", no_errors, {
        "errors": "No errors: all 60 rows are right", "confusion": "No row was given a wrong label",
        "disagreements": "They give the same answer on every row"}),
    ("no confidence", lambda result: every(result, "examples", "confidence", {}), {
        "errors": "no confidence was recorded"}),
    ("nothing chosen", lambda result: result.update(chosen=None), {"decision": "Nothing was chosen"}),
    ("empty", strip, {
        "decision": "No delta has a score", "accuracy": "There is no score", "curves": "No learning curve",
        "cost": "Nothing was trained", "tried": "No search", "confusion": "There is no confusion matrix",
        "errors": "No errors to show", "disagreements": "There is no second delta", "norms": "No norms"}),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), [case[1:] for case in DEGENERATE], ids=[case[0] for case in DEGENERATE])
def test_what_is_missing_is_said(change: Callable[[Result], object], said: dict[str, str], page: Page) -> None:
    whole, page = page, Page(render(changed(change)))
    for part in PARTS:
        assert page.part(part)
    for part, sentence in said.items():
        assert sentence in page.part(part)
        assert sentence not in whole.part(part), "the sentence must appear only when it is true"


@pytest.mark.parametrize("free", [0, 1])
def test_a_delta_without_parameters_and_rows_of_no_cost_are_drawn_or_named(free: int) -> None:
    def change(result: Result) -> None:
        for row in result["summary"]:
            row.update(trainable=row["trainable"] * free, seconds=0.0, bytes=0)

    page = Page(render(changed(change)))
    assert ("There is no score to draw" in page.part("accuracy")) == (not free)


def test_a_long_label_set_shows_the_twelve_most_confused_and_says_so() -> None:
    result = make_result(labels=150, rows=600)
    for example in result["examples"][:9]:
        example["gold"], example["predictions"][CHOSEN] = "change_card", "cancel_card"
    page = Page(render(result))
    assert "The 12 most confused of 150 labels are shown" in page.part("confusion")
    assert "change_card taken for cancel_card, 9 times" in page.part("confusion")


def test_many_errors_are_counted_and_cut() -> None:
    def change(result: Result) -> None:
        for row, example in enumerate(result["examples"]):
            example["predictions"][CHOSEN] = "positive" if example["gold"] == "negative" else "negative"
            example["input"] = f"needle{row} " + "long " * 1000

    result = make_result(rows=150)
    change(result)
    page = Page(render(result))
    assert "150 errors in 150 rows" in page.part("errors")
    assert "92 more (the first 100 of 150 errors)" in page.part("errors")
    assert len(re.findall(r"needle\d+", page.part("error-list"))) == 100
    assert "long long…" in page.part("errors")


def test_generation_shows_examples_instead_of_a_confusion_matrix() -> None:
    page = Page(render(make_result(kind="generation", rows=40)))
    assert "has no confusion matrix" in page.part("confusion")
    assert page.part("confusion").count("gold:") == 5


def test_tags_of_another_length_fall_back_to_text() -> None:
    result = make_result(kind="token_classification", rows=40)
    for example in result["examples"]:
        example["predictions"][CHOSEN] = "O"
    page = Page(render(result))
    assert "40 errors in 40 rows" in page.part("errors")
    assert "There is no confusion matrix" in page.part("confusion")


def test_many_blocks_go_down_the_page() -> None:
    result = make_result(rows=20)
    result["runs"][0]["norms"] = {f"decoder.{block}.attn.q": block + 1.0 for block in range(32)}
    page = Page(render(result))
    assert "block attn.q 0 1.00 1 2.00 2 3.00" in page.part("norms")


def test_write_report_replaces_and_leaves_nothing_else(tmp_path: Path, sample: Result) -> None:
    path = tmp_path / "new" / "report.html"
    assert write_report(sample, path) == path
    first = path.read_bytes()
    write_report(sample, path)
    assert path.read_bytes() == first
    assert [item.name for item in path.parent.iterdir()] == ["report.html"]
    assert first.decode("utf-8").startswith("<!doctype html>")


def test_a_full_disk_keeps_the_old_report(tmp_path: Path, sample: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"cannot write the report .*report.html: No space left on device"):
        write_report(sample, path)
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["report.html"]


def test_a_path_that_cannot_be_a_file_is_refused(tmp_path: Path, sample: Result) -> None:
    with pytest.raises(OutputError, match="is a folder; give a file"):
        write_report(sample, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write the report"):
        write_report(sample, tmp_path / "file" / "report.html")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda result: result.update(schema="deltatune.result/9"), "got schema 'deltatune.result/9', expected"),
        (lambda result: result.pop("sentence"), "at sentence: Field required"),
        (lambda result: result["runs"][3].update(seed="three"), r"at runs\.3\.seed: .*got 'three'"),
        (lambda result: result["task"].update(kind="riddle"), r"at task\.kind: "),
    ],
)
def test_a_result_that_does_not_fit_is_refused_in_one_line(change: Callable[[Result], object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        render(changed(change))
    assert "\n" not in str(caught.value)


def test_something_that_is_no_result_is_refused() -> None:
    with pytest.raises(UserError, match="got schema 'list'"):
        render([1, 2])  # type: ignore[arg-type]
