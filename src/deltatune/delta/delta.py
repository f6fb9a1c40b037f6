"""A delta: a spec made real on one backbone. It owns its parameters, its head, and knows where it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.backbone.html import facts
from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Site, rank
from deltatune.backbone.weights import device_of
from deltatune.delta.inserted import check_takes_tokens
from deltatune.delta.layer import ExpertLayer, Layer
from deltatune.delta.method import Method, Spec, members
from deltatune.errors import SiteError, UnknownName, UserError


class Delta(nn.Module):
    """Layers at sites, an optional head, and a record of where they came from.

    `layers` maps `<member>/<site key>` (dots written as `:`) to a layer, in the order in which they act at one place.
    `head` is a module or None. `fingerprint` is the backbone's. `record` is plain data that travels with the file:
    task, metrics, settings, versions.
    """

    def __init__(self, spec: Spec, sites: list[tuple[int, Site]], *, seed: int = 0, name: str = "") -> None:
        super().__init__()
        self.spec, self.name, self.seed = spec, name or str(spec), seed
        self.backbone_name = ""
        self.fingerprint: dict[str, str] = {}
        self.record: dict[str, Any] = {}
        self.head: nn.Module | None = None
        self.sites: dict[str, Site] = {}
        self.layers = nn.ModuleDict()
        for member, site in sites:
            address = f"{member}/{site.key}".replace(".", ":")
            layer = members(spec)[member].layer(site, generator(seed, address))
            _check_port(layer, site, members(spec)[member].name())
            layer.member = member
            self.sites[address] = site
            self.layers[address] = layer
        for number, method in enumerate(members(spec)):
            own = [(self.sites[a], layer) for a, layer in self.layers.items() if a.startswith(f"{number}/")]
            tie(method, [layer for _, layer in own])  # type: ignore[misc]
            method.join(own)  # type: ignore[arg-type]

    @classmethod
    def build(cls, spec: Spec, backbone: Backbone, *, seed: int = 0, name: str = "") -> Delta:
        """Make a fresh delta for a backbone; its parameters depend on the spec, the sites and the seed alone.

        SiteError if a selection is empty or names a site that the backbone lacks, or if a method puts tokens into a
        backbone that takes none; UserError for what is no method.
        """
        if not isinstance(spec, Spec):
            fix = f"dt.parse({spec!r})" if isinstance(spec, str) else "dt.LoRA(r=8)"
            raise UserError(f"got {spec!r} for a delta: expected a method or a Delta, such as {fix}")
        sites = [(i, site) for i, method in enumerate(members(spec)) for site in method.sites(backbone)]
        delta = cls(spec, sites, seed=seed, name=name)
        if any(layer.port == "tokens" for _, layer in delta.at_sites()):
            check_takes_tokens(backbone)
        delta.backbone_name, delta.fingerprint = backbone.name, backbone.fingerprint()
        for (member, site), (address, layer) in zip(sites, delta.layers.items(), strict=True):
            members(spec)[member].initialise(layer, site, backbone, generator(seed, address, "initialise"))  # type: ignore[arg-type]
        return delta.place(backbone)

    def place(self, backbone: Backbone) -> Delta:
        """Move each layer to the device that its site's module computes on, the head to the backbone's; return self."""
        self.to(backbone.device)
        for site, layer in self.at_sites():
            layer.to(device_of(backbone.module.get_submodule(site.exit)) or backbone.device)
        return self

    def at_sites(self) -> list[tuple[Site, Layer]]:
        """Return (site, layer) in the order in which they act at one place."""
        return [(self.sites[address], layer) for address, layer in self.layers.items()]  # type: ignore[misc]

    def trainable(self) -> int:
        """Number of parameters of the layers, without the head."""
        return sum(p.numel() for p in self.layers.parameters())

    def norms(self) -> dict[str, float]:
        """Euclidean norm of the parameters at each site."""
        found: dict[str, float] = {}
        for site, layer in self.at_sites():
            square = sum(float(p.detach().cpu().double().square().sum()) for p in layer.parameters())
            found[site.key] = (found.get(site.key, 0.0) ** 2 + square) ** 0.5
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of layers and head by name, detached; a tied one once, by its first name."""
        return {name: p.detach() for name, p in self.named_parameters()}

    def save(self, folder: str, *, overwrite: bool = False) -> None:
        """Write `delta.json` and `delta.safetensors`; see `deltatune.delta.files.save`."""
        from deltatune.delta.files import save

        save(self, folder, overwrite=overwrite)

    @staticmethod
    def load(folder: str, backbone: Backbone | None = None, *, verify: bool = True) -> Delta:
        """Read a saved delta; see `deltatune.delta.files.load`."""
        from deltatune.delta.files import load

        return load(folder, backbone, verify=verify)

    def add_labels(self, labels: Sequence[str]) -> None:
        """Let the head score further labels, those that it has staying as they are, to the bit.

        What is added is unlikely until it is trained; an optimiser made before does not know of it. UserError for a
        delta without a head that scores labels.
        """
        from deltatune.delta.head import Head

        if not isinstance(self.head, Head):
            raise UserError(f"delta {self.name!r} has no head to add labels to")
        self.head = self.head.with_labels(labels)
        if "task" in self.record:
            known = self.record["task"]["labels"]
            added = [label for label in dict.fromkeys(labels) if label not in known]
            self.record = {**self.record, "task": {**self.record["task"], "labels": [*known, *added]}}

    def __mul__(self, weight: float) -> Delta:
        """Return the delta with its effect times a number; see `deltatune.delta.algebra`."""
        from deltatune.delta.algebra import total

        return total([(float(weight), self)])

    __rmul__ = __mul__

    def __add__(self, other: Delta) -> Delta:
        """Return the delta whose effect at each place is the sum of the two."""
        from deltatune.delta.algebra import total

        return total([(1.0, self), (1.0, other)])

    def __sub__(self, other: Delta) -> Delta:
        """Return the delta whose effect at each place is the difference of the two."""
        from deltatune.delta.algebra import total

        return total([(1.0, self), (-1.0, other)])

    def __neg__(self) -> Delta:
        """Return the delta with the opposite effect."""
        return self * -1.0

    def __repr__(self) -> str:
        sites = dict.fromkeys(site.name for site in sorted(self.sites.values(), key=rank))
        head = f", head {type(self.head).__name__}" if self.head is not None else ""
        return f"Delta({self.name!r}, {self.trainable():,} parameters at {' '.join(sites) or 'no site'}{head})"

    def _repr_html_(self) -> str:
        task = self.record.get("task", {})
        names = dict.fromkeys(site.name for site in self.sites.values())
        scores = {
            f"{split} {name}": f"{x:.3f}"
            for split, own in self.record.get("metrics", {}).items()
            for name, x in own.items()
        }
        return facts(
            self.name,
            {
                "delta": self.spec,
                "parameters": f"{self.trainable():,} at {' '.join(names)}",
                "backbone": self.backbone_name,
                "head": type(self.head).__name__ if self.head is not None else None,
                "task": task.get("name"),
                **scores,
            },
        )


