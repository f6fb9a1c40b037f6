"""Names beside points, each in the first free place around its point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

# Pixels right and up, horizontal and vertical alignment: from the point or, where it says so, from its bar's end.
_PLACES: tuple[tuple[float, float, str, str], ...] = (
    (11, 0, "left", "center"),
    (-11, 0, "right", "center"),
    (9, 9, "left", "bottom"),
    (9, -9, "left", "top"),
    (-9, 9, "right", "bottom"),
    (-9, -9, "right", "top"),
    (0, 4, "center", "top of bar"),
    (0, -4, "center", "bottom of bar"),
    (20, 0, "left", "center"),
    (14, 24, "left", "bottom"),
    (14, -24, "left", "top"),
)
_ALIGNED = {"top of bar": "bottom", "bottom of bar": "top"}


def place_labels(
    axes: Axes,
    labels: Sequence[tuple[str, float, tuple[float, float, float], str]],
    bars: Sequence[tuple[float, float, float, float, float]],
    texts: Sequence[Any],
) -> None:
    """Write each `(text, x, (mean, low, high), colour)` where it covers nothing.

    Not a bar `(x, mean, low, high, pixels to the right)` with its marker, nor any other text. A label without a free
    place is left out: the table has it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    renderer = FigureCanvasAgg(axes.figure).get_renderer()
    axes.figure.draw(renderer)
    to_pixels = axes.transData.transform
    taken: list[Bbox] = [text.get_window_extent(renderer) for text in texts]
    for x, mean, low, high, shift in bars:
        (centre, bottom), (_, top), (_, middle) = to_pixels((x, low)), to_pixels((x, high)), to_pixels((x, mean))
        centre += shift
        taken.append(Bbox.from_extents(centre - 3, bottom - 2, centre + 3, top + 2))
        taken.append(Bbox.from_extents(centre - 6, middle - 6, centre + 6, middle + 6))
    frame = axes.get_window_extent(renderer)
    for text, x, (mean, low, high), colour in labels:
        for dx, dy, horizontal, vertical in _PLACES:
            y = high if vertical == "top of bar" else low if vertical == "bottom of bar" else mean
            written = axes.annotate(text, (x, y), (dx, dy), textcoords="offset points", ha=horizontal, color=colour,
                                    va=_ALIGNED.get(vertical, vertical))  # fmt: skip
            box = written.get_window_extent(renderer)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            written.remove()
