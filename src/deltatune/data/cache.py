"""A user's cache folder for what takes over a second to make."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder for what can be made again: `$XDG_CACHE_HOME/deltatune`, else `~/.cache/deltatune`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification: a relative path is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "deltatune"


def cached(name: str, key: str, make: Callable[[], str]) -> str:
    """Return the text stored under `name` and `key`, made and stored first where absent or damaged.

    Written whole or not at all; where the folder cannot be written the text is made anew each time.
    """
    file_name = f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.gz"
    with contextlib.suppress(OSError, EOFError, zlib.error, RuntimeError):
        return gzip.decompress((cache_folder() / file_name).read_bytes()).decode()
    text = make()
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home folder
        path = cache_folder() / file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(gzip.compress(text.encode(), mtime=0))
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    return text
