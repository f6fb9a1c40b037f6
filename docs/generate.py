"""Regenerate the tables of README.md and docs/ that come from the code or from stored measurements.

Run as: .venv/bin/python docs/generate.py [--check] [--quickstart]
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from deltatune.backbone.load import load
from deltatune.delta.catalogue import catalogue
from deltatune.delta.delta import Delta
from deltatune.studies.verbs import Runs, tune

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "quickstart.txt"
SILENT = ROOT / "docs" / "silent_dozen.json"


def methods_table() -> str:
    """The methods with their parameters on minilm and their default rates."""
    backbone = load("minilm")
    lines = ["| name | what | parameters on minilm | default rate | source |", "|---|---|---:|---:|---|"]
    for name, cls in catalogue().items():
        what = (cls.__doc__ or "").strip().splitlines()[0].rstrip(".")
        size = Delta.build(cls(), backbone).trainable()
        lines.append(f"| `{name}` | {what} | {size:,} | {cls.rate:g} | {cls.paper} |")
    return "\n".join(lines)


def quickstart() -> str:
    """What the README's own `tune` says; run anew with --quickstart, else what docs/quickstart.txt kept of it."""
    if "--quickstart" in sys.argv:
        with tempfile.TemporaryDirectory() as folder:
            runs = tune("minilm", "stdlib_pair", budget="4500steps", max_length=32, out=f"{folder}/best")
        KEPT.write_text(
            f"{runs.results[0]['sentence']}\n\nthreads {runs.results[0]['threads']}, {versions_line(runs)}\n"
        )
    if not KEPT.exists():
        return "> not run yet: `.venv/bin/python docs/generate.py --quickstart`"
    return "\n".join(f"> {line}".rstrip() for line in KEPT.read_text().splitlines())


def versions_line(runs: Runs) -> str:
    """Versions of what decided the figures."""
    return ", ".join(f"{name} {version}" for name, version in runs.results[0]["versions"].items())


def silent_dozen() -> str:
    """The calls that benchmarks/silent_dozen.py measured, both sides."""
    stored = json.loads(SILENT.read_text())
    parts = [
        f"`{library}`: {', '.join(f'{name} {number}' for name, number in versions.items())}."
        for library, versions in stored["versions"].items()
    ]
    for number, case in enumerate(stored["cases"], 1):
        parts.append(
            f"### {number}. {case['library']}: {case['call']}\n\n"
            f"Expected: {case['expected']}. Right is: {case['right']}.\n\n"
            f"- {case['library']}: {_side(case['theirs'])}. {case['note']}\n"
            f"- deltatune: {_side(case['ours'])}."
        )
    return "\n\n".join(parts)


def _side(side: dict[str, Any]) -> str:
    """One side of a case in words."""
    if side["refused"]:
        return f"**refused**: \u201c{side['refused'].rstrip('.')}\u201d"
    aloud = f", with {side['warned']} warnings" if side["warned"] else ""
    silent = ", and no warning" if side["verdict"] == "wrong" else ""
    moved = f"off where the delta moves the output by {side['scale']:.2g}"
    return f"**{side['verdict']}**, {side['off']:.2g} {moved}{aloud}{silent}"


BLOCKS = {"methods": methods_table, "quickstart": quickstart, "silent_dozen": silent_dozen}


def fill(text: str) -> str:
    """Replace every generated block of a page."""

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{BLOCKS[match[2]]()}\n{match[4]}"

    return re.sub(r"(<!-- generated: (\w+) -->)\n(.*?)(<!-- end -->)", block, text, flags=re.DOTALL)


def main() -> int:
    """Write the pages, or with --check say which are out of date."""
    stale = []
    for page in (ROOT / "README.md", ROOT / "docs" / "silent-dozen.md"):
        old = page.read_text()
        new = fill(old)
        if new != old:
            stale.append(page.name)
            if "--check" not in sys.argv:
                page.write_text(new)
    if stale:
        print(("out of date: " if "--check" in sys.argv else "written: ") + ", ".join(stale))
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
