"""Every kind of task takes the whole way: fit, predict texts and a file, eval, compare, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import BAD, GOOD, THINGS, Run, rows, write_csv, write_jsonl


def content(kind: str) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for i, row in enumerate(rows()):
        text, words = row["review"], row["review"].split()
        right = GOOD[i // 2 % 2] if i % 2 else BAD[i // 2 % 2]
        made.append(
            {
                "multi_label": {"text": text, "labels": f"{words[1]}; {row['stars']}"},
                "regression": {"text": text, "value": i % 7 + 0.5},
                "pair_regression": {"text": text, "text_b": words[-1], "value": i % 7},
                "multiple_choice": {"text": text, "choices": f"{right} | {THINGS[i % 6]} | the", "label": 0},
                "extractive_span": {"context": text, "question": "is", "answers": words[-1]},
            }[kind]
        )
    return made


TEXTS = {
    "multi_label": ["the film is great"],
    "regression": ["the film is great"],
    "pair_regression": ["the film is great", "great"],
    "multiple_choice": ["the film is great", "great", "awful"],
    "extractive_span": ["the film is great", "is"],
}
ANSWER = {
    "multi_label": "labels",
    "regression": "value",
    "pair_regression": "value",
    "multiple_choice": "label",
    "extractive_span": "answer",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_kind_takes_the_whole_way(kind: str, run: Run, encoder: Path, tmp_path: Path) -> None:
    file = write_csv(tmp_path / "task.csv", content(kind))
    said = run(f"fit --task {file} --delta lora bitfit --steps 4 --batch 8 --backbone {encoder} --out out")
    assert said.status == 0, said.err
    result = json.loads(Path("out/result.json").read_text())
    assert result["task"]["kind"] == kind and len(result["examples"]) == result["task"]["rows"]["test"]
    lora, bitfit = "out/task/lora/0", "out/task/bitfit/0"
    (one,) = run(f"predict {lora} --json", *TEXTS[kind]).json()["predictions"]
    answer = one[ANSWER[kind]]
    types = {"multi_label": list, "multiple_choice": int, "extractive_span": str}
    assert isinstance(answer, types.get(kind, float))
    if kind == "extractive_span":
        assert answer in TEXTS[kind][0]
    assert (one["confidence"] is None) == ("regression" in kind)
    shown = run(f"predict {lora}", *TEXTS[kind]).out
    assert TEXTS[kind][0] in shown
    assert kind != "multiple_choice" or f"({answer}) {TEXTS[kind][1 + answer]}" in shown
    assert len(run(f"predict {lora} {file} --json").json()["predictions"]) == 60
    assert run(f"predict {lora} {file} --out answers.csv").status == 0
    found = run(f"eval {lora} --task {file} --json").json()
    recorded = json.loads((tmp_path / lora / "delta.json").read_text())["record"]["metrics"]["test"]
    assert recorded == {found["metric"]: pytest.approx(found["score"]["value"], abs=1e-5)}
    assert run(f"eval {lora} --task {file}").status == 0
    compared = run(f"compare {lora} {bitfit} --task {file} --json").json()
    counts = compared["disagreement"]
    assert sum(counts[key] for key in ("both_right", "only_a_right", "only_b_right", "both_wrong")) == compared["rows"]
    assert all(one["a"] != one["b"] for one in compared["examples"])
    before = Path("out/report.html").read_text()
    assert run("report out").status == 0
    assert "<html" in before and kind.replace("_", " ") in Path("out/report.html").read_text()


def test_rows_and_classes_may_weigh(run: Run, encoder: Path, tmp_path: Path) -> None:
    file = write_csv(tmp_path / "task.csv", [{**row, "w": str(i % 3)} for i, row in enumerate(rows())])
    line = f"fit --task {file} --delta head --steps 2 --backbone {encoder} --json"
    columns = "--columns text=review,label=stars"
    found = [
        run(f"{line} {columns}{more}").json()["runs"][0]
        for more in ("", ",weight=w", " --class-weights pos=9,neg=1", " --class-weights balanced")
    ]
    assert len({one["curve"][0]["loss"] for one in found[:3]}) == 3
    assert [one["settings"]["class_weights"] for one in found] == [None, None, {"pos": 9.0, "neg": 1.0}, "balanced"]
    # As many are good as bad.
    assert found[3]["curve"][0]["loss"] == pytest.approx(found[0]["curve"][0]["loss"], rel=0.05)
    for weights, said in (
        ("pos=much", "got 'pos=much', expected LABEL=WEIGHT"),
        ("poss=2", "unknown label 'poss'; nearest: pos"),
        ("even", "unknown class_weights 'even'; valid: balanced"),
        ("pos=-1", "'pos' has -1.0; expected 0 or more"),
    ):
        assert said in run(f"{line} {columns} --class-weights {weights}").mistake()


@pytest.mark.parametrize(
    ("kind", "texts", "said"),
    [
        ("multiple_choice", ["the film", "great"], "got 2 texts, expected one and two choices or more"),
        ("extractive_span", ["the film"], "got 1 texts, expected a context and its question"),
    ],
)
def test_texts_that_do_not_make_a_row_are_refused(
    kind: str, texts: list[str], said: str, run: Run, encoder: Path, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "task.jsonl", content(kind))
    assert run(f"fit --task {file} --delta head --steps 1 --backbone {encoder} --out out").status == 0
    assert said in run("predict out", *texts).mistake()
