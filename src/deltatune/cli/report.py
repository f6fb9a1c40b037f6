"""`deltatune report`: make the report of a finished run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from deltatune.cli.options import AsJson
from deltatune.cli.output import say
from deltatune.errors import UserError

EXAMPLE = "deltatune report best/"
RESULT, REPORT = "result.json", "report.html"


def report(
    out: Annotated[Path, typer.Argument(metavar="OUT", show_default=False, help="The folder of a fit, tune or demo.")],
    as_json: AsJson = False,
) -> None:
    """Write report.html again from a run's result.json; for a run of several tasks, that of each task."""
    from deltatune.studies.report import write_report

    found = [(file, _result(file)) for file in _files(out)]
    written = [str(write_report(result, file.with_name(REPORT))) for file, result in found]
    say({"written": written}, as_json, *written)


def _files(out: Path) -> list[Path]:
    if (out / RESULT).is_file():
        return [out / RESULT]
    files = sorted(out.glob(f"*/{RESULT}"))
    if not files:
        missing = f"{out} holds no {RESULT}" if out.is_dir() else f"no folder {out}"
        raise UserError(f"{missing}; expected the --out of a finished `deltatune fit`, `tune` or `demo`")
    return files


def _result(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
