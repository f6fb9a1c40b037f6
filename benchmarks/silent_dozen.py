"""Measure twelve ordinary calls of PEFT and adapters that give wrong numbers without a word, and the same calls here.

Run as: .venv/bin/python benchmarks/silent_dozen.py [--adapters]

With `--adapters` an environment of its own is made for adapters under the cache folder (pinned versions, once); without
it the figures of its three calls stay the stored ones. Every figure is a distance from an output that is computed another
way. A call that is right by now is said to be so. `docs/generate.py` writes the page from what is stored.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from silent import adapters_calls, peft_calls
from silent.case import Case, Measured, attempted

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "silent_dozen.json"

Record = dict[str, Any]


def told(measured: Measured) -> Record:
    """A side as plain data; figures to three digits, since further ones differ by machine."""
    return {**asdict(measured), "off": float(f"{measured.off:.3g}"), "scale": float(f"{measured.scale:.3g}")} | {
        "verdict": measured.verdict
    }


def record(case: Case, theirs: Record) -> Record:
    """A case with both its sides as plain data."""
    words = {name: getattr(case, name) for name in ("name", "library", "call", "expected", "right", "note")}
    return {**words, "theirs": theirs, "ours": told(attempted(case.ours))}


def main() -> int:
    """Run the cases and store them; the exit status is 1 where one of ours is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--adapters", action="store_true", help="run the calls of adapters, too, in their own environment"
    )
    parser.add_argument("--kept", type=Path, default=KEPT, help="file of the stored figures")
    chosen = parser.parse_args()
    stored = json.loads(chosen.kept.read_text()) if chosen.kept.exists() else {"versions": {}, "cases": []}
    warnings.simplefilter("ignore")
    cases = [record(case, told(case.theirs())) for case in peft_calls.CASES if case.theirs]
    here = {package.__name__: package.__version__ for package in (peft, transformers, torch)}
    figures = {case["name"]: case["theirs"] for case in stored["cases"] if case["library"] == "adapters"}
    there = stored["versions"].get("adapters", {})
    if chosen.adapters:
        try:
            measured, there = adapters_calls.theirs()
            figures = {name: told(one) for name, one in measured.items()}
        except adapters_calls.Skipped as reason:
            print(f"adapters skipped: {reason}")
    cases += [record(case, figures[case.name]) for case in adapters_calls.CASES if case.name in figures]
    chosen.kept.write_text(
        json.dumps({"versions": {"peft": here, "adapters": there}, "cases": cases}, indent=1, ensure_ascii=False) + "\n"
    )
    for case in cases:
        print(f"{case['library']:8} {case['name']:15} theirs {_said(case['theirs'])}; ours {_said(case['ours'])}")
    return int(any(case["ours"]["verdict"] == "wrong" for case in cases))


def _said(side: Record) -> str:
    return f"refused: {side['refused']}" if side["refused"] else f"{side['verdict']}, off by {side['off']:g}"


if __name__ == "__main__":
    sys.exit(main())
