"""How OpenDelta names places: ends of modules' paths, in the network's own words or in those of its common structure.

In the common structure every name carries a mark: `attn@.q@`, `ff@.w2@`, `layer_norm@`. Linears and norms get theirs
from our sites; the containers, which are no sites, from one table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import ORDER, Site
from deltatune.delta.exchange.places import Naming, linears
from deltatune.errors import DeltaFileError, nearest

GROUPS = {"attn": "attn@", "cross": "crossattn@", "ffn": "ff@"}
PARTS = {"q": "q", "k": "k", "v": "v", "o": "proj", "up": "w1", "down": "w2"}
CONTAINERS = {
    "attn@": r"layer\.\d+\.attention|h\.\d+\.attn|layers\.\d+\.self_attn|block\.\d+\.layer\.0",
    "crossattn@": r"decoder\.block\.\d+\.layer\.1",
    "ff@": r"layer\.\d+\.(intermediate|output)|h\.\d+\.mlp|encoder\.block\.\d+\.layer\.1|decoder\.block\.\d+\.layer\.2",
}
FINAL_NORM = ("gpt2", "t5")
SPANS = ("attn", "cross", "ffn")


def common_names(backbone: Backbone) -> dict[str, tuple[str, ...]]:
    """Return module path -> its names in the common structure, from the name of the sub-layer on."""
    family = getattr(backbone.module.config, "model_type", "")
    found: dict[str, tuple[str, ...]] = {}
    for path, _ in backbone.module.named_modules():
        name = next((name for name, rule in CONTAINERS.items() if re.search(rf"(^|\.)({rule})$", path)), None)
        # What has no name there: DeBERTa's `intermediate`, of which only the linear has one.
        if name is not None and not (family == "deberta-v2" and path.endswith(".intermediate")):
            found[path] = (name,)
    for path, sites in linears(backbone).items():
        group, _, _ = sites[0].name.partition(".")
        parts = [site.name.partition(".")[2] for site in sites]
        if group in GROUPS and all(part in PARTS for part in parts):
            name = f"{GROUPS[group]}.{','.join(PARTS[part] for part in parts)}@"
            # OPT's feed-forward is two linears without a container, which both answer to its name.
            found[path] = (name, "ff@") if (group, family) == ("ffn", "opt") else (name,)
    for site in backbone.anatomy.sites:
        in_block = site.name in ("norm.attn", "norm.cross", "norm.ffn")
        if in_block or (site.name == "norm.final" and family in FINAL_NORM):
            found[site.exit] = ("layer_norm@",)
    return found


def selected(config: Mapping[str, Any], naming: Naming, backbone: Backbone) -> list[str]:
    """Return the modules (our paths) that a config selects, in the network's order."""
    wanted = [str(name) for name in config["modified_modules"]]
    unwanted = tuple(str(name) for name in config.get("exclude_modules") or ())
    common = common_names(backbone) if config.get("common_structure") else {}
    found = []
    for path in naming.modules:
        theirs = naming.theirs(path)
        names = common.get(path, (theirs,))
        if path and not theirs.startswith(unwanted) and any(_ends_in(one, name) for one in names for name in wanted):
            found.append(path)
    return found


def _ends_in(path: str, name: str) -> bool:
    if not name.startswith("[r]"):
        return path == name or path.endswith(f".{name}")
    match = re.search(name[3:], path)
    return match is not None and match.end() == len(path) and path[match.start() - 1 : match.start()] in ("", ".")


class Places:
    """The sites at which modules of a backbone begin and end.

    A module that holds others (`attention`, `mlp`) hands on what one of them gives: the very tensor. So which site
    stands there is seen in one forward pass.
    """

    def __init__(self, backbone: Backbone, naming: Naming, where: str) -> None:
        self.backbone, self.naming, self.where = backbone, naming, where
        self._seen: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
        self.sites = sorted(
            (
                site
                for site in backbone.anatomy.sites
                if site.view is None and site.calls == 1 and site.name not in ("embed", "weights") and not site.experts
            ),
            key=lambda site: (site.name not in SPANS, ORDER[site.name]),
        )

    def exit_at(self, path: str) -> Site:
        """Return the site whose exit is what a module (our path) gives. DeltaFileError if there is none."""
        for same in (lambda site: site.exit == path, lambda site: self._same(1, site.exit, path)):
            found = next(filter(same, self.sites), None)
            if found is not None:
                return found
        raise self.none(path, f"what {self.naming.theirs(path)!r} gives is at no site of {self.backbone.name!r}")

    def span(self, entry: str, exit: str) -> Site:
        """Return the site from what one module takes to what another gives. DeltaFileError if there is none."""
        for site in self.sites:
            if (site.entry == entry or self._same(0, site.entry, entry)) and (
                site.exit == exit or self._same(1, site.exit, exit)
            ):
                return site
        ends = " to ".join(repr(self.naming.theirs(path)) for path in dict.fromkeys((entry, exit)))
        raise self.none(
            entry, f"from the input of {ends} to its output (a residual or norm between) {self.backbone.name!r} has no "
            f"site"
        )  # fmt: skip

    def none(self, path: str, said: str) -> DeltaFileError:
        """The refusal of a place that is no site."""
        return DeltaFileError(
            f"{self.where} has tensors for {self.naming.theirs(path)!r}: {said}"
            f"{nearest(path, {site.exit for site in self.sites})}; `deltatune sites` lists them"
        )

    def _same(self, end: int, one: str, other: str) -> bool:
        """Whether two modules take (end 0) or give (end 1) the same tensor."""
        if self._seen is None:
            self._seen = _seen(self.backbone)
        tensors = self._seen[end]
        return one in tensors and other in tensors and tensors[one] is tensors[other]


def _seen(backbone: Backbone) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run three tokens and return, by module path, the tensors that went in and came out; without a repeated module."""
    taken: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}
    repeated: set[str] = set()

    def watch(path: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if path in given:
                repeated.add(path)
            first = next((value for value in (*args, kwargs.get("hidden_states")) if isinstance(value, Tensor)), None)
            output = output[0] if isinstance(output, tuple) else output
            if first is not None and isinstance(output, Tensor):
                taken[path], given[path] = first, output

        return module.register_forward_hook(hook, with_kwargs=True)

    ids = torch.tensor([[3, 4, 5]], device=backbone.device)
    more = {"decoder_input_ids": ids} if backbone.kind == "encoder-decoder" else {}
    handles = [watch(path, module) for path, module in backbone.module.named_modules()]
    try:
        with torch.no_grad():
            backbone.module(input_ids=ids, **more)
    finally:
        for handle in handles:
            handle.remove()
    for path in repeated:
        del taken[path], given[path]
    return taken, given
