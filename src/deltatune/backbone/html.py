"""What a notebook shows of a model, a delta or a bank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape


def facts(title: str, said: Mapping[str, object]) -> str:
    """Return a heading and a table of two columns; what is empty is left out."""
    return (
        f"<b>{escape(title)}</b>{grid([], [(name, value) for name, value in said.items() if value not in ('', None)])}"
    )


def grid(heading: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table."""
    top = "".join(f"<th>{escape(one)}</th>" for one in heading)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{f'<tr>{top}</tr>' if top else ''}{body}</table>"
