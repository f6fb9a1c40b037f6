"""`deltatune methods`: what a delta can be made of."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltatune.cli.options import AsJson, BackboneName
from deltatune.cli.output import say, table

if TYPE_CHECKING:
    from rich.table import Table
    from rich.tree import Tree

    from deltatune.backbone.load import Backbone
    from deltatune.delta.layer import Layer
    from deltatune.delta.method import Method

EXAMPLE = "deltatune methods\ndeltatune methods lora"
LINEARITY = ("no", "bilinear", "linear")


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", show_default=False, help="One method: its formula and fields.")
    ] = None,
    tree: Annotated[bool, typer.Option("--tree", help="Show the methods under their families.")] = False,
    backbone: BackboneName = "minilm",
    as_json: AsJson = False,
) -> None:
    """List the methods: family, paper, what they declare, parameters on a backbone with default fields."""
    from deltatune.backbone.load import load
    from deltatune.delta.catalogue import catalogue, find

    chosen = find(name) if name else None
    loaded = load(backbone)
    if chosen is not None:
        one = described(chosen, loaded) | {"lr": chosen.rate, "fields": _fields(chosen), "doc": inspect.getdoc(chosen)}
        say(one, as_json, *_page(one, backbone))
        return
    rates = {cls.name(): cls.rate for cls in catalogue().values()}
    found = [described(cls, loaded) for cls in catalogue().values()]
    shown = _tree(found, backbone) if tree else _list(found, rates, backbone)
    say(found, as_json, shown)


def described(cls: type[Method], backbone: Backbone) -> dict[str, Any]:
    """Return a method as plain data; `trainable` is None where its default sites are not in the backbone."""
    from deltatune.delta.delta import Delta
    from deltatune.errors import SiteError

    try:
        delta = Delta.build(cls(), backbone)
    except SiteError:
        delta = None
    layers = [layer for _, layer in delta.at_sites()] if delta is not None else []
    return {
        "name": cls.name(),
        "family": cls.family,
        "paper": cls.paper,
        "facts": facts(layers) if delta is not None else None,
        "trainable": delta.trainable() if delta is not None else None,
    }


def facts(layers: Sequence[Layer]) -> dict[str, Any]:
    """Return what the layers of one delta declare, taken together: a fact holds if it holds for each of them."""
    return {
        "ports": sorted({layer.port for layer in layers}),
        "needs": sorted({layer.needs for layer in layers}),
        "identity_at_init": all(layer.identity_at_init for layer in layers),
        "scalable": all(layer.scalable for layer in layers),
        "mergeable": all(layer.mergeable for layer in layers),
        "positionwise": all(layer.positionwise for layer in layers),
        "linear": min((layer.linear for layer in layers), key=LINEARITY.index, default="linear"),
    }


def _words(found: dict[str, Any] | None) -> str:
    """The facts in a few words."""
    if found is None:
        return "its sites are not in this backbone"
    said = ["at " + " and ".join(found["ports"])] if found["ports"] else []
    said += [name.replace("_", " ") for name in ("identity_at_init", "scalable", "mergeable") if found[name]]
    said += [found["linear"]] if found["linear"] != "no" else []
    return ", ".join([*said, *(f"needs {need}" for need in found["needs"] if need != "output")])


def _count(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def _list(found: Sequence[dict[str, Any]], rates: dict[str, float], backbone: str) -> Table:
    name, parameters = "method", f"on {Path(backbone).name}"
    made = table(name, parameters, "lr", "paper", "facts", right=(parameters, "lr"), whole=(name, "paper"))
    for family in dict.fromkeys(one["family"] for one in found):
        made.add_section()
        made.add_row(family, style="dim")
        for one in found:
            if one["family"] == family:
                cells = (_count(one["trainable"]), f"{rates[one['name']]:g}", one["paper"], _words(one["facts"]))
                made.add_row(f"  {one['name']}", *cells)
    return made


def _tree(found: Sequence[dict[str, Any]], backbone: str) -> Tree:
    from rich.tree import Tree

    root = Tree(f"methods, parameters on {backbone}")
    for family in dict.fromkeys(one["family"] for one in found):
        branch = root.add(family)
        for one in found:
            if one["family"] == family:
                branch.add(f"{one['name']}  {_count(one['trainable'])}  {one['paper']}")
    return root


def _fields(cls: type[Method]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "type": _type_name(field.annotation),
            "default": field.get_default(call_default_factory=True),
            "limits": ", ".join(map(_limit, field.metadata)),
        }
        for name, field in cls.model_fields.items()
    ]


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _limit(limit: Any) -> str:
    for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
        if hasattr(limit, name):
            return f"{sign} {getattr(limit, name)}"
    return str(limit)


def _page(one: dict[str, Any], backbone: str) -> list[Any]:
    fields = table("field", "type", "default", "limits")
    for field in one["fields"]:
        fields.add_row(field["name"], field["type"], repr(field["default"]), field["limits"])
    return [
        f"{one['name']} ({one['family']}, {one['paper']})",
        "",
        one["doc"] or "",
        "",
        f"Default learning rate {one['lr']:g}, {_count(one['trainable'])} parameters on {backbone}.",
        f"Declared: {_words(one['facts']) or 'nothing of note'}.",
        fields,
    ]