def _check_port(layer: Layer, site: Site, method: str) -> None:
    """SiteError for a layer at a site that has not what its port acts on."""
    wants = {"tokens": "embed", "weight": "weights"}.get(layer.port)
    if (wants and site.name != wants) or (not wants and site.name == "weights"):
        raise SiteError(
            f"{method} cannot stand at {site.name!r}; expected {f'at={wants!r}' if wants else 'another site'}"
        )
    reads = layer.reads_input and layer.port == "output"
    if site.name == "embed" and (layer.port == "input" or (reads and not layer.reads_ids)):
        raise SiteError(f"{method} reads vectors, and the input of 'embed' is token ids; choose another site")
    if layer.reads_ids and not site.words:
        raise SiteError(f"{method} reads token ids, and the input of {site.name!r} is vectors; it stands at 'embed'")
    if isinstance(layer, ExpertLayer) and not site.experts:
        raise SiteError(f"{method} has parameters for each expert; {site.key!r} is not inside a mixture of experts")
    if layer.port == "kv" and site.heads is None:
        raise SiteError(f"{method} needs attention sites ('attn', 'cross'); it cannot stand at {site.key!r}")


def tie(method: Method, layers: Sequence[Layer]) -> None:
    """Let layers share the parameters that the method's `tie` names, wherever the shapes agree.

    UnknownName if no layer has a parameter of that name. Source of the idea: Compacter, arXiv:2106.04647.
    """
    names = tuple(method.tie.replace(",", " ").split())
    shared: dict[tuple[str, torch.Size], nn.Parameter] = {}
    known = {name for layer in layers for name in layer.names()}
    for name in names:
        if name not in known:
            raise UnknownName(f"parameter of {method.name()}", name, known, "tie names parameters of its layers")
    for layer in layers:
        for name in names:
            if name in layer._parameters:
                own = layer.get_parameter(name)
                layer.register_parameter(name, shared.setdefault((name, own.shape), own))
        layer.tied = tuple(name for name in names if name in layer._parameters)


def generator(seed: int, *keys: object) -> torch.Generator:
    """A generator that depends on the seed and the keys alone, so that no neighbour changes what is drawn."""
    text = ":".join(map(str, (seed, *keys))).encode()
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
    return torch.Generator().manual_seed(number)
