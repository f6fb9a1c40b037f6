"""`--json` prints one JSON value with its fixed keys and nothing else on stdout; without it people get a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import deltatune.backbone.load as loading

from .conftest import Run, rows, write_jsonl

RUN_KEYS = {"task", "delta", "seed", "settings", "trainable", "backbone", "metrics", "baseline", "seconds", "saved"}


def test_sites(run: Run, encoder: Path) -> None:
    found = run(f"sites {encoder} --json").json()
    assert set(found) == {"backbone", "parameters", "blocks", "sites", "absent"}
    query = next(site for site in found["sites"] if site["site"] == "attn.q")
    assert query == {
        "site": "attn.q", "stack": "encoder", "blocks": [0, 1], "d_in": 32, "d_out": 32, "ports": ["input", "output"],
        "view": None, "module": "encoder.layer.*.attention.self.query",
    }  # fmt: skip
    assert "no attention to an encoder" in found["absent"]["cross.q"]
    shown = run(f"sites {encoder}").out
    assert "attention.self.query" in shown
    assert "no attention to an encoder" in shown


def test_methods(run: Run, encoder: Path) -> None:
    found = run(f"methods --backbone {encoder} --json").json()
    assert {frozenset(one) for one in found} == {frozenset(("name", "family", "paper", "facts", "trainable"))}
    by_name = {one["name"]: one for one in found}
    assert by_name["lora"]["trainable"] == 2 * 2 * 8 * (32 + 32)  # blocks, sites, r, widths
    assert by_name["lora"]["facts"] == {
        "ports": ["output"], "needs": ["output"], "identity_at_init": True, "scalable": True, "mergeable": True,
        "positionwise": True, "linear": "bilinear",
    }  # fmt: skip
    assert by_name["adapter"]["facts"]["mergeable"] is False
    assert by_name["prefix"]["facts"]["ports"] == ["kv"]
    assert by_name["prefix"]["facts"]["identity_at_init"] is False
    assert by_name["ia3"]["facts"]["ports"] == ["input", "output"]
    tree = run(f"methods --backbone {encoder} --tree").out.splitlines()
    assert tree.index(next(line for line in tree if "reparameterization" in line)) < tree.index(
        next(line for line in tree if "lora" in line)
    )


def test_one_method(run: Run, encoder: Path) -> None:
    found = run(f"methods LoRA --backbone {encoder} --json").json()
    assert found["name"] == "lora"
    assert {"name": "r", "type": "int", "default": 8, "limits": "≥ 1"} in found["fields"]
    shown = run(f"methods lora --backbone {encoder}").out
    assert "y = W x + (alpha / r) B A x" in shown
    assert "alpha" in shown


def test_inspect(run: Run, lora: Path) -> None:
    found = run(f"inspect {lora} --json").json()
    assert (found["delta"], found["trainable"], found["head"]["head"]) == ("lora", 2048, "SequenceClassification")
    assert [site["site"] for site in found["sites"]][:2] == ["encoder.0.attn.q", "encoder.0.attn.v"]
    assert all(site["parameters"] == 512 and site["norm"] > 0 for site in found["sites"])
    assert found["task"]["labels"] == ["neg", "pos"]
    assert found["settings"]["steps"] == 60
    assert set(found["versions"]) == {"deltatune", "torch", "transformers", "python"}
    assert found["bytes"] == sum(file.stat().st_size for file in (lora).glob("delta.*"))
    assert "SequenceClassification" in run(f"inspect {lora}").out


def test_predict_texts(run: Run, lora: Path, named: Path) -> None:
    of_file = {one["label"]: one for one in run(f"predict {lora} {named} --json").json()["predictions"]}
    assert set(of_file) == {"neg", "pos"}
    found = run(f"predict {lora} --json", *(one["text"] for one in of_file.values())).json()
    assert set(found) == {"delta", "backbone", "task", "predictions"}
    assert [one["label"] for one in found["predictions"]] == list(of_file)
    for one in found["predictions"]:
        assert 0.5 <= one["confidence"] <= 1
        assert one["confidence"] == pytest.approx(of_file[one["label"]]["confidence"], abs=0.02)
    shown = run(f"predict {lora}", of_file["pos"]["text"]).out
    assert "pos" in shown
    assert of_file["pos"]["text"] in shown


def test_predict_a_file(run: Run, lora: Path, reviews: Path, tmp_path: Path) -> None:
    line = f"predict {lora} {reviews} --columns text=review"
    found = run(f"{line} --json").json()
    assert len(found["predictions"]) == 60
    said = run(f"{line} --out answers.jsonl")
    assert (said.status, said.out) == (0, "")
    assert said.err == "60 predictions in answers.jsonl\n"
    written = [json.loads(text) for text in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert written[0]["review"] == rows()[0]["review"]
    assert [row["label"] for row in written] == [one["label"] for one in found["predictions"]]
    assert run(f"{line} --out answers.csv").status == 0
    assert (tmp_path / "answers.csv").read_text().splitlines()[0] == "review,stars,label,confidence"


def test_own_label_column_is_kept(run: Run, lora: Path, named: Path, tmp_path: Path) -> None:
    assert run(f"predict {lora} {named} --out answers.csv").status == 0
    assert (tmp_path / "answers.csv").read_text().splitlines()[0] == "text,label,predicted_label,confidence"


def test_eval(run: Run, lora: Path, named: Path) -> None:
    found = run(f"eval {lora} --task {named} --split train --json").json()
    assert (found["split"], found["rows"], found["metric"]) == ("train", 48, "accuracy")
    score = found["score"]
    assert score["low"] <= score["value"] <= score["high"]
    assert found["majority"] == pytest.approx(0.5)
    assert score["value"] > 0.9
    other = run(f"eval {lora} --task {named} --split train --metric macro_f1 --json").json()
    assert other["metric"] == "macro_f1"
    assert "always" in run(f"eval {lora} --task {named}").out


def test_eval_agrees_with_fit(run: Run, adapter: Path, named: Path) -> None:
    """The split is cut by the same seed, so `eval` scores the very rows that `fit` scored."""
    recorded = json.loads((adapter / "delta.json").read_text())["record"]["metrics"]
    for split in ("dev", "test"):
        found = run(f"eval {adapter} --task {named} --split {split} --json").json()
        assert found["score"]["value"] == recorded[split]["accuracy"]


def test_compare_with_itself(run: Run, lora: Path, named: Path) -> None:
    found = run(f"compare {lora} {lora} --task {named} --json").json()
    assert found["better"] is None
    assert "cannot be told apart" in found["sentence"]
    assert found["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert (found["disagreement"]["different_answers"], found["disagreement"]["p"]) == (0, 1.0)
    assert found["examples"] == []


def test_compare_finds_the_better(run: Run, lora: Path, named: Path, tmp_path: Path) -> None:
    """A delta whose head has its labels the wrong way round is wrong where the first is right."""
    import deltatune as dt
    from deltatune.cli.saved import read

    turned = read(lora)
    turned.head.linear.weight.data.neg_()  # type: ignore[union-attr, operator]
    turned.head.linear.bias.data.neg_()  # type: ignore[union-attr, operator]
    assert isinstance(turned, dt.Delta)
    turned.save(str(tmp_path / "turned"))
    found = run(f"compare {lora} turned --task {named} --split train --json").json()
    assert found["better"] == "a"
    assert found["sentence"].startswith(f"{lora} is better than turned")
    counts = found["disagreement"]
    assert counts["only_a_right"] + counts["only_b_right"] == counts["different_answers"] == 48
    assert counts["p"] < 1e-6
    assert found["a"]["score"]["value"] - found["b"]["score"]["value"] == pytest.approx(found["difference"]["value"])
    assert len(found["examples"]) == 5
    assert all(one["a"] != one["b"] for one in found["examples"])
    shown = run(f"compare {lora} turned --task {named} --split train").out
    assert "5 of 48 rows with different answers" in shown
    assert "McNemar" in shown


def test_reproduce(run: Run) -> None:
    found = run("reproduce --list --json").json()
    assert len(found) == 36
    assert {key for row in found for key in row} == {"system", "source", "claims", "state"}
    assert [row["system"] for row in run("reproduce adapterbias --list --json").json()] == ["adapterbias"]
    assert "169 claims of 36 systems" in run("reproduce --list").out


def test_report_is_made_again(run: Run, fitted: Path, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text((fitted / "result.json").read_text())
    found = run(f"report {tmp_path} --json").json()
    assert found == {"written": [str(tmp_path / "report.html")]}
    assert "<html" in (tmp_path / "report.html").read_text()


def test_report_of_something_else(run: Run, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"schema": "deltatune.result/0"}')
    assert "expected 'deltatune.result/1'" in run(f"report {tmp_path}").mistake()
    (tmp_path / "result.json").write_text("{")
    assert "result.json cannot be read" in run(f"report {tmp_path}").mistake()


def test_fit(run: Run, encoder: Path, named: Path) -> None:
    said = run(f"fit --task {named} --delta lora --steps 2 --batch 4 --backbone {encoder} --json")
    found = said.json()
    assert found["schema"] == "deltatune.result/1"
    assert len(found["runs"]) == 1
    assert set(found["runs"][0]) >= RUN_KEYS
    assert set(found["runs"][0]["metrics"]) == {"dev", "test"}
    assert "step 1/2" in said.err


def test_dry_run(run: Run, encoder: Path, named: Path, tmp_path: Path) -> None:
    line = f"fit --task {named} --delta lora bitfit --seeds 2 --out new --backbone {encoder} --dry-run"
    found = run(f"{line} --json").json()
    assert found["runs"] == []
    assert set(found["estimate"]) == {"memory", "seconds", "tokens", "parameters"}
    assert run(line).out.startswith("4 trainings; about ")
    assert not (tmp_path / "new").exists()


def test_tune(run: Run, encoder: Path, named: Path) -> None:
    said = run(
        f"tune {named} --budget 40steps --seeds 1 --batch 4 --max-params 3000 --backbone {encoder} --out best --json"
    )
    found = said.json()
    assert set(found) == {"schema", "runs", "candidates", "chosen"}
    assert found["chosen"] in {one["delta"] for one in found["candidates"]}
    assert all(one["trainable"] <= 3000 for one in found["candidates"])
    assert run("predict best --json", "the film is great").json()["predictions"][0]["label"] in ("neg", "pos")


def test_what_a_library_prints_is_no_answer(run: Run, encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loading.load

    def chatty(*args: Any, **kwargs: Any) -> Any:
        print("loading, please wait")
        return real(*args, **kwargs)

    monkeypatch.setattr(loading, "load", chatty)
    said = run(f"sites {encoder} --json")
    said.json()
    assert "please wait" in said.err


class TestOtherKinds:
    """Tags, pairs and written answers."""

    def test_pairs(self, run: Run, encoder: Path, tmp_path: Path) -> None:
        content = [
            {"text": f"the film number {i}", "text_b": f"the film number {i if i % 2 else i + 1}", "label": "ny"[i % 2]}
            for i in range(40)
        ]
        write_jsonl(tmp_path / "pairs.jsonl", content)
        assert (
            run(f"fit --task pairs.jsonl --delta lora --steps 2 --batch 4 --backbone {encoder} --out out").status == 0
        )
        found = run("predict out --json", "the film", "the book", "a", "b").json()["predictions"]
        assert [(one["text"], one["text_b"]) for one in found] == [("the film", "the book"), ("a", "b")]
        assert "expected two for each pair" in run("predict out", "the film").mistake()
        assert len(run("predict out pairs.jsonl --json").json()["predictions"]) == 40

    def test_tags(self, run: Run, encoder: Path, tmp_path: Path) -> None:
        content = [
            {"tokens": ["the", "film", "number", str(i)], "tags": ["O", "B-THING", "O", "B-NUMBER"]} for i in range(40)
        ]
        write_jsonl(tmp_path / "tags.jsonl", content)
        assert run(f"fit --task tags.jsonl --delta lora --steps 2 --batch 4 --backbone {encoder} --out out").status == 0
        found = run("predict out --json", "the book number 7").json()["predictions"][0]
        assert found["tokens"] == ["the", "book", "number", "7"]
        assert len(found["tags"]) == 4
        assert run("eval out --task tags.jsonl --json").json()["metric"] == "entity_f1"
        assert "the book" in run("predict out", "the book").out
        assert run("compare out out --task tags.jsonl --json").json()["better"] is None

    def test_written_answers(self, run: Run, decoder: Path, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "write.jsonl", [{"source": f"say {i}", "target": str(i)} for i in range(40)])
        line = f"fit --task write.jsonl --delta lora --steps 2 --batch 4 --max-length 48 --backbone {decoder} --out out"
        assert run(line).status == 0
        found = run("predict out --json", "say 7").json()["predictions"][0]
        assert set(found) == {"source", "prediction", "confidence"}
        assert isinstance(found["prediction"], str)
        assert found["confidence"] is None
        assert run("eval out --task write.jsonl --json").json()["metric"] == "exact_match"
        assert run("compare out out --task write.jsonl").status == 0
