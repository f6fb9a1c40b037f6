"""`deltatune inspect`: what is in a saved delta."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltatune.cli.options import AsJson, Folder
from deltatune.cli.output import plain, say, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from deltatune.delta.delta import Delta

EXAMPLE = "deltatune inspect best/"


def inspect(folder: Folder, as_json: AsJson = False) -> None:
    """Show what is in a saved delta: spec, sites with their norms, head, task, metrics, settings, versions."""
    from deltatune.cli.saved import read

    found = described(read(folder), folder)
    say(found, as_json, *_shown(found))


def described(delta: Delta, folder: Path) -> dict[str, Any]:
    """Return a saved delta as plain data."""
    from deltatune.delta.files import MANIFEST, TENSORS, spec_record
    from deltatune.delta.head import head_record

    norms = delta.norms()
    sites: dict[str, dict[str, Any]] = {}
    for site, layer in delta.at_sites():
        one = sites.setdefault(site.key, {"site": site.key, "layers": [], "parameters": 0, "norm": norms[site.key]})
        one["layers"].append(type(layer).__name__)
        one["parameters"] += sum(p.numel() for p in layer.parameters())
    head = head_record(delta.head)
    if head is not None and delta.head is not None:
        head["parameters"] = sum(p.numel() for p in delta.head.parameters())
    record = delta.record
    return {
        "folder": str(folder),
        "name": delta.name,
        "delta": str(delta.spec),
        "spec": spec_record(delta.spec),
        "seed": delta.seed,
        "trainable": delta.trainable(),
        "bytes": sum((folder / name).stat().st_size for name in (MANIFEST, TENSORS)),
        "backbone": delta.backbone_name,
        "fingerprint": delta.fingerprint,
        "sites": list(sites.values()),
        "head": head,
        **{name: record.get(name) for name in ("task", "metrics", "settings", "steps", "best_step", "precision")},
        **{name: record.get(name) for name in ("threads", "versions")},
    }


def _shown(found: dict[str, Any]) -> Sequence[RenderableType]:
    from deltatune.studies.formatting import magnitude, size

    facts = table("", "")
    facts.show_header = False
    task, head = found["task"] or {}, found["head"] or {}
    for name, value in (
        ("delta", found["delta"]),
        ("parameters", f"{found['trainable']:,} ({size(found['bytes'])} on disk)"),
        ("backbone", f"{found['backbone']} ({found['fingerprint'].get('exact', 'no fingerprint')})"),
        ("head", f"{head['head']}, {head['parameters']:,} parameters" if head else "none"),
        ("task", f"{task['name']} ({task['kind']}, {task['metric']}; {_labels(task['labels'])})" if task else "none"),
        ("scores", _pairs({f"{s} {m}": v for s, of in (found["metrics"] or {}).items() for m, v in of.items()})),
        ("trained", _trained(found)),
        ("settings", _pairs(found["settings"] or {})),
        ("versions", _pairs(found["versions"] or {})),
    ):
        facts.add_row(name, value)
    sites = table("site", "layer", "parameters", "norm", right=("parameters", "norm"))
    for one in found["sites"]:
        sites.add_row(one["site"], " ".join(one["layers"]), f"{one['parameters']:,}", magnitude(plain(one["norm"])))
    return [facts, sites] if found["sites"] else [facts, "No sites: a head on frozen features."]


def _labels(labels: Sequence[str]) -> str:
    shown = ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")
    return f"{len(labels)} labels: {shown}" if labels else "no labels"


def _trained(found: dict[str, Any]) -> str:
    if found["steps"] is None:
        return "not by `deltatune fit`"
    best = f"best on dev at step {found['best_step']}"
    return f"{found['steps']} steps from seed {found['seed']}, {best}, {found['precision']}, {found['threads']} threads"


def _pairs(values: dict[str, Any]) -> str:
    def one(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name} {one(value)}" for name, value in values.items() if value is not None) or "–"
