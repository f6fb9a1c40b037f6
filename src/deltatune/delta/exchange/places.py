"""How other libraries name places: paths of modules, held against the sites of a backbone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from deltatune.backbone.blocks import linear_shape
from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Site
from deltatune.errors import DeltaFileError, nearest


def linears(backbone: Backbone) -> dict[str, list[Site]]:
    """Return module path -> the sites that are columns of its output (one, or q, k and v of a fused linear)."""
    found: dict[str, list[Site]] = {}
    anatomy = backbone.anatomy
    for site in anatomy.sites:
        if site.entry == site.exit and linear_shape(backbone.module.get_submodule(site.exit)):
            found.setdefault(site.exit, []).append(site)
    for path, site in anatomy.modules.items():
        if path not in found and linear_shape(backbone.module.get_submodule(path)):
            found[path] = [site]
    return found


def tables(backbone: Backbone) -> dict[str, list[Site]]:
    """Return module path -> the site of each table of tokens."""
    return {site.exit: [site] for site in backbone.anatomy.sites if site.words}


class Naming:
    """The names that a file gives to the modules of a backbone.

    A file that was saved from a model with a head names the trunk too (`bert.encoder...`), one saved from the trunk
    alone does not; `paths` of a few modules in the file tell which.
    """

    def __init__(self, backbone: Backbone, paths: Iterable[str]) -> None:
        self.base = f"{getattr(backbone.module, 'base_model_prefix', '')}."
        self.modules = dict(backbone.module.named_modules())
        self.longer = self.shorter = False
        for path in paths:
            if path in self.modules:
                return
            if path.startswith(self.base) and path.removeprefix(self.base) in self.modules:
                self.longer = True
                return
            if self.base + path in self.modules:
                self.shorter = True
                return

    def ours(self, path: str) -> str:
        """Return our path of a module that the file calls `path`."""
        return path.removeprefix(self.base) if self.longer else self.base + path if self.shorter else path

    def theirs(self, path: str) -> str:
        """Return the file's path of a module that we call `path`."""
        return self.base + path if self.longer else path.removeprefix(self.base) if self.shorter else path

    def selected(self, wanted: Callable[[str], bool]) -> set[str]:
        """Return our paths of the modules whose path in the file is wanted."""
        return {path for path in self.modules if path and wanted(self.theirs(path))}


def targets(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Return PEFT's rule for which modules a config selects: a list of ends of paths, or one regular expression.

    Also read: `exclude_modules`, `layers_to_transform` and `layers_pattern`.
    """
    wanted, unwanted = config.get("target_modules"), config.get("exclude_modules") or []
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or []
    layers = [layers] if isinstance(layers, int) else layers
    patterns = [patterns] if isinstance(patterns, str) else patterns

    def in_layers(path: str) -> bool:
        if not layers or isinstance(wanted, str):
            return True
        rules = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
        found = next(filter(None, (re.match(rule, path) for rule in rules)), None)
        return found is not None and int(found[1]) in layers

    return lambda path: not named(path, unwanted) and named(path, wanted) and in_layers(path)


def named(path: str, rule: str | Iterable[str] | None) -> bool:
    """Say whether a path fits a regular expression, or ends in one of several names."""
    if rule is None or isinstance(rule, str):
        return bool(rule and re.fullmatch(rule, path))
    return any(path == name or path.endswith(f".{name}") for name in rule)


def shortest(wanted: Iterable[str], backbone: Backbone) -> list[str]:
    """Return the shortest ends of paths that select these modules of a backbone and no other."""
    wanted = set(wanted)
    everything = [path for path, _ in backbone.module.named_modules() if path]
    found: set[str] = set()
    for path in sorted(wanted):
        words = path.split(".")
        ends = (".".join(words[start:]) for start in reversed(range(len(words))))
        found.add(next((e for e in ends if wanted.issuperset(p for p in everything if named(p, [e]))), path))
    return sorted(found)


def site_less(path: str, backbone: Backbone, where: str) -> DeltaFileError:
    """The refusal of a module that is at no site of the backbone."""
    return DeltaFileError(
        f"{where} has tensors for {path!r}, which is at no site of {backbone.name!r}"
        f"{nearest(path, linears(backbone))}; `deltatune sites` lists them"
    )


def same_modules(have: set[str], config: Mapping[str, Any], naming: Naming, backbone: Backbone, where: str) -> None:
    """Check that a file has tensors for exactly the modules that its config selects. DeltaFileError otherwise.

    PEFT leaves out in silence what is not selected, and starts afresh what is selected and not there.
    """
    rule = config.get("target_modules")
    if rule is None:
        return
    if isinstance(rule, str) and rule.lower() == "all-linear":
        chosen = {p for p, m in naming.modules.items() if linear_shape(m) and m is not backbone.output}
    else:
        chosen = naming.selected(targets(config))
    agree(have, chosen, "target_modules", naming, where)


def agree(have: set[str], chosen: set[str], option: str, naming: Naming, where: str) -> None:
    """Check that a file has tensors for exactly the modules (our paths) that an option of its config selects.

    DeltaFileError otherwise.
    """
    for paths, said in (
        (chosen - have, f"lacks tensors for {{!r}}, which its {option} select"),
        (have - chosen, f"has tensors for {{!r}}, which its {option} do not select"),
    ):
        if paths:
            more = f" ({len(paths) - 1} more)" if len(paths) > 1 else ""
            raise DeltaFileError(f"{where} {said.format(naming.theirs(min(paths)))}{more}")
