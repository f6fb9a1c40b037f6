"""Tasks of images: folders, tables with paths, images inside the rows, and what they are told apart by."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.data.writing import write

import deltatune as dt
from deltatune.data.images import digest_of, inline, opened
from deltatune.errors import TaskError


def picture(path: Path, number: int) -> Path:
    """An image file that no other number has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def labelled(folder: Path, each: int = 12, first: int = 0) -> Path:
    """LABEL/IMAGE, for cats and dogs."""
    for n, label in enumerate(("cat", "dog")):
        for i in range(each):
            picture(folder / label / f"{i:02}.png", first + 100 * n + i)
    return folder


def test_a_folder_of_a_folder_for_each_label_is_cut_into_splits(tmp_path: Path) -> None:
    task = dt.task(labelled(tmp_path / "pets"))
    assert (task.name, task.kind, task.labels, task.metric) == (
        "pets", "image_classification", ("cat", "dog"), "accuracy",
    )  # fmt: skip
    rows = [*task.train, *task.dev, *task.test]
    assert len(rows) == 24 and len(task.dev) == len(task.test) == 3
    assert all(Path(row["image"]).parent.name == row["label"] and Path(row["image"]).is_file() for row in rows)


def test_splits_of_a_folder_are_kept(tmp_path: Path) -> None:
    for n, (split, each) in enumerate((("train", 5), ("valid", 2), ("test", 3))):
        labelled(tmp_path / split, each, 1000 * n)
    task = dt.task(tmp_path)
    assert [len(part) for part in (task.train, task.dev, task.test)] == [10, 4, 6]
    assert all("/valid/" in row["image"] for row in task.dev)


def test_paths_in_a_table_are_from_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labelled(tmp_path / "set" / "files")
    rows = [{"picture": f"files/{label}/{i:02}.png", "kind": label} for label in ("cat", "dog") for i in range(12)]
    table = write(tmp_path / "set", "pets", rows, ".csv")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        TaskError, match="give --columns label=kind,image=picture|give --columns image=picture,label=kind"
    ):
        dt.task(table)
    task = dt.task("set/pets.csv", image="picture", label="kind")
    assert task.kind == "image_classification" and len(task.train) == 18
    assert Path(task.train[0]["image"]) == Path("set/files") / Path(task.train[0]["image"]).relative_to("set/files")


def test_a_task_is_known_by_what_its_images_hold_and_not_by_where_they_lie(tmp_path: Path) -> None:
    first = dt.task(labelled(tmp_path / "a" / "pets"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert dt.task(tmp_path / "b" / "pets").fingerprint == first.fingerprint
    picture(tmp_path / "b" / "pets" / "cat" / "00.png", 999)
    digest_of.cache_clear()
    assert dt.task(tmp_path / "b" / "pets").fingerprint != first.fingerprint


def test_an_image_that_is_there_twice_is_in_one_split(tmp_path: Path) -> None:
    labelled(tmp_path)
    shutil.copy(tmp_path / "cat" / "00.png", tmp_path / "cat" / "copy.png")
    task = dt.task(tmp_path)
    assert "1 row that repeat an earlier row's input left out" in task.source
    assert len(task.train) + len(task.dev) + len(task.test) == 24


def test_images_may_stand_in_the_rows(tmp_path: Path) -> None:
    labelled(tmp_path / "files")
    rows = [
        {"image": {"bytes": path.read_bytes(), "path": path.name}, "label": path.parent.name}
        for path in sorted((tmp_path / "files").rglob("*.png"))
    ]
    task = dt.task(write(tmp_path, "pets", rows, ".parquet"))
    one = task.train[0]["image"]
    assert one.startswith("data:") and opened(one).size == (6, 6)
    assert {digest_of(row["image"]) for row in task.train} < {digest_of(str(p)) for p in tmp_path.rglob("*.png")}


def test_an_image_comes_back_from_a_row_as_it_was() -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    again = opened(inline(Image.fromarray(pixels)))
    assert again.mode == "L" and np.array_equal(np.asarray(again), pixels)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "files/cat/00.jpg"}, r"line 3: no image file '.*files/cat/00.jpg'; nearest: 00.png"),
        ({"image": ""}, "line 3 has no image"),
        ({"image": 3}, "line 3: image is of type int; expected the path of a file"),
    ],
)
def test_a_row_without_an_image_is_named(tmp_path: Path, row: dict[str, object], said: str) -> None:
    labelled(tmp_path / "files")
    rows = [{"image": "files/cat/00.png", "label": "cat"}, {"image": "files/dog/00.png", "label": "dog"}]
    with pytest.raises(TaskError, match=said):
        dt.task(write(tmp_path, "pets", [*rows, {**row, "label": "cat"}]))


def test_images_beside_the_folders_of_labels_are_refused(tmp_path: Path) -> None:
    labelled(tmp_path)
    picture(tmp_path / "lost.png", 7)
    with pytest.raises(TaskError, match="lost.png and 0 more images stand in no folder of a label"):
        dt.task(tmp_path)


def test_what_is_no_image_is_refused_when_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"text")
    with pytest.raises(TaskError, match="cannot be read as an image"):
        opened(str(tmp_path / "x.png"))
    cut = io.BytesIO()
    Image.fromarray(np.zeros((50, 50), dtype=np.uint8)).save(cut, format="PNG")
    (tmp_path / "y.png").write_bytes(cut.getvalue()[:60])
    with pytest.raises(TaskError, match="cannot be read as an image"):
        opened(str(tmp_path / "y.png"))


def test_a_template_is_for_text(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="images"):
        dt.task(labelled(tmp_path), template="{image}: ")


def test_the_embedded_digits_are_those_that_the_backbone_has_not_seen() -> None:
    task = dt.task("digits_5_9")
    assert [len(part) for part in (task.train, task.dev, task.test)] == [716, 90, 90]
    assert task.labels == ("5", "6", "7", "8", "9")
    image = opened(task.train[0]["image"])
    assert (image.size, image.mode) == ((8, 8), "L") and np.asarray(image).max() == 255
