"""Methods: frozen descriptions of a delta, `LoRA(r=8, at="attn.{q,v}")`, and what is made of them with `|`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Selection, Site
from deltatune.delta.layer import Layer
from deltatune.errors import SiteError, UnknownName, UserError

Family = Literal["addition", "specification", "reparameterization", "baseline"]


class Method(BaseModel):
    """Base of all methods. `at` and `blocks` select the sites; the other fields are the method's own.

    `rate` is the measured default learning rate, `paper` the source.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    family: ClassVar[Family]
    paper: ClassVar[str]
    rate: ClassVar[float]

    at: str
    blocks: str | None = None
    tie: str = ""  # names of parameters that all sites of one shape share, e.g. LoRA(tie="A")

    def __init__(self, **fields: Any) -> None:
        cls = type(self)
        for name in fields:
            if name not in cls.model_fields:
                raise UnknownName(f"field of {cls.__name__}", name, cls.model_fields)
        try:
            super().__init__(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "arguments"
            raise UserError(f"{cls.__name__}: {place}={first['input']!r}: {first['msg']}") from None

    @classmethod
    def name(cls) -> str:
        """The name in a delta expression: the class name in lower case."""
        return cls.__name__.lower()

    @property
    def lr(self) -> float:
        """The default learning rate with these fields."""
        return self.rate

    def sites(self, backbone: Backbone) -> Selection:
        """Resolve the selection on a backbone. SiteError if it is empty or names a site that is not there."""
        return backbone.anatomy.select(self.at, self.blocks)

    def layer(self, site: Site, generator: torch.Generator) -> Layer:
        """Make the layer for one site, its parameters drawn from the generator."""
        raise NotImplementedError

    def initialise(self, layer: Layer, site: Site, backbone: Backbone, generator: torch.Generator) -> None:
        """Set a fresh layer's parameters from the backbone, for a method whose start depends on it."""

    def join(self, placed: Sequence[tuple[Site, Layer]]) -> None:
        """Tell the layers of one delta what they need to know of each other, before any values are set."""

    def __or__(self, other: Method | Composition) -> Composition:
        return Composition((self,)) | other

    def __str__(self) -> str:
        fields = [
            f"{name}={value!r}"
            for name, value in self
            if value != type(self).model_fields[name].get_default(call_default_factory=True)
        ]
        return f"{self.name()}({', '.join(fields)})" if fields else self.name()


class Composition:
    """Several methods as one delta: `LoRA(r=8) | Prefix(n=16)`; at one place the left one acts first."""

    def __init__(self, members: Sequence[Method]) -> None:
        self.members = tuple(members)

    def __or__(self, other: Method | Composition) -> Composition:
        more = other.members if isinstance(other, Composition) else (other,)
        return Composition((*self.members, *more))

    @property
    def lr(self) -> float:
        """The default rate: the geometric mean of the members'."""
        rates = [m.lr for m in self.members]
        return float(torch.tensor(rates, dtype=torch.float64).log().mean().exp())

    def __str__(self) -> str:
        return " | ".join(map(str, self.members))

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Composition) and self.members == other.members

    def __hash__(self) -> int:
        return hash(self.members)


Spec = Method | Composition


def members(spec: Spec) -> tuple[Method, ...]:
    """Return the methods of a spec in the order in which they act."""
    return spec.members if isinstance(spec, Composition) else (spec,)


def existing(names: str, backbone: Backbone) -> str:
    """Keep of `names` those that the backbone has; SiteError if none is left."""
    from deltatune.backbone.sites import expand_names

    kept = [name for name in expand_names(names) if backbone.anatomy.has(name)]
    if not kept:
        raise SiteError(f"none of the sites {names!r} is in {backbone.name}")
    return " ".join(kept)
