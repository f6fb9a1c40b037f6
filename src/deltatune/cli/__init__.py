"""The command line: `main` runs a verb and returns its exit status; each verb is one file."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    `arguments` are the words after `deltatune`; None takes them from the process. 0: done. 2: a mistake in what was
    asked for, in one line on stderr. 130: interrupted. 1: a fault of this program.
    """
    from deltatune.cli.run import run

    return run(arguments)
