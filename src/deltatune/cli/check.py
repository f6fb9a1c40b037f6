"""`deltatune check`: hold a method of your own against the laws."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltatune.cli.options import AsJson
from deltatune.cli.output import note, say, table
from deltatune.errors import UnknownName, UserError

if TYPE_CHECKING:
    from deltatune.delta.method import Method

EXAMPLE = "deltatune check my_method.py"


def check(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.py", show_default=False, help="It is imported, so read it first.")
    ],
    families: Annotated[
        list[str] | None,
        typer.Option(
            "--family",
            metavar="FAMILY",
            show_default=False,
            help="A family to check on (may be repeated); left out: all.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the laws that every method keeps on the methods of a file, on tiny random models of each family.

    The exit status is 0 if all hold and 2 if one is broken.
    """
    from deltatune.backbone.load import Backbone
    from deltatune.laws import check_method
    from deltatune.laws.families import FAMILIES, tiny

    for family in families or ():
        if family not in FAMILIES:
            raise UnknownName("family", family, FAMILIES)
    backbones = [Backbone(tiny(family), name=family) for family in families or FAMILIES]
    with imported(file) as methods:
        results = []
        for method in methods:
            for backbone in backbones:
                note(f"{method.name()} on {backbone.name} ...")
                results += check_method(method, [backbone])
    broken = [one for one in results if not one.holds]
    answer = {
        "file": str(file),
        "holds": not broken,
        "laws": [
            {"law": one.law, "method": one.method, "backbone": one.backbone, "holds": one.holds, "fault": _fault(one)}
            for one in results
        ],
    }
    counted = f"{len(results) - len(broken)} of {len(results)} laws hold on {len(backbones)} families."
    say(answer, as_json, counted, *([_faults(broken)] if broken else []))
    if broken:
        first = broken[0]
        raise UserError(
            f"{first.method} breaks {first.law} on {first.backbone}: {_fault(first)} ({len(broken)} in all)"
        )


def _fault(one: Any) -> str | None:
    return one.fault.removeprefix("LawBroken: ") or None


def _faults(broken: Sequence[Any]) -> Any:
    made = table("law", "method", "on", "fault")
    for one in broken:
        made.add_row(one.law, one.method, one.backbone, _fault(one))
    return made


@contextmanager
def imported(file: Path) -> Iterator[list[type[Method]]]:
    """Import a file and yield the methods that it defines; they are in the catalogue for as long as the block runs.

    UserError if it cannot be imported, or defines no method, or one whose name is taken.
    """
    from deltatune.delta.catalogue import catalogue

    known = catalogue()
    module = _module(file)
    added: list[str] = []
    try:
        methods = _methods(module, file)
        for method in methods:
            name = method.name()
            if name in known:
                raise UserError(f"{file}: the name {name!r} is taken by {known[name].__module__}; choose another")
            known[name] = method  # what is saved is read again by the method's name
            added.append(name)
        yield methods
    finally:
        for name in added:
            del known[name]
        del sys.modules[module.__name__]


def _module(file: Path) -> ModuleType:
    if not file.is_file() or file.suffix != ".py":
        raise UserError(f"no Python file {file}; expected one such as my_method.py that defines a method")
    name = f"deltatune_checked_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # copies of a layer are found by the name of its module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        line = getattr(error, "lineno", None) or _line(error, file)
        raise UserError(f"{file}{f': line {line}' if line else ''}: {type(error).__name__}: {error}") from error
    return module


def _line(error: Exception, file: Path) -> int | None:
    import traceback

    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file.absolute()]
    return lines[-1] if lines else None


def _methods(module: ModuleType, file: Path) -> list[type[Method]]:
    from deltatune.delta.method import Method

    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    if not found:
        raise UserError(
            f"{file} defines no method: expected a class that derives from deltatune.delta.method.Method and "
            f"has family, paper, lr, at and layer()"
        )
    for cls in found:
        lacking = [name for name in ("family", "paper", "lr") if not hasattr(cls, name)]
        if lacking:
            raise UserError(f"{file}: {cls.__name__} lacks {', '.join(lacking)}; declare them as class variables")
    return found
