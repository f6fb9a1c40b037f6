"""Deltas on the Hugging Face hub: pushed with a generated card, pulled by `user/repo` or `user/repo@revision`.

The hub's own client does the work; it takes the address of the hub and the token from its environment variables and
its login.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltatune.backbone.embedded import EMBEDDED
from deltatune.delta.delta import Delta
from deltatune.delta.files import ADDRESS, MANIFEST, TENSORS, save_into
from deltatune.errors import DeltaFileError, OutputError, UserError


def push(delta: Delta, repo: str, *, private: bool = False, message: str = "") -> str:
    """Upload a delta with its card to a repository, which is made if it is not there; return its address.

    OutputError if the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    address(repo)
    with tempfile.TemporaryDirectory() as folder, _in_one_line(f"cannot push to {repo}", OutputError):
        save_into(delta, Path(folder))
        (Path(folder) / "README.md").write_text(card(delta, repo), encoding="utf-8")
        hub = HfApi()
        hub.create_repo(repo, private=private or None, exist_ok=True)
        made = hub.upload_folder(repo_id=repo, folder_path=folder, commit_message=message or f"deltatune: {delta.spec}")
    return f"{repo}@{made.oid}"


def pull(where: str) -> Path:
    """Fetch a delta by `user/repo` or `user/repo@revision` into the hub's cache, and return its folder there.

    DeltaFileError if it is not there or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    repo, revision = address(where)
    with _in_one_line(f"cannot fetch {where}", DeltaFileError):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[MANIFEST, TENSORS, "adapter_*"]))


def address(where: str) -> tuple[str, str | None]:
    """Return repository and revision. UserError for what is no address on the hub."""
    found = ADDRESS.fullmatch(where)
    if not found:
        raise UserError(f"{where!r} is no address on the hub; expected user/repo or user/repo@revision")
    return found["repo"], found["revision"]


def card(delta: Delta, repo: str) -> str:
    """Return the card of a delta: what it is, what it scores, how it was trained, how it is used."""
    base = EMBEDDED[delta.backbone_name].hub if delta.backbone_name in EMBEDDED else delta.backbone_name
    record = delta.record
    task: dict[str, Any] = record.get("task") or {}
    front = ["library_name: deltatune", f"tags: [deltatune, {', '.join(_names(delta))}]"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        front.insert(0, f"base_model: {base}")
    lines = ["---", *front, "---", "", f"# {repo.partition('/')[2]}", ""]
    lines += [f"A delta for `{base}`: `{delta.spec}`, {delta.trainable():,} parameters."]
    if task:
        lines += ["", f"Trained on {task['name']} ({task['kind'].replace('_', ' ')})."]
    scores = [(split, name, value) for split, of in (record.get("metrics") or {}).items() for name, value in of.items()]
    if scores:
        lines += ["", "| split | metric | score |", "|---|---|---:|"]
        lines += [f"| {split} | {name.replace('_', ' ')} | {100 * value:.1f} |" for split, name, value in scores]
    lines += ["", "```python", "import deltatune as dt", "", f'model = dt.load("{delta.backbone_name}")']
    lines += [f'adapted = dt.adapt(model, dt.Delta.load("{repo}", model))', "```"]
    settings = record.get("settings") or {}
    if settings:
        lines += ["", f"Settings: {_listed(settings)}."]
    if record.get("versions"):
        lines += ["", f"Versions: {_listed(record['versions'])}."]
    return "\n".join(lines) + "\n"


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )


def _names(delta: Delta) -> list[str]:
    from deltatune.delta.method import members

    return list(dict.fromkeys(method.name() for method in members(delta.spec)))


@contextmanager
def _in_one_line(what: str, error: type[UserError]) -> Iterator[None]:
    """Turn whatever the hub's client raises into one line with the fix."""
    try:
        yield
    except UserError:
        raise
    except Exception as cause:
        reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        fix = "log in with `hf auth login`, or correct the name" if _refused(cause) else "is there a network?"
        raise error(f"{what}: {reason.strip()}; {fix}") from cause


def _refused(cause: Exception) -> bool:
    return getattr(getattr(cause, "response", None), "status_code", 0) in (401, 403, 404)
