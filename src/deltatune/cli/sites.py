"""`deltatune sites`: where a delta can stand in a backbone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltatune.cli.options import AsJson, backbone_names
from deltatune.cli.output import say, table

if TYPE_CHECKING:
    from rich.table import Table

    from deltatune.backbone.load import Backbone
    from deltatune.backbone.sites import Site

EXAMPLE = "deltatune sites minilm"


def sites(
    backbone: Annotated[
        str,
        typer.Argument(
            metavar="BACKBONE",
            show_default=False,
            autocompletion=backbone_names,
            help="minilm, smollm2, a folder, or a hub id.",
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """List the sites of a backbone: their blocks, widths and ports, and what is absent with the reason."""
    from deltatune.backbone.load import load

    loaded = load(backbone)
    found = described(loaded)
    say(found, as_json, f"{loaded!r}", _present(found["sites"]), *_absent(found["absent"]))


def described(backbone: Backbone) -> dict[str, Any]:
    """Return the sites of a backbone as plain data: one entry for each name of each stack."""
    groups: dict[tuple[str, str], list[Site]] = {}
    for site in backbone.anatomy.by_key.values():
        groups.setdefault((site.stack, site.name), []).append(site)
    return {
        "backbone": backbone.name,
        "parameters": backbone.parameters,
        "blocks": backbone.anatomy.depth,
        "sites": [
            {
                "site": name,
                "stack": stack,
                "blocks": [site.block for site in found if site.block is not None],
                "d_in": found[0].d_in,
                "d_out": found[0].d_out,
                "ports": ports(found[0]),
                "view": None if found[0].view is None else str(found[0].view),
                "module": _pattern(found),
            }
            for (stack, name), found in groups.items()
        ],
        "absent": backbone.anatomy.absent,
    }


def ports(site: Site) -> list[str]:
    """Return the ports that a layer can act on at a site."""
    if site.name == "weights":
        return ["weight"]
    if site.name == "embed":
        return ["output", "tokens"]
    return ["input", "output", *(["kv"] if site.heads is not None else [])]


def ranges(numbers: Sequence[int]) -> str:
    """Return `"0-5"` or `"0-2,5"`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def _pattern(found: Sequence[Site]) -> str:
    first = found[0]
    paths = dict.fromkeys((first.entry, first.exit))
    if first.block is not None:
        paths = dict.fromkeys(re.sub(rf"\.{first.block}(?=\.|$)", ".*", path, count=1) for path in paths)
    return " … ".join(paths) or "all of it"


def _present(rows: Sequence[dict[str, Any]]) -> Table:
    several = len({row["stack"] for row in rows}) > 1
    made = table(
        "site", "blocks", "in", "out", "ports", "module (in its block)", right=("in", "out"), whole=("site", "blocks")
    )  # fmt: skip
    for row in rows:
        view = "" if row["view"] is None else f" [{row['view']}]"
        module = re.sub(r"[^ ]*\.\*\.", "", row["module"]) + view
        name = f"{row['stack']} {row['site']}" if several else row["site"]
        widths = (f"{row['d_in']:,}", f"{row['d_out']:,}")
        made.add_row(name, ranges(row["blocks"]) or "–", *widths, " ".join(row["ports"]), module)
    return made


def _absent(reasons: dict[str, str]) -> list[Table]:
    if not reasons:
        return []
    made = table("absent", "reason")
    for name, reason in reasons.items():
        made.add_row(name, reason)
    return [made]
