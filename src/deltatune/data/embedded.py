"""The tasks that come with the package: made here, nothing downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

from deltatune.data import stdlib_tasks
from deltatune.data.digits import digits_5_9
from deltatune.data.procedural import procedural_task, procedural_tasks
from deltatune.data.task import Task

STDLIB: Mapping[str, tuple[str, Callable[[], Task]]] = {
    "stdlib_package": ("docstring -> its package, of 16 (classification)", stdlib_tasks.stdlib_package),
    "stdlib_kind": ("first sentence of a docstring -> what it documents (classification)", stdlib_tasks.stdlib_kind),
    "stdlib_pair": ("function, sentence -> do they match? (pair classification)", stdlib_tasks.stdlib_pair),
    "stdlib_tags": ("parameters, exceptions, modules in docstrings (token classification)", stdlib_tasks.stdlib_tags),
    "digits_5_9": ("8 x 8 grey image of a written digit -> 5, 6, 7, 8 or 9 (image classification)", digits_5_9),
    "stdlib_summary": ("source of a function -> its summary (generation)", stdlib_tasks.stdlib_summary),
}


def embedded_tasks() -> dict[str, str]:
    """Return the name of every embedded task with one line on what it is; nothing is made for it."""
    return {name: line for name, (line, _) in STDLIB.items()} | procedural_tasks()


@cache
def build(name: str) -> Task:
    """Make an embedded task."""
    return STDLIB[name][1]() if name in STDLIB else procedural_task(name)
