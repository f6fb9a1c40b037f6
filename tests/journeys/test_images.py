"""From a folder of images to answers, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.data.test_images import labelled
from tests.heads.picture_models import saved
from tests.journeys.conftest import Run
from transformers import pipeline

FIT = "fit --backbone vit --task pets --delta lora --steps 4 --batch 4 --out out --json"


@pytest.fixture
def fitted(run: Run, tmp_path: Path) -> Path:
    saved(tmp_path / "vit", "vit")
    labelled(tmp_path / "pets")
    assert run(FIT).json()["runs"][0]["saved"] == "out"
    return tmp_path


def test_a_folder_of_images_is_fitted_predicted_scored_and_merged(fitted: Path, run: Run) -> None:
    files = sorted((fitted / "pets").rglob("0[0-3].png"))
    said = run("predict out --json", *files).json()["predictions"]
    assert [row["image"] for row in said] == [str(file) for file in files]
    assert {row["label"] for row in said} <= {"cat", "dog"}
    assert all(0.5 <= row["confidence"] <= 1 for row in said)
    (fitted / "files.jsonl").write_text(
        "".join(json.dumps({"image": f"pets/{f.parent.name}/{f.name}"}) + "\n" for f in files)
    )
    again = run("predict out files.jsonl --json").json()["predictions"]
    assert [row["label"] for row in again] == [row["label"] for row in said]
    scored = run("eval out --task pets --json").json()
    assert scored["rows"] == 3 and 0 <= scored["score"]["value"] <= 1
    assert run("doctor out --json").status == 0
    assert "image-classification" in run("merge out --out merged --json").json()["use"]
    answers = pipeline("image-classification", model="merged")([str(file) for file in files])
    assert [answer[0]["label"] for answer in answers] == [row["label"] for row in said]


def test_mistakes_with_images_say_what_to_do(fitted: Path, run: Run) -> None:
    assert "image 1: no image file 'cat/00.png'" in run("predict out cat/00.png").mistake()
    (fitted / "x.png").write_bytes(b"no image")
    assert "cannot be read as an image" in run("predict out x.png").mistake()
    saying = run("fit --backbone vit --task stdlib_pair --delta lora --out other").mistake()
    assert "task stdlib_pair has text, vit reads images" in saying
