"""Every error that a user's mistake can raise.

    DeltatuneError              base; the command line prints it as one line and exits with `exit_status`
    ├── UserError               a mistake in what was asked for (exit status 2)
    │   ├── UnknownName         a name that is not in a closed list; carries the nearest valid ones
    │   ├── DeltaExpressionError  a delta expression that does not parse; points at the place
    │   ├── SiteError           a site that this backbone lacks, an empty or partly matched selection
    │   ├── BackboneError       a backbone that cannot be loaded or understood
    │   ├── BackboneMismatch    a delta that was trained on another backbone
    │   ├── DeltaFileError      a saved delta that is missing, damaged, tampered with or of another version
    │   ├── TaskError           a task file or folder that is absent, empty, malformed or has other columns
    │   ├── RoutingError        rows, deltas and calls that do not fit together
    │   └── OutputError         an output place that exists already or cannot be written
    └── Interrupted             stopped by the user; the work can be resumed (exit status 130)

A message says what was got, what was expected, the nearest valid names and the fix, in one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DeltatuneError(Exception):
    """Base of all errors of this package."""

    exit_status = 1


class UserError(DeltatuneError):
    """A mistake in what was asked for."""

    exit_status = 2


class UnknownName(UserError):
    """A name outside a closed list, with the nearest valid names."""

    def __init__(self, what: str, got: str, valid: Iterable[str], fix: str = "") -> None:
        self.got, self.valid = got, sorted(valid)
        super().__init__(f"unknown {what} {got!r}{nearest(got, self.valid)}{'; ' + fix if fix else ''}")


class DeltaExpressionError(UserError):
    """A delta expression that does not parse; `text` and `position` say where."""

    def __init__(self, message: str, text: str, position: int) -> None:
        self.text, self.position, self.reason = text, position, message
        super().__init__(f"{message} (at character {position + 1} of {text!r}: {text[:position]}»{text[position:]})")


class SiteError(UserError):
    """A site that this backbone lacks, or an empty or partly matched selection."""


class BackboneError(UserError):
    """A backbone that cannot be loaded or understood."""


class BackboneMismatch(UserError):
    """A delta that was trained on another backbone."""


class DeltaFileError(UserError):
    """A saved delta that is missing, damaged, tampered with or of another version."""


class TaskError(UserError):
    """A task file or folder that is absent, empty, malformed or has other columns."""


class RoutingError(UserError):
    """Rows, deltas and calls that do not fit together."""


class OutputError(UserError):
    """An output place that exists already or cannot be written."""


class Interrupted(DeltatuneError):
    """Stopped by the user; the message says how to resume."""

    exit_status = 130


def nearest(got: str, valid: Iterable[str], most: int = 4) -> str:
    """Return `"; nearest: a, b"`, the close matches of `got` among `valid`, or all of a short list."""
    names = sorted(valid)
    close = difflib.get_close_matches(got, names, n=most, cutoff=0.5)
    if close:
        return f"; nearest: {', '.join(close)}"
    return f"; valid: {', '.join(names)}" if 0 < len(names) <= 12 else ""
