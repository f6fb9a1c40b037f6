"""A matplotlib figure as SVG for inside an HTML page: its colours and font are the page's.

Why matplotlib: alive since 2003, writes SVG with its text as text, needs no JavaScript (Plotly's is 4 MB a page).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Each role is drawn in a colour that occurs nowhere else and becomes a CSS variable, so dark mode and print restyle it.
INK, MUTED, RULE, FIRST, SECOND, GROUND = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
_VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", FIRST: "first", SECOND: "second", GROUND: "ground"}

_STYLE: dict[str, object] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "deltatune",
    # A user's delta or label may hold a dollar sign.
    "text.parse_math": False,
    "font.size": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "text.color": INK,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
}


@contextmanager
def canvas(width: float, height: float) -> Iterator[Figure]:
    """Give an empty figure of `width` by `height` pixels in the style of the report."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        # 72 dots an inch: a unit of the figure is a pixel of the page.
        yield Figure(figsize=(width / 72, height / 72), dpi=72)


def to_svg(figure: Figure, name: str, label: str, tips: Mapping[str, str] | None = None) -> Markup:
    """Return the drawing as an `<svg>` element whose ids start with `name` and whose `aria-label` is `label`.

    `tips` maps the gid of an artist to the text that appears when it is pointed at.
    """
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = buffer.getvalue()
    view = re.search(r'viewBox="([^"]+)"', text)
    assert view, "matplotlib wrote an SVG without a viewBox"
    body = text[text.index(">", view.start()) + 1 : text.rindex("</svg>")]
    # The page's style sheet holds this rule; here it would apply to the whole page.
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href=", "href=")
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", body)
    body = re.sub(r"font-family: [^;\"]+", "font-family: var(--font)", body)
    body = re.sub(r'\b(d|x|y|transform)="[^"]+"', lambda found: re.sub(r"(\.\d)\d+", r"\1", found[0]), body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    for gid, tip in (tips or {}).items():
        body = body.replace(f'<g id="{name}-{gid}">', f'<g id="{name}-{gid}"><title>{escape(tip)}</title>')
    body = re.sub(r"\s*\n\s*", "\n", body)
    return Markup(f'<svg class="drawing" role="img" aria-label="{escape(label)}" viewBox="{view[1]}">{body}</svg>')
