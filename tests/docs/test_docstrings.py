"""What is public says what it is: modules, classes, and functions and methods of more than a few lines."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import deltatune

LINES = 8  # a shorter function is read as quickly as a sentence about it
MODULES = [
    found.name
    for found in pkgutil.walk_packages(deltatune.__path__, "deltatune.")
    if not found.name.endswith("__main__")  # whose import runs the command line
]


def public(node: ast.AST, path: str = "") -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef]]:
    """Public classes, functions and methods by their qualified name; not what stands inside a function."""
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.ClassDef | ast.FunctionDef):
            if not inner.name.startswith("_"):
                yield path + inner.name, inner
                if isinstance(inner, ast.ClassDef):
                    yield from public(inner, f"{path}{inner.name}.")
        elif not isinstance(inner, ast.expr):
            yield from public(inner, path)  # under an `if` or a `try`


def inherits(module: ModuleType, name: str) -> bool:
    """Whether a method overrides a documented one: it means the same."""
    owner, _, method = name.rpartition(".")
    bases = inspect.getmro(getattr(module, owner))[1:] if owner else ()
    return any(getattr(vars(base).get(method), "__doc__", None) for base in bases)


def undocumented(module: ModuleType) -> list[str]:
    """Names of a module that lack a docstring."""
    tree = ast.parse(inspect.getsource(module))
    found = [] if ast.get_docstring(tree) or not tree.body else [module.__name__]
    for name, node in public(tree):
        counts = isinstance(node, ast.ClassDef) or (node.end_lineno or 0) - node.lineno >= LINES
        if counts and not ast.get_docstring(node) and not inherits(module, name):
            found.append(name)
    return found


def test_what_is_public_has_a_docstring() -> None:
    assert {name: found for name in MODULES if (found := undocumented(importlib.import_module(name)))} == {}


def test_what_lacks_one_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "\n".join(f"        x{i} = {i}" for i in range(LINES))
    said = f"    def does(self):\n        'Said.'\n{body}\n"
    bare = f"    def does(self):\n{body}\n"
    short = "    def short(self):\n        pass\n"
    text = f"class Said:\n    'Said.'\n{said}{short}"
    text += f"class Child(Said):\n    'Said.'\n{bare}    def more(self):\n{body}\n    def _own(self):\n{body}\n"
    text += f"class Bare:\n{bare}\nclass _Own:\n{bare}\nif True:\n    def plain():\n{body}\n"
    (tmp_path / "made_for_docstrings.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("made_for_docstrings")
    assert undocumented(module) == ["made_for_docstrings", "Child.more", "Bare", "Bare.does", "plain"]
