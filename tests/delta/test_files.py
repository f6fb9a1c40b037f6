"""Saved deltas: whole or not at all; what is not as it was saved is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltatune.backbone.load import Backbone
from deltatune.delta.adapted import adapt
from deltatune.delta.delta import Delta
from deltatune.delta.files import MANIFEST, SEAL, TENSORS, _seal
from deltatune.errors import BackboneMismatch, DeltaFileError, DeltatuneError, OutputError, UserError
from deltatune.laws.families import tiny
from deltatune.laws.subject import moved
from deltatune.methods.addition.prefix import Prefix
from deltatune.methods.baseline.full import Full
from deltatune.methods.reparameterization.lora import LoRA


@pytest.fixture(scope="module")
def bert() -> Backbone:
    return Backbone(tiny("bert"))


@pytest.fixture
def folder(tmp_path: Path, bert: Backbone) -> Path:
    delta = moved(Delta.build(LoRA(r=2) | Prefix(n=2), bert, seed=3, name="mine"))
    delta.record = {"metrics": {"accuracy": 0.75}, 1: float("nan"), 10: None}  # type: ignore[dict-item]
    delta.save(str(tmp_path / "delta"))
    return tmp_path / "delta"


def refused(folder: Path, said: str, kind: type[Exception] = DeltaFileError) -> None:
    """Demand that loading is refused in one line that says this."""
    with pytest.raises(kind, match=said) as caught:
        Delta.load(str(folder))
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UserError)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None], *, seal: bool = True) -> None:
    """Change the manifest as someone would who knows how its seal is made, or (`seal=False`) who does not."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    if seal:
        manifest[SEAL] = _seal(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def retensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors, and the manifest's digest of them with them."""
    import hashlib

    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)
    digest = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
    rewrite(folder, lambda manifest: manifest.update(tensors_sha256=digest))


def test_two_files_and_no_more(folder: Path) -> None:
    assert {file.name for file in folder.iterdir()} == {MANIFEST, TENSORS}
    assert [file.name for file in folder.parent.iterdir()] == ["delta"]
    assert folder.stat().st_mode & 0o777 == 0o755


def test_record_comes_back_as_plain_data(folder: Path) -> None:
    record = Delta.load(str(folder)).record
    assert record["metrics"] == {"accuracy": 0.75}
    assert set(record) == {"metrics", "1", "10"}


def test_saved_from_a_bank_holds_its_own_values_only(tmp_path: Path, bert: Backbone) -> None:
    """In a bank the parameters are views of stacks; the file must not hold the neighbours."""
    deltas = [moved(Delta.build(LoRA(r=2), bert, seed=seed, name=str(seed)), seed) for seed in range(3)]
    adapted = adapt(bert, *deltas)
    adapted(input_ids=torch.arange(3, 9).reshape(3, 2), deltas=["0", "1", "2"])
    adapted.remove()
    deltas[1].save(str(tmp_path / "one"))
    alone = moved(Delta.build(LoRA(r=2), bert, seed=1, name="1"), 1)
    alone.save(str(tmp_path / "alone"))
    assert (tmp_path / "one" / TENSORS).read_bytes() == (tmp_path / "alone" / TENSORS).read_bytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("layers.0/encoder:0:attn:q.A"), r"lacks 'layers.0/encoder:0:attn:q.A'$"),
        (lambda t: t.update(more=torch.zeros(1)), r"has 'more' as well$"),
        (lambda t: t.update({"layers.0/encoder:0:attn:q.A": torch.zeros(2, 31)}), r"has shape \(2, 31\), expected \(2, 32\)"),
        (lambda t: (t.clear(), t.update(x=torch.zeros(1))), r"lacks 'layers.0/.*' and has 'x' as well \(12 more\)"),
    ],
)  # fmt: skip
def test_other_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], said: str) -> None:
    retensor(folder, change)
    refused(folder, said)


@pytest.mark.parametrize("place", [0, 9, -1])
def test_tampered_tensors(folder: Path, place: int) -> None:
    content = bytearray((folder / TENSORS).read_bytes())
    content[place] ^= 1
    (folder / TENSORS).write_bytes(content)
    refused(folder, "is not the file that was saved with delta.json")


