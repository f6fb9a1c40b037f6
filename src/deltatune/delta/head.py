"""How a head travels with its delta: its class by name from a closed table, and its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from deltatune.errors import DeltaFileError, UserError

_HEADS: dict[str, type[Head]] = {}


class Head(nn.Module):
    """Base of all heads: turns outputs into predictions. Subclasses are known by their class names.

    `arguments` are the constructor's, as plain data.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _HEADS[cls.__name__] = cls

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments as plain data."""
        raise NotImplementedError

    def with_labels(self, labels: Sequence[str]) -> Head:
        """Return a head with further labels. UserError for a head that has no row of its own for each label."""
        raise UserError(f"a {type(self).__name__} head has no labels to add {', '.join(labels)} to")


def head_record(head: nn.Module | None) -> dict[str, Any] | None:
    """A head as plain data, without its tensors."""
    return {"head": type(head).__name__, **head.arguments} if isinstance(head, Head) else None


def head_from(record: dict[str, Any] | None) -> Head | None:
    """Make a head from `head_record`'s data. DeltaFileError for an unknown one."""
    if record is None:
        return None
    arguments = dict(record)
    name = arguments.pop("head")
    if name not in _HEADS:
        raise DeltaFileError(f"the delta carries a head {name!r} that this version does not know: {sorted(_HEADS)}")
    return _HEADS[name](**arguments)
