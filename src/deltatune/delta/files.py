"""A saved delta: a folder with `delta.json` (what it is) and `delta.safetensors` (its tensors). Never pickle.

Written whole or not at all: into a temporary folder beside the place, flushed, then renamed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Heads, Site, View
from deltatune.delta.catalogue import find
from deltatune.delta.delta import Delta
from deltatune.delta.head import head_from, head_record
from deltatune.delta.method import Composition, Method, Spec, members
from deltatune.errors import DeltaFileError, OutputError, UserError

FORMAT = "deltatune.delta/1"
MANIFEST, TENSORS = "delta.json", "delta.safetensors"
# user/repo or user/repo@revision, on the hub
ADDRESS = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
SEAL = "manifest_sha256"  # of everything else in the manifest


def spec_record(spec: Spec) -> list[dict[str, Any]]:
    """A spec as plain data: a list of {"method", fields}."""
    return [{"method": m.name(), **m.model_dump()} for m in members(spec)]


def spec_from(record: list[dict[str, Any]]) -> Spec:
    """Make a spec from `spec_record`'s data. UserError for an unknown method or field."""
    made: list[Method] = []
    for entry in record:
        fields = {name: value for name, value in entry.items() if name != "method"}
        made.append(find(entry["method"])(**fields))
    return made[0] if len(made) == 1 else Composition(made)


