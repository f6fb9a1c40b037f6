"""Norms of a delta per site, laid out by stack, block and site."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MOST_BLOCKS_ACROSS = 12


@dataclass(frozen=True)
class NormGrid:
    """Norms of one delta in one stack of blocks: for each site a value a block; block -1 is none."""

    title: str
    blocks: list[int]
    blocks_down: bool
    sites: dict[str, list[float | None]]
    largest: float


def norm_grids(runs: Sequence[Mapping[str, float | None]]) -> list[NormGrid]:
    """Return the norms of runs of one delta (site → norm), means over the runs, as a grid a stack of blocks."""
    means: dict[str, float] = {}
    for site in dict.fromkeys(site for run in runs for site in run):
        values = [value for run in runs if (value := run.get(site)) is not None]
        if values:
            means[site] = sum(values) / len(values)
    stacks: dict[str, dict[str, dict[int, float]]] = {}
    for site, value in means.items():
        inside = re.fullmatch(r"(?:(.*)\.)?(\d+)\.(.+)", site)
        stack, block, name = (inside[1] or "", int(inside[2]), inside[3]) if inside else ("", -1, site)
        stacks.setdefault(stack if inside else "outside the blocks", {}).setdefault(name, {})[block] = value
    grids = []
    for stack, sites in stacks.items():
        blocks = sorted({block for values in sites.values() for block in values})
        grids.append(
            NormGrid(
                title=stack,
                blocks=blocks,
                # Many blocks go down the page, where there is room; sites are few.
                blocks_down=len(blocks) > MOST_BLOCKS_ACROSS,
                sites={name: [values.get(block) for block in blocks] for name, values in sites.items()},
                largest=max(abs(value) for values in sites.values() for value in values.values()),
            )
        )
    return grids
