"""What a notebook shows, and the notebook of the docs run as a reader would run it."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.fit.tiny import QUICK, backbone, task

import deltatune as dt

NOTEBOOK = Path(__file__).parents[2] / "docs" / "start.ipynb"


class Cells(HTMLParser):
    """The texts of a piece of HTML; every tag that opens closes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_models_deltas_and_runs_show_what_they_are() -> None:
    on = backbone("bert")
    delta = dt.Delta.build(dt.parse("lora(r=2) | prompt(n=3)"), on, name="a < b")
    assert "tiny-bert" in Cells(on._repr_html_()).texts
    shown = Cells(delta._repr_html_()).texts
    assert {"a < b", "lora(r=2) | prompt(n=3)", "tiny-bert"} <= {*shown}
    adapted = dt.Adapted(on, [delta])
    assert {"tiny-bert", "a < b", f"{delta.trainable():,}"} <= {*Cells(adapted._repr_html_()).texts}
    runs = dt.fit(on, "bitfit", task(), steps=2, precision=QUICK.precision)
    assert runs.results[0]["sentence"] in " ".join(Cells(runs._repr_html_()).texts)
    assert "test accuracy" in Cells(runs.delta._repr_html_()).texts


@pytest.mark.timeout(600)
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not committed"
    monkeypatch.chdir(tmp_path)
    done = NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    shown = [out for cell in done.cells for out in cell.get("outputs", ())]
    assert sum("text/html" in out.get("data", {}) for out in shown) >= 3
    assert (tmp_path / "best" / "delta.json").is_file()
