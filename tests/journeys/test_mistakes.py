"""A user's mistake is one line: got, expected, the nearest names, the fix; nothing is half-written."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest

from .conftest import Run, write_csv, write_jsonl

pytestmark = pytest.mark.usefixtures("nothing_written")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("sitse minilm", ["unknown verb 'sitse'", "nearest: sites"]),
        ("sites minilm --jsn", ["unknown option '--jsn'", "deltatune sites", "nearest: --json"]),
        ("sites", ["needs BACKBONE", "deltatune sites --help"]),
        ("sites minilm extra", ["extra"]),
        ("sites minlim", ["unknown backbone 'minlim'", "nearest: minilm"]),
        ("methods lroa", ["unknown method 'lroa'", "nearest: lora"]),
        ("fit --task x --delta lora --seeds two", ["--seeds", "got 'two'", "integer"]),
        ("fit --task x --delta lora --precision=fp8", ["--precision", "got 'fp8'", "bfloat16"]),
        ("fit --task x --delta lora --batch 0", ["batch=0", "expected 1 or more"]),
        ("fit --delta lora", ["needs --task"]),
        ("fit --task x --delta lora --columns text", ["--columns 'text'", "FIELD=COLUMN"]),
        ("fit --task x --delta lora --columns text=a,text=b", ["'text' twice"]),
        ("fit --task nowhere.csv --delta lora", ["no task 'nowhere.csv'"]),
        ("fit --task stdlib_pakcage --delta lora", ["nearest", "stdlib_package"]),
        ("tune stdlib_package --budget soon", ["budget 'soon'", "10m", "2000steps"]),
        ("predict nowhere hello", ["no folder nowhere", "delta.json"]),
        ("inspect nowhere", ["no folder nowhere"]),
        ("doctor nowhere", ["no folder nowhere"]),
        ("report nowhere", ["no folder nowhere", "--out"]),
        ("reproduce", ["SYSTEM", "--list"]),
        ("reproduce adaptrebias", ["unknown system", "nearest: adapterbias"]),
        ("check nowhere.py", ["no Python file nowhere.py"]),
    ],
)
def test_words(run: Run, line: str, said: list[str]) -> None:
    mistake = run(line).mistake()
    assert all(part in mistake for part in said), mistake


@pytest.mark.parametrize(
    ("expression", "at", "said"),
    [
        ("lroa", "lroa", "nearest: lora"),
        ("lora | bitift", "bitift", "nearest: bitfit"),
        ("lora(rank=4)", "rank=4", "unknown field of LoRA 'rank'"),
        ("bitfit | lora(r=0)", "r=0", "greater than or equal to 1"),
        ("lora(8)", "8", "give fields by name"),
        ("lora(r=", "", "does not parse"),
    ],
)
def test_bad_delta_expression_is_pointed_at(run: Run, named: Path, expression: str, at: str, said: str) -> None:
    answer = run(f"fit --task {named} --delta", expression)
    assert (answer.status, answer.out) == (2, "")
    first, second = answer.err.splitlines()
    assert first == f"error: {expression}"
    assert said in second
    column = second.index("^")
    assert first[column:].startswith(at)
    assert second[:column].strip() == ""


def test_bad_site_and_block(run: Run, named: Path, encoder: Path) -> None:
    start = f"fit --task {named} --backbone {encoder} --out new --delta"
    assert "nearest: attn.q" in run(start, 'lora(at="atn.q")').mistake()
    assert "no attention to an encoder" in run(start, 'lora(at="cross.q")').mistake()
    assert "names block 7; the stack has 2 blocks" in run(start, 'lora(blocks="7")').mistake()


class TestFiles:
    """Task files."""

    @pytest.fixture(autouse=True)
    def _place(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        self.place = tmp_path_factory.mktemp("files")

    def mistake(self, run: Run, file: Path, *words: str) -> str:
        return run(f"fit --delta lora --out new --task {file}", *words).mistake()

    def test_empty(self, run: Run) -> None:
        (self.place / "a.csv").write_text("")
        assert "the file is empty" in self.mistake(run, self.place / "a.csv")

    def test_malformed_csv_names_the_line(self, run: Run) -> None:
        (self.place / "a.csv").write_text("text,label\nfine,pos\nbroken, in, two,neg\n")
        mistake = self.mistake(run, self.place / "a.csv")
        assert "line 3 has 4 columns; expected 2" in mistake

    def test_malformed_jsonl_names_the_line(self, run: Run) -> None:
        (self.place / "a.jsonl").write_text('{"text": "fine", "label": "pos"}\n{"text": \n')
        assert "line 2 is not JSON" in self.mistake(run, self.place / "a.jsonl")

    def test_missing_value_names_the_line(self, run: Run, named: Path) -> None:
        lines = named.read_text().splitlines()
        lines[7] = ",pos"
        (self.place / "a.csv").write_text("\n".join(lines) + "\n")
        assert "line 8 has no text" in self.mistake(run, self.place / "a.csv")

    def test_columns_that_do_not_match_propose_the_option(self, run: Run, reviews: Path) -> None:
        assert "give --columns text=review,label=stars" in self.mistake(run, reviews)

    def test_column_that_is_not_there(self, run: Run, reviews: Path) -> None:
        mistake = self.mistake(run, reviews, "--columns", "text=reviews,label=stars")
        assert "no column 'reviews'; nearest: review" in mistake

    def test_unseen_label_names_the_row(self, run: Run) -> None:
        rows = [{"text": f"text {i}", "label": "pos" if i % 2 else "neg"} for i in range(12)]
        for split in ("train", "dev"):
            write_jsonl(self.place / f"{split}.jsonl", rows)
        write_jsonl(self.place / "test.jsonl", [*rows[:3], {"text": "so so", "label": "neutral"}])
        mistake = self.mistake(run, self.place)
        assert "test.jsonl: line 4: label 'neutral' is not in train" in mistake

    def test_unknown_format(self, run: Run) -> None:
        (self.place / "a.xlsx").write_bytes(b"PK")
        assert "unknown format '.xlsx'; valid: .jsonl" in self.mistake(run, self.place / "a.xlsx")


class TestDeltas:
    """Saved deltas that were damaged, and questions that they cannot answer."""

    @pytest.fixture(autouse=True)
    def _copy(self, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        self.delta = tmp_path_factory.mktemp("deltas") / "lora"
        shutil.copytree(lora, self.delta)

    def mistake(self, run: Run, verb: str = "predict {} hello") -> str:
        return run(verb.format(self.delta)).mistake()

    @pytest.mark.parametrize("verb", ["predict {} hello", "inspect {}", "doctor {}"])
    def test_tampered_tensors(self, run: Run, verb: str) -> None:
        file = self.delta / "delta.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        assert "its sha256 differs" in self.mistake(run, verb)

    def test_tampered_manifest(self, run: Run) -> None:
        file = self.delta / "delta.json"
        manifest = json.loads(file.read_text())
        manifest["spec"][0]["method"] = "lorra"
        file.write_text(json.dumps(manifest))
        assert "unknown method 'lorra'; nearest: lora" in self.mistake(run)

    def test_tampered_record(self, run: Run) -> None:
        file = self.delta / "delta.json"
        manifest = json.loads(file.read_text())
        manifest["record"]["task"]["labels"].reverse()
        file.write_text(json.dumps(manifest))
        assert "delta.json was changed after it was saved" in self.mistake(run)

    def test_manifest_without_a_key(self, run: Run) -> None:
        file = self.delta / "delta.json"
        manifest = json.loads(file.read_text())
        del manifest["sites"]
        file.write_text(json.dumps(manifest))
        assert "delta.json is damaged" in self.mistake(run)

    def test_pickle_is_never_opened(self, run: Run, tmp_path: Path) -> None:
        class Trap:
            def __reduce__(self) -> tuple[object, ...]:
                return (Path.touch, (tmp_path / "sprung",))

        for name in ("delta.json", "delta.safetensors"):
            (self.delta / name).write_bytes(pickle.dumps(Trap()))
        assert "delta.json is not JSON" in self.mistake(run)

    def test_pickle_beside_is_no_delta(self, run: Run) -> None:
        (self.delta / "delta.safetensors").rename(self.delta / "pytorch_model.bin")
        mistake = self.mistake(run)
        assert "lacks delta.safetensors" in mistake
        assert "pytorch_model.bin" in mistake

    def test_another_version(self, run: Run) -> None:
        file = self.delta / "delta.json"
        manifest = json.loads(file.read_text())
        manifest["format"] = "deltatune.delta/9"
        file.write_text(json.dumps(manifest))
        assert "format 'deltatune.delta/9'" in self.mistake(run)

    def test_another_backbone(self, run: Run, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        from transformers import AutoModel

        other = tmp_path_factory.mktemp("other") / "tiny-bert"
        shutil.copytree(encoder, other)
        model = AutoModel.from_pretrained(encoder)
        model.encoder.layer[0].attention.self.query.weight.data[0, 0] += 0.1
        model.save_pretrained(other)
        mistake = run(f"predict {self.delta} hello --backbone {other}").mistake()
        assert "trained on other weights" in mistake

    def test_delta_without_head(self, run: Run, encoder: Path) -> None:
        import deltatune as dt

        shutil.rmtree(self.delta)
        dt.Delta.build(dt.LoRA(), dt.load(str(encoder))).save(str(self.delta))
        assert "no head" in self.mistake(run)

    def test_empty_text(self, run: Run) -> None:
        assert "text 2 is empty" in run(f"predict {self.delta} hello", "  ").mistake()

    def test_file_that_is_not_there(self, run: Run) -> None:
        assert "no file new.csv" in run(f"predict {self.delta} new.csv").mistake()

    def test_columns_of_a_file_without_text(self, run: Run, reviews: Path) -> None:
        mistake = run(f"predict {self.delta} {reviews}").mistake()
        assert "has columns review, stars; expected text" in mistake
        assert "--columns text=COLUMN" in mistake

    def test_row_without_text(self, run: Run, tmp_path_factory: pytest.TempPathFactory) -> None:
        file = write_csv(
            tmp_path_factory.mktemp("new") / "a.csv", [{"text": "one", "id": "1"}, {"text": " ", "id": "2"}]
        )
        assert "line 3 has no text" in run(f"predict {self.delta} {file}").mistake()

    def test_predictions_are_not_written_over_a_file(self, run: Run, named: Path) -> None:
        assert "exists already" in run(f"predict {self.delta} hello --out {named.with_suffix('.csv')}").mistake()
        assert "expected .csv or .jsonl" in run(f"predict {self.delta} hello --out a.xlsx").mistake()

    def test_split_and_metric(self, run: Run, named: Path) -> None:
        assert "unknown split 'tset'; nearest: test" in run(f"eval {self.delta} --task {named} --split tset").mistake()
        assert "nearest: accuracy" in run(f"eval {self.delta} --task {named} --metric acuracy").mistake()

    def test_task_of_another_kind(self, run: Run) -> None:
        mistake = run(f"eval {self.delta} --task stdlib_pair").mistake()
        assert "pair_classification" in mistake
        assert "was fitted for classification" in mistake

    def test_label_that_the_head_does_not_know(self, run: Run, tmp_path_factory: pytest.TempPathFactory) -> None:
        rows = [{"text": f"text {i}", "label": ("pos", "neg", "meh")[i % 3]} for i in range(60)]
        file = write_csv(tmp_path_factory.mktemp("new") / "a.csv", rows)
        assert "label 'meh', which" in run(f"eval {self.delta} --task {file}").mistake()


class TestPlaces:
    """Where results go."""

    @pytest.mark.parametrize("verb", ["fit --delta lora --task", "tune", "demo --task"])
    def test_folder_that_holds_something(
        self, run: Run, named: Path, verb: str, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        place = tmp_path_factory.mktemp("taken")
        (place / "thesis.txt").write_text("mine")
        mistake = run(f"{verb} {named} --out {place}").mistake()
        assert "exists already and is not empty" in mistake
        assert [file.name for file in place.iterdir()] == ["thesis.txt"]

    def test_place_is_a_file(self, run: Run, named: Path) -> None:
        assert "is a file; expected a folder" in run(f"fit --delta lora --task {named} --out {named}").mistake()

    def test_same_training_twice(self, run: Run, named: Path, encoder: Path) -> None:
        line = f"fit --delta lora lora --task {named} --backbone {encoder}"
        assert "asked for twice" in run(line).mistake()


def test_system_that_is_not_built_says_so(run: Run) -> None:
    mistake = run("reproduce adapterbias").mistake()
    assert "not built yet" in mistake
    assert "claims" in mistake
