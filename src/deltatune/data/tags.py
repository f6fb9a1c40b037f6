"""BIO tags: what is well formed, and what is repaired as seqeval's lenient reading does."""

from __future__ import annotations

import re
from collections.abc import Iterable

from deltatune.data.rows import Placed
from deltatune.errors import TaskError

# BIOES and BILOU say in more letters what BIO says.
AS_BIO = {"B": "B", "I": "I", "E": "I", "S": "B", "L": "I", "U": "B"}
WELL_FORMED = re.compile(r"([BIESLU])-(.+)", re.DOTALL)


def is_bio(tags: Iterable[str]) -> bool:
    """Return whether tags mark spans (B-PER, I-PER, O), not a class of each token as parts of speech do."""
    return any(tag.startswith(("B-", "I-")) for tag in tags)


def repaired(placed: list[Placed]) -> tuple[list[Placed], int]:
    """Return the rows in strict BIO, and in how many of them a tag was changed.

    An `I-` that continues nothing begins a span, as in conlleval and seqeval's default mode, so no entity changes;
    E-, S-, L- and U- become I- and B-. Raises TaskError, the row named, for any other tag.
    """
    made, changed = [], 0
    for where, row in placed:
        tags = strict(row["tags"], where)
        changed += tags != row["tags"]
        made.append((where, {**row, "tags": tags}))
    return made, changed


def strict(tags: list[str], where: str) -> list[str]:
    """Return one row's tags in strict BIO."""
    made, inside = [], ""
    for number, tag in enumerate(tags, 1):
        parts = WELL_FORMED.fullmatch(tag)
        if tag != "O" and not parts:
            raise TaskError(f"{where}: tag {number} is {tag!r}; expected O, B-TYPE or I-TYPE")
        if not parts:
            made.append("O")
            inside = ""
            continue
        mark = AS_BIO[parts[1]]
        made.append(f"{'B' if parts[2] != inside else mark}-{parts[2]}")
        inside = "" if parts[1] in "ESLU" else parts[2]
    return made
