"""Docstrings of the Python standard library, read from its sources (never imported)."""

from __future__ import annotations

import ast
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from deltatune.data.cache import cached
from deltatune.errors import TaskError

# Absent from some distributions, or tests and demonstrations, or (encodings) one sentence repeated 80 times.
LEFT_OUT = (
    "site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "distutils", "ensurepip",
    "pydoc_data", "turtledemo", "tkinter", "turtle", "encodings", "__phello__",
)  # fmt: skip
PUBLIC_NAMES = {"_pydecimal": "decimal", "_pyio": "io", "_pydatetime": "datetime", "_pylong": "int"}


@dataclass(frozen=True)
class Entry:
    """One documented object: where it stands, what it is, its parameters, docstring and source."""

    package: str
    module: str
    name: str
    what: Literal["function", "method", "class", "module"]
    parameters: tuple[str, ...]
    doc: str
    code: str


def entries() -> list[Entry]:
    """Return every documented object of this interpreter's standard library, in the order of its files.

    Raises TaskError where the interpreter comes without its library's sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    version = ".".join(map(str, sys.version_info[:3]))
    # This file's text is in the key: what is cached is what this code finds.
    key = f"{root}\n{Path(__file__).read_text('utf-8')}"
    rows = cached(f"stdlib-{version}", key, make=lambda: json.dumps([asdict(e) for e in _walk(root)]))
    found = [Entry(**{**row, "parameters": tuple(row["parameters"])}) for row in json.loads(rows)]
    if not found:
        raise TaskError(f"no sources of the Python standard library under {root}; use an interpreter that has them")
    return found


def _walk(root: Path) -> Iterator[Entry]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if any(part in LEFT_OUT or part.startswith("config-") for part in parts):
            continue
        try:
            source = path.read_text("utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of an escape or a comparison in somebody else's code
                tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        package = PUBLIC_NAMES.get(parts[0], parts[0])
        yield from _documented(tree, source.split("\n"), package, module, inside=None)


def _documented(node: ast.AST, lines: list[str], package: str, module: str, inside: str | None) -> Iterator[Entry]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        doc = ast.get_docstring(node)
        if doc:
            yield Entry(
                package,
                module,
                getattr(node, "name", module),
                _what(node, inside),
                _parameters(node),
                doc,
                _code(node, lines),
            )
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, lines, package, module, inside=type(node).__name__)


def _what(node: ast.AST, inside: str | None) -> Literal["function", "method", "class", "module"]:
    if isinstance(node, ast.Module):
        return "module"
    if isinstance(node, ast.ClassDef):
        return "class"
    return "method" if inside == "ClassDef" else "function"


def _parameters(node: ast.AST) -> tuple[str, ...]:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return ()
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    given += [one for one in (node.args.vararg, node.args.kwarg) if one]
    return tuple(one.arg for one in given if one.arg not in ("self", "cls"))


def _code(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """Return a short function's source without its docstring; empty for anything else, to keep the cache small."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
        return ""
    if (node.end_lineno or 0) - node.lineno > 40:
        return ""
    body = lines[node.lineno - 1 : node.body[0].lineno - 1] + lines[node.body[0].end_lineno : node.end_lineno]
    # Not textwrap.dedent: a line of a text in triple quotes may stand further left than the function.
    indent = body[0][: node.col_offset]
    return "\n".join(line.removeprefix(indent) for line in body)
