"""Images in rows: a file's path, or the file itself as a data URI (RFC 2397). Folders of images, one for each label."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltatune.data.formats import Table
from deltatune.errors import TaskError, nearest

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
INLINE = "data:"


def opened(image: str) -> Image:
    """Return an image as Pillow has it. TaskError if the file is absent or no image."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(_bytes(image))) as made:
            made.load()
            return made
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise TaskError(f"{image[:80]!r} cannot be read as an image: {str(error)[:120]}") from error


def _bytes(image: str) -> bytes:
    if image.startswith(INLINE):
        return base64.b64decode(image.partition(",")[2])
    return Path(image).read_bytes()


@lru_cache(maxsize=100_000)
def digest_of(image: str) -> str:
    """Return the sha256 (hex) of an image file's bytes. TaskError if it cannot be read."""
    try:
        return hashlib.sha256(_bytes(image)).hexdigest()
    except (OSError, ValueError) as error:
        raise TaskError(f"image {image[:80]!r} cannot be read: {error}") from error


def named(image: str) -> str:
    """Return how an image is called where one has to do with a line: its path, or the start of its digest."""
    return f"image {digest_of(image)[:12]}" if image.startswith(INLINE) else image


def inline(image: Image) -> str:
    """Return an image as a data URI of a PNG file."""
    stream = io.BytesIO()
    # Stored and not deflated: deflate's output differs between versions of zlib, and with it the task's fingerprint.
    image.save(stream, format="PNG", compress_level=0)
    return f"{INLINE}image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def placed(cell: Any, where: str, folder: Path) -> str:
    """Return a cell as an image: a path from the table's own folder, unless absolute, or a data set's {"bytes": ...}.

    TaskError if no file is there, or the cell is something else.
    """
    if isinstance(cell, dict) and isinstance(cell.get("bytes"), bytes):
        return f"{INLINE}image;base64,{base64.b64encode(cell['bytes']).decode()}"
    if not isinstance(cell, str):
        raise TaskError(f"{where}: image is of type {type(cell).__name__}; expected the path of a file")
    if cell.startswith(INLINE):
        return cell
    path = folder / Path(cell).expanduser()
    if not path.is_file():
        raise TaskError(f"{where}: no image file {str(path)!r}{nearest(path.name, _beside(path))}")
    return str(path)


def _beside(path: Path) -> list[str]:
    return [one.name for one in path.parent.iterdir() if _is_image(one)] if path.parent.is_dir() else []


def image_folder(path: Path, names: Mapping[str, Sequence[str]]) -> dict[str, Table]:
    """Return the tables of a folder of images: LABEL/IMAGE, or SPLIT/LABEL/IMAGE; {} for a folder without images.

    `names` are what a split's folder may be called. TaskError for images that stand beside the folders of labels.
    """
    splits = {split: path / name for split, own in names.items() for name in own if (path / name).is_dir()}
    found = {split: _labelled(one) for split, one in (splits if "train" in splits else {"train": path}).items()}
    return found if any(table.rows for table in found.values()) else {}


def _labelled(path: Path) -> Table:
    loose = [one.name for one in path.iterdir() if _is_image(one)]
    labels = [one for one in sorted(path.iterdir()) if one.is_dir() and not one.name.startswith(".")]
    files = [file for label in labels for file in sorted(label.iterdir()) if _is_image(file)]
    if loose and files:
        raise TaskError(f"{path}: {loose[0]} and {len(loose) - 1} more images stand in no folder of a label; move them")
    rows = [{"image": str(file.relative_to(path)), "label": file.parent.name} for file in files]
    return Table(str(path / "*"), ("image", "label"), rows, [str(row["image"]) for row in rows])


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()
