"""Journeys run the command line in this process; what trains does so on tiny random backbones in a folder."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deltatune.cli import main

GOOD = ["great", "lovely"]
BAD = ["awful", "broken"]
THINGS = ["film", "phone", "book", "meal", "lamp", "chair"]


@dataclass(frozen=True)
class Said:
    """What a command answered."""

    status: int
    out: str
    err: str

    def json(self) -> Any:
        """Return the one JSON value that stdout holds; NaN is none."""
        assert self.status == 0, self.err
        return json.loads(self.out, parse_constant=pytest.fail)

    def mistake(self) -> str:
        """Return the line of a user's mistake, after asserting that it is one line, and the only one."""
        assert self.status == 2, (self.status, self.err)
        assert self.out == ""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in self.err
        return lines[0]


Run = Callable[..., Said]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return `run("sites minilm", ...)`: runs `deltatune` in an empty folder; further words are taken as they are."""
    monkeypatch.chdir(tmp_path)
    # Rich and the shell's own width would fold what is asserted.
    monkeypatch.setenv("TERMINAL_WIDTH", "200")

    def call(line: str, *words: object) -> Said:
        capsys.readouterr()
        status = main([*shlex.split(line), *map(str, words)])
        got = capsys.readouterr()
        return Said(status, got.out, got.err)

    return call


def rows(number: int = 60) -> list[dict[str, str]]:
    """Return short reviews, half of them good; the last word alone tells which."""
    made = []
    for i in range(number):
        words = GOOD if i % 2 else BAD
        text = f"the {THINGS[i // 2 % 6]} number {i // 2} is {words[i // 2 % 2]}"
        made.append({"review": text, "stars": "pos" if i % 2 else "neg"})
    return made


def write_csv(file: Path, content: list[dict[str, str]]) -> Path:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(content[0]))
        writer.writeheader()
        writer.writerows(content)
    return file


def write_jsonl(file: Path, content: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in content))
    return file


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose columns have to be named."""
    return write_csv(tmp_path_factory.mktemp("data") / "reviews.csv", rows())


@pytest.fixture(scope="session")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows with the canonical columns."""
    content = [{"text": row["review"], "label": row["stars"]} for row in rows()]
    return write_csv(tmp_path_factory.mktemp("data") / "named.csv", content)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random BERT and a tokenizer that knows the words of the reviews."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("backbones") / "tiny-bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "number", "is", *THINGS, *GOOD, *BAD]
    words += [*map(str, range(100)), ".", "##s"]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("backbones") / "tiny-llama"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=128, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def fitted(tmp_path_factory: pytest.TempPathFactory, encoder: Path, named: Path) -> Path:
    """The --out of a fit of `lora`, `adapter` and the head alone on the reviews."""
    out = tmp_path_factory.mktemp("fitted") / "out"
    line = (
        f"fit --steps 60 --batch 8 --lr 0.01 --backbone {encoder} --task {named} --delta lora adapter head --out {out}"
    )
    assert main(shlex.split(line)) == 0
    return out


@pytest.fixture(scope="session")
def lora(fitted: Path) -> Path:
    """A fitted LoRA."""
    return fitted / "named" / "lora" / "0"


@pytest.fixture(scope="session")
def adapter(fitted: Path) -> Path:
    """A fitted adapter."""
    return fitted / "named" / "adapter" / "0"


@pytest.fixture
def nothing_written(tmp_path: Path) -> Iterator[None]:
    """Assert that the test leaves its folder as it was before the first command."""
    before = sorted(tmp_path.rglob("*"))
    yield
    assert sorted(tmp_path.rglob("*")) == before