def test_truncated_tensors(folder: Path) -> None:
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[: len(content) // 2])
    refused(folder, "is not the file that was saved")


def unseal(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest.update({name: value})


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["spec"][0].update(alpha=32.0),
        lambda m: m["record"].update(metrics={"accuracy": 1.0}),
        lambda m: m["fingerprint"].update(exact="0" * 32),
        lambda m: m["sites"][0].update(block=1),
        lambda m: m.update(name="other"),
        lambda m: m.pop(SEAL),
    ],
)
def test_tampered_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    rewrite(folder, change, seal=False)
    refused(folder, f"delta.json was changed after it was saved \\(its {SEAL} differs\\)")


@pytest.mark.parametrize(
    ("change", "said", "kind"),
    [
        (unseal("format", "deltatune.delta/9"), r"has format 'deltatune.delta/9', this version reads 'deltatune.delta/1'",
         DeltaFileError),
        (lambda m: m.pop("format"), r"has format None", DeltaFileError),
        (lambda m: m["spec"][0].update(method="lorra"), r"unknown method 'lorra'; nearest: lora", UserError),
        (lambda m: m["spec"][0].update(rank=3), r"unknown field of LoRA 'rank'", UserError),
        (lambda m: m["spec"][0].update(r="x"), r"LoRA: r='x'", UserError),
        (lambda m: m["spec"][0].pop("method"), r"delta.json is damaged: KeyError 'method'", DeltaFileError),
        (unseal("head", {"head": "Hydra"}), r"carries a head 'Hydra' that this version does not know", DeltaFileError),
        (unseal("sites", "none"), r"delta.json is damaged: ", DeltaFileError),
        (unseal("sites", [{"member": 0}]), r"delta.json is damaged: KeyError", DeltaFileError),
        (unseal("spec", 3), r"delta.json is damaged: TypeError", DeltaFileError),
        (unseal("spec", []), r"delta.json is damaged: ", DeltaFileError),
        (lambda m: m["sites"][0].update(member=5), r"delta.json is damaged: IndexError", DeltaFileError),
        (lambda m: m["sites"][0].update(d_in=-1), r"delta.json is damaged: ", DeltaFileError),
        (lambda m: m["sites"][0].update(d_in=10**15), r"delta.json is damaged: ", DeltaFileError),
        (lambda m: m["sites"][0].update(colour="red"), r"delta.json is damaged: TypeError", DeltaFileError),
        (lambda m: m["sites"][0].update(shapes=[3]), r"delta.json is damaged: TypeError", DeltaFileError),
        (unseal("record", None), r"delta.json is damaged", DeltaFileError),
        (unseal("fingerprint", "abc"), r"delta.json is damaged", DeltaFileError),
    ],
)  # fmt: skip
def test_manifest_that_makes_no_delta(
    folder: Path, change: Callable[[dict[str, Any]], None], said: str, kind: type[Exception]
) -> None:
    rewrite(folder, change)
    refused(folder, said, kind)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "has format 'list'"),
        (b"3", "has format 'int'"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_manifest_that_is_none(folder: Path, content: bytes, said: str) -> None:
    (folder / MANIFEST).write_bytes(content)
    refused(folder, said)


def test_pickle_is_refused_and_never_opened(folder: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    for write in (lambda f: f.write_bytes(pickle.dumps(Trap())), lambda f: torch.save({"A": Trap()}, f)):
        write(folder / TENSORS)
        refused(folder, "is not the file that was saved")
        import hashlib

        digest = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
        rewrite(folder, unseal("tensors_sha256", digest))
        refused(folder, "is not a safetensors file")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", [MANIFEST, TENSORS])
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, f"is no saved delta: it lacks {name} and holds delta")


def test_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no folder .*nowhere; expected one with delta.json")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "no folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "lacks delta.json and delta.safetensors and holds nothing")


def test_loading_onto_another_backbone(folder: Path) -> None:
    with pytest.raises(BackboneMismatch, match="was trained on other weights"):
        Delta.load(str(folder), Backbone(tiny("roberta")))
    with pytest.raises(BackboneMismatch, match="needs site 'encoder.0.attn.q', which 'GPT2LMHeadModel' lacks"):
        Delta.load(str(folder), Backbone(tiny("gpt2")), verify=False)
    assert Delta.load(str(folder), Backbone(tiny("roberta")), verify=False).name == "mine"


# Writing


