"""Embeddings, preferences and conversations from the command line: fitted, scored, compared, predicted, exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from .conftest import Run, rows, write_jsonl

QUICK = "--steps 20 --batch 8 --lr 0.01 --max-length 48 --precision float32"
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ': ' + m.content + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def talker(decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder, with a chat template in its tokenizer."""
    folder = tmp_path_factory.mktemp("chat") / "tiny-talker"
    shutil.copytree(decoder, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def files(folder: Path) -> dict[str, Path]:
    texts = [f"{i} {row['review']}" for i, row in enumerate(rows(60))]
    answer = {"role": "assistant", "content": "ok"}
    made = {
        "embedding": [{"anchor": text, "positive": " ".join(text.split()[-3:])} for text in texts],
        "preference": [{"prompt": text, "chosen": "ok", "rejected": "no way"} for text in texts],
        "chat": [{"messages": [{"role": "user", "content": text[:14]}, answer]} for text in texts],
    }
    return {kind: write_jsonl(folder / f"{kind}.jsonl", part) for kind, part in made.items()}


@pytest.mark.parametrize("kind", ["embedding", "preference", "chat"])
def test_a_kind_goes_all_the_way(run: Run, kind: str, encoder: Path, talker: Path, tmp_path: Path) -> None:
    on, file = (encoder if kind == "embedding" else talker), files(tmp_path)[kind]
    said = run(f"fit --task {file} --backbone {on} --delta lora bitfit --out out {QUICK} --json").json()
    metric = {"embedding": "mrr_at_10", "preference": "preference_accuracy", "chat": "inverse_perplexity"}[kind]
    assert all(0 <= one["metrics"]["test"][metric] <= 1 for one in said["runs"])
    assert (tmp_path / "out" / "report.html").is_file()
    folder = Path("out") / kind / "lora" / "0"
    scored = run(f"eval {folder} --task {file} --json").json()
    again = next(one for one in said["runs"] if one["delta"] == "lora")["metrics"]["test"][metric]
    assert scored["score"]["value"] == pytest.approx(again) and scored["metric"] == metric
    baseline = {"preference": "always neither", "chat": "always perplexity inf"}.get(kind, "always")
    assert baseline in run(f"eval {folder} --task {file}").out
    compared = run(f"compare {folder} out/{kind}/bitfit/0 --task {file}").out
    assert ("Right on a row" in compared) == (kind != "chat")


def test_a_text_gets_its_vector_and_the_folder_is_a_sentence_transformer(
    run: Run, encoder: Path, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    run(f"fit --task {files(tmp_path)['embedding']} --backbone {encoder} --delta lora adapter --out out {QUICK}")
    text = rows(60)[0]["review"]
    (made,) = run("predict out/embedding/lora/0 --json", text).json()["predictions"]
    assert made["anchor"] == text and len(made["embedding"]) == 32 and made["confidence"] is None
    assert "32 numbers: " in run("predict out/embedding/lora/0", text).out
    run("predict out/embedding/lora/0 --out vectors.jsonl", text)
    assert json.loads((tmp_path / "vectors.jsonl").read_text())["embedding"] == made["embedding"]
    said = run("export out/embedding/lora/0 --to sentence-transformers --out st --json").json()
    assert said["use"] == 'sentence_transformers.SentenceTransformer("st")'
    found = SentenceTransformer("st", device="cpu").encode([text])[0]
    assert found == pytest.approx(made["embedding"], abs=1e-5)
    assert "cannot be merged" in run("export out/embedding/adapter/0 --to sentence-transformers --out no").mistake()
    assert "st exists already" in run("export out/embedding/lora/0 --to sentence-transformers --out st").mistake()
    assert not Path("no").exists()


def test_other_deltas_are_no_sentence_transformers(run: Run, lora: Path) -> None:
    said = run(f"export {lora} --to sentence-transformers --out st").mistake()
    assert "makes no embeddings: its head is SequenceClassification" in said


def test_answers_are_preferred_and_written(run: Run, talker: Path, tmp_path: Path) -> None:
    made = files(tmp_path)
    run(f"fit --task {made['preference']} --backbone {talker} --delta lora --out p {QUICK}")
    (one,) = run("predict p --json", "the soup", "ok", "no way").json()["predictions"]
    (other,) = run("predict p --json", "the soup", "no way", "ok").json()["predictions"]
    assert one["margin"] == pytest.approx(-other["margin"], abs=1e-6) and one["margin"] > 0
    assert one["confidence"] == pytest.approx(other["confidence"]) and 0.5 < one["confidence"] < 1
    assert "expected three a row" in run("predict p", "the soup", "ok").mistake()
    run(f"fit --task {made['chat']} --backbone {talker} --delta lora --out c {QUICK} --steps 120")
    (said,) = run("predict c --json", "the soup").json()["predictions"]
    assert said["messages"] == [{"role": "user", "content": "the soup"}] and said["prediction"] == "ok"
    # The answers that a file has are not shown to the model, which writes its own.
    several = run(f"predict c {made['chat']} --json").json()["predictions"]
    assert len(several) == 60 and {row["messages"][-1]["role"] for row in several} == {"user"}


def test_rows_to_stream_are_counted_for_the_hub_only(run: Run, named: Path) -> None:
    said = run(f"fit --task {named} --delta lora --max-rows 20").mistake()
    assert "max_rows=20: expected 1 or more, of a data set of the hub" in said
