"""Sites by the names of modules: every linear and norm of any network, whether the vocabulary has a word for it or not.

`module:PATTERN` names modules by the end of their path, at a dot; `*`, `?` and `[...]` stand for what they do in a
shell. A module that is one site of the vocabulary is that site; any other has a site of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from deltatune.backbone.blocks import linear_shape, norm_width
from deltatune.backbone.sites import MODULE, Site
from deltatune.backbone.synonyms import EXPERTS
from deltatune.errors import SiteError, nearest


def module_sites(model: nn.Module, sites: Iterable[Site], trunk_path: str) -> dict[str, Site]:
    """Return path -> site of every linear and norm.

    Left out are linears of experts, whose dimension 0 is whichever tokens were sent to them, and the output projection
    of torch's MultiheadAttention, which takes its weights and never calls it.
    """
    here: dict[str, list[Site]] = {}
    blocks: dict[str, list[Site]] = {}
    for site in sites:
        if site.name == "block":
            blocks.setdefault(site.exit, []).append(site)
        elif site.entry == site.exit and not site.experts:
            here.setdefault(site.exit, []).append(site)
    found: dict[str, Site] = {}
    for path, module in model.named_modules():
        width = norm_width(module)
        shape = linear_shape(module) or ((width, width) if width else None)
        called = not isinstance(module, NonDynamicallyQuantizableLinear)
        if not (path and shape and called) or EXPERTS.search(path):
            continue
        known = here.get(path, [])
        if len(known) == 1 and known[0].view is None:
            found[path] = known[0]
            continue
        around, runs = next(((b, runs) for b, runs in blocks.items() if path.startswith(f"{b}.")), (trunk_path, []))
        # A block that serves as several has one module for all its runs, so its number says nothing.
        stack, number = (runs[0].stack, runs[0].block) if len(runs) == 1 else ("", None)
        found[path] = Site(
            MODULE + path.removeprefix(f"{around}." if around else ""), stack, number, path, path, *shape,
            bias=getattr(module, "bias", None) is not None, rows=known[0].rows if known else "rows",
        )  # fmt: skip
    return found


def named(pattern: str, modules: Iterable[str]) -> set[str]:
    """Return the paths of the modules that a pattern names. SiteError if there is none."""
    wanted = pattern.removeprefix(MODULE)
    paths = list(modules)
    found = {path for path in paths if fnmatchcase(path, wanted) or fnmatchcase(path, f"*.{wanted}")}
    if not found:
        raise SiteError(
            f"no linear or norm is called {wanted!r}{nearest(wanted, paths)}; expected a path or the end of one, such "
            f"as {MODULE}{paths[-1] if paths else 'PATH'}; * stands for anything"
        )
    return found