def test_existing_folder_is_kept(folder: Path, bert: Backbone) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    other = Delta.build(LoRA(), bert)
    with pytest.raises(OutputError, match="exists already; choose another place or remove it"):
        other.save(str(folder))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    other.save(str(folder), overwrite=True)
    assert Delta.load(str(folder)).name == "lora"


def test_folder_that_is_no_delta_is_never_overwritten(tmp_path: Path, bert: Backbone) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("text")
    for name in ("thesis", "file"):
        with pytest.raises(OutputError, match="exists already"):
            Delta.build(LoRA(), bert).save(str(tmp_path / name), overwrite=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), "SafetensorError"])
def test_full_disk_leaves_nothing(
    tmp_path: Path, bert: Backbone, monkeypatch: pytest.MonkeyPatch, error: OSError | str
) -> None:
    from safetensors import SafetensorError

    def full(tensors: object, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device") if isinstance(error, str) else error

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OutputError, match="cannot write .*No space left on device") as caught:
        Delta.build(LoRA(), bert).save(str(tmp_path / "delta"))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


LIMITED = textwrap.dedent("""
    import resource, signal, sys
    from deltatune.backbone.load import Backbone
    from deltatune.delta.delta import Delta
    from deltatune.errors import OutputError
    from deltatune.laws.families import tiny
    from deltatune.methods.reparameterization.lora import LoRA

    delta = Delta.build(LoRA(r=32), Backbone(tiny("bert")))
    delta.save(sys.argv[1] + "/first")
    delta.record = {"notes": "x" * 60_000}
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    for overwrite, name in ((False, "second"), (True, "first")):
        try:
            delta.save(sys.argv[1] + "/" + name, overwrite=overwrite)
        except OutputError as error:
            print(error)
""")


@pytest.mark.parametrize("limit", [1000, 40000])
def test_real_write_that_fails_leaves_nothing(tmp_path: Path, limit: int) -> None:
    """A limit on the size of files, which the tensors run into (1,000), or the manifest after them (40,000)."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED, str(tmp_path), str(limit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stdout
    assert all("cannot write" in line and "File too large" in line for line in lines)
    assert [file.name for file in tmp_path.iterdir()] == ["first"]
    assert Delta.load(str(tmp_path / "first")).trainable() == 4 * 32 * 64


def test_place_that_cannot_be_written(tmp_path: Path, bert: Backbone) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(OutputError, match="cannot write .*(Not a directory|File exists)"):
        Delta.build(LoRA(), bert).save(str(tmp_path / "file" / "delta"))
    assert (tmp_path / "file").read_text() == "text"


def test_exception_while_writing_leaves_nothing(
    tmp_path: Path, bert: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", broken)
    with pytest.raises(KeyboardInterrupt):
        Delta.build(LoRA(), bert).save(str(tmp_path / "delta"))
    assert list(tmp_path.iterdir()) == []


def test_overwriting_that_fails_at_the_last_moment_keeps_the_old(
    folder: Path, bert: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if Path(target) == folder and Path(source).name != "was":
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OutputError, match="No space left"):
        Delta.build(Full(), bert).save(str(folder), overwrite=True)
    monkeypatch.undo()
    assert Delta.load(str(folder)).name == "mine"
    assert [file.name for file in folder.parent.iterdir()] == ["delta"]


def test_several_deltas_are_saved_in_folders_of_their_names(tmp_path: Path, bert: Backbone) -> None:
    with adapt(bert, LoRA(r=2), Prefix(n=2)) as adapted:
        adapted.save_pretrained(str(tmp_path / "both"))
    assert sorted(file.name for file in (tmp_path / "both").iterdir()) == ["lora(r=2)", "prefix(n=2)"]
    assert Delta.load(str(tmp_path / "both" / "prefix(n=2)"), bert).spec == Prefix(n=2)


def test_loading_imports_nothing_from_the_folder(folder: Path) -> None:
    (folder / "lora.py").write_text("raise SystemExit('imported')")
    (folder / "__init__.py").write_text("raise SystemExit('imported')")
    before = set(sys.modules)
    here = os.getcwd()
    try:
        os.chdir(folder)
        Delta.load(".")
    finally:
        os.chdir(here)
    assert not [name for name in set(sys.modules) - before if "lora" in name]
    shutil.rmtree(folder)


def test_every_refusal_is_a_users_mistake() -> None:
    assert all(issubclass(kind, DeltatuneError) and kind.exit_status == 2 for kind in (DeltaFileError, OutputError))
