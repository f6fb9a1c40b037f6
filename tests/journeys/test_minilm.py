"""The walk on the real MiniLM: fit, look, predict, score, compare, tune."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Run

pytestmark = pytest.mark.slow


def test_walk(run: Run, reviews: Path) -> None:
    columns = "--columns text=review,label=stars"
    line = f"fit --task {reviews} {columns} --delta lora 'adapter | bitfit' --steps 10 --batch 8 --out out"
    said = run(line)
    assert said.status == 0, said.err
    assert "step 1/10" in said.err
    lora, both = "out/reviews/lora/0", "out/reviews/adapter-bitfit/0"
    found = run(f"predict {lora} --json", "the film number 3 is great", "the phone number 8 is broken").json()[
        "predictions"
    ]
    assert [one["label"] for one in found] == ["pos", "neg"]
    score = run(f"eval {lora} --task {reviews} {columns} --json").json()
    assert score["score"]["value"] > score["majority"]
    assert run(f"compare {lora} {both} --task {reviews} {columns} --json").json()["better"] is None
    assert run(f"doctor {lora} --json").json()["healthy"]
    assert run(f"inspect {both} --json").json()["trainable"] == 226_080 + 25_728


def test_demo_on_ones_own_file(run: Run, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole page, shortened: two deltas, one seed, and no language model."""
    import deltatune.studies.demo as page
    from deltatune.errors import BackboneError

    def absent(_: object) -> None:
        raise BackboneError("no smollm2 here")

    monkeypatch.setattr(page, "DELTAS", ("lora", "bitfit"))
    monkeypatch.setattr(page, "BASELINES", ("head",))
    monkeypatch.setattr(page, "SEEDS", (0,))
    monkeypatch.setattr(page, "story", absent)
    said = run(f"demo --task {reviews} --columns text=review,label=stars --json")
    found = said.json()
    assert len(found["predictions"]) == 3
    assert found["generation"] is None
    assert "no generation: no smollm2 here" in said.err
    assert (tmp_path / "runs" / "demo" / "report.html").is_file()
    again = run(f"demo --task {reviews} --columns text=review,label=stars")
    assert again.status == 0
    assert "Three of the test rows" in again.out
    assert (tmp_path / "runs" / "demo-2" / "report.html").is_file()