def save(delta: Delta, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a delta into a folder of its own and return it.

    OutputError if the folder exists (unless `overwrite` and it holds a delta), or cannot be written.
    """
    target = Path(folder)
    if target.exists() and not (overwrite and (target / MANIFEST).is_file()):
        raise OutputError(f"{target} exists already; choose another place or remove it")
    with whole_folder(target) as work:
        _write(delta, work)
    return target


def save_into(delta: Delta, folder: Path) -> None:
    """Write a delta's two files into a folder that may hold others, the manifest last.

    OutputError if they cannot be written.
    """
    with whole_folder(folder / ".delta") as work:
        _write(delta, work)
    for name in (TENSORS, MANIFEST):
        os.replace(folder / ".delta" / name, folder / name)
    (folder / ".delta").rmdir()


def _write(delta: Delta, work: Path) -> None:
    from safetensors.torch import save_file

    tensors = {name: value.cpu().contiguous().clone() for name, value in delta.tensors().items()}
    save_file(tensors, work / TENSORS, metadata={"format": FORMAT})
    manifest = {
        "format": FORMAT,
        "name": delta.name,
        "spec": spec_record(delta.spec),
        "seed": delta.seed,
        "backbone": delta.backbone_name,
        "fingerprint": delta.fingerprint,
        "sites": [
            {"member": int(address.split("/")[0]), **dataclasses.asdict(site)} for address, site in delta.sites.items()
        ],
        "head": head_record(delta.head),
        "tensors_sha256": _digest(work / TENSORS),
        "record": delta.record,
    }
    plain = json.loads(json.dumps(manifest, default=str))
    (work / MANIFEST).write_text(json.dumps({**plain, SEAL: _seal(plain)}, indent=1) + "\n", encoding="utf-8")


def load(folder: str | Path, backbone: Backbone | None = None, *, verify: bool = True) -> Delta:
    """Read a delta from a folder, ours or another library's, or from the hub; with a backbone, check that it fits.

    DeltaFileError if a file is missing, of another version, tampered with, or lacks or adds a tensor; BackboneMismatch
    if the backbone has other weights. No code is imported from the folder.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    place = Path(folder)
    if not place.exists() and not place.parent.is_dir() and ADDRESS.fullmatch(str(folder)):
        from deltatune.delta.hub import pull

        try:
            place = pull(str(folder))
        except DeltaFileError as error:
            raise DeltaFileError(f"no folder {place}, and no delta on the hub: {error}") from error
    if place.is_dir() and not is_saved(place):
        from deltatune.delta.exchange import foreign

        library = foreign.library(place)
        if library is not None and backbone is None:
            raise DeltaFileError(
                f"{place} is a folder of {library}, which can be read onto a backbone only: give it to Delta.load, or "
                f"use `deltatune import {place} --backbone NAME --out OUT`"
            )
        if library is not None and backbone is not None:
            return foreign.read(place, backbone)
    manifest = _manifest(place)
    seal = _seal(manifest)
    try:
        spec = spec_from(manifest["spec"])
        sites = [(entry.pop("member"), _site(entry)) for entry in manifest["sites"]]
        delta = Delta(spec, sites, seed=manifest["seed"], name=manifest["name"])
        delta.backbone_name = manifest["backbone"]
        delta.record, delta.head = dict(manifest["record"]), head_from(manifest["head"])
        delta.fingerprint = dict(manifest["fingerprint"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, MemoryError) as error:
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise DeltaFileError(f"{place / MANIFEST} is damaged: {reason}") from error
    if seal != manifest.pop(SEAL, None):
        raise DeltaFileError(f"{place / MANIFEST} was changed after it was saved (its {SEAL} differs)")
    if _digest(place / TENSORS) != manifest["tensors_sha256"]:
        raise DeltaFileError(f"{place / TENSORS} is not the file that was saved with {MANIFEST} (its sha256 differs)")
    try:
        tensors = load_file(place / TENSORS)
    except SafetensorError as error:
        raise DeltaFileError(f"{place / TENSORS} is not a safetensors file: {error}") from error
    _fill(delta, tensors, place)
    if backbone is not None:
        from deltatune.delta.attach import check_fits

        check_fits(delta, backbone, verify=verify)
        delta.place(backbone)
    return delta


def is_saved(folder: str | Path) -> bool:
    """Say whether a folder holds a saved delta."""
    try:
        return (Path(folder) / MANIFEST).is_file()
    except OSError:  # no name of a file, such as one that is too long
        return False


def _manifest(place: Path) -> dict[str, Any]:
    if not place.is_dir():
        raise DeltaFileError(f"no folder {place}; expected one with {MANIFEST} and {TENSORS}")
    lacking = [name for name in (MANIFEST, TENSORS) if not (place / name).is_file()]
    if lacking:
        have = ", ".join(sorted(p.name for p in place.iterdir())[:6]) or "nothing"
        raise DeltaFileError(f"{place} is no saved delta: it lacks {' and '.join(lacking)} and holds {have}")
    try:
        manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DeltaFileError(f"{place / MANIFEST} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        got = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise DeltaFileError(f"{place / MANIFEST} has format {got!r}, this version reads {FORMAT!r}")
    return manifest


def _site(entry: dict[str, Any]) -> Site:
    view, heads = entry.pop("view"), entry.pop("heads")
    shapes = tuple((key, tuple(shape)) for key, shape in entry.pop("shapes"))
    return Site(**entry, view=View(**view) if view else None, heads=Heads(**heads) if heads else None, shapes=shapes)


def _fill(delta: Delta, tensors: dict[str, Tensor], place: Path) -> None:
    wanted = delta.tensors()
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        parts = [f"lacks {missing[0]!r}" if missing else "", f"has {extra[0]!r} as well" if extra else ""]
        more = len(missing) + len(extra) - 1
        raise DeltaFileError(
            f"{place / TENSORS} {' and '.join(filter(None, parts))}" + (f" ({more} more)" if more else "")
        )
    for name, value in tensors.items():
        if value.shape != wanted[name].shape:
            raise DeltaFileError(
                f"{place / TENSORS}: {name!r} has shape {tuple(value.shape)}, expected {tuple(wanted[name].shape)}"
            )
    for name, parameter in delta.named_parameters():
        # Not copied into, so that the file's dtype stays; nor the file's own memory, where tensors begin anywhere and
        # products round otherwise.
        parameter.data = tensors[name].clone()


def _seal(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` when the block ends well, and vanishes otherwise.

    OutputError if it cannot be written (no such parent, no permission, a full disk).
    """
    work: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        yield work
        for file in work.rglob("*"):
            if file.is_file():
                with file.open("r+b") as stream:  # Windows flushes only what is open for writing
                    os.fsync(stream.fileno())
        os.chmod(work, 0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
            os.rename(target, old / "was")
            try:
                os.rename(work, target)
            except OSError:
                os.rename(old / "was", target)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(work, target)
    except UserError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError":  # its message for a full disk
            raise OutputError(f"cannot write {target}: {error}") from error
        raise
    finally:
        if work is not None and work.exists():
            shutil.rmtree(work, ignore_errors=True)
