"""Delta tuning: adapt frozen pre-trained models by training a small delta instead of the model."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# Public name -> the module that defines it. Modules load on first use, so that `import deltatune` never loads torch.
_LAZY: dict[str, str] = {}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
