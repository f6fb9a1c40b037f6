"""The catalogue: every method that is installed, found by looking.

Packages name themselves under the entry point group `deltatune.methods`; this package's own methods come the same way.
Reading a saved delta imports installed packages only, never a file beside the delta.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType

from deltatune.delta.method import Method
from deltatune.errors import UnknownName

GROUP = "deltatune.methods"


@cache
def catalogue() -> dict[str, type[Method]]:
    """Return name -> method class of all installed methods, sorted by family and name."""
    modules: set[str] = set()
    for point in entry_points(group=GROUP):
        package = importlib.import_module(point.value)
        modules |= {package.__name__, *_modules(package)}
    for module in modules:
        importlib.import_module(module)
    # What else is loaded in this process (a file under `deltatune check`, say) is not installed.
    found = {cls.name(): cls for cls in _subclasses(Method) if cls.__module__ in modules}
    return dict(sorted(found.items(), key=lambda item: (item[1].family, item[0])))


def find(name: str) -> type[Method]:
    """Return the method class of a name, in any case. UnknownName with the nearest otherwise."""
    methods = catalogue()
    plain = {key.replace("_", ""): cls for key, cls in methods.items()}
    cls = plain.get(name.lower().replace("_", "").replace("-", ""))
    if cls is None:
        raise UnknownName("method", name, methods, "`deltatune methods` lists them; a third party's must be installed")
    return cls


def _modules(package: ModuleType) -> list[str]:
    path = getattr(package, "__path__", None)
    if path is None:
        return []
    return [m.name for m in pkgutil.walk_packages(path, f"{package.__name__}.") if not m.ispkg]


def _subclasses(cls: type[Method]) -> list[type[Method]]:
    direct = [sub for sub in cls.__subclasses__() if hasattr(sub, "family")]
    return direct + [deeper for sub in direct for deeper in _subclasses(sub)]
