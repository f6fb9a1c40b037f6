"""Anatomy: find the sites of a backbone from its modules' names and shapes.

One table of synonyms serves every architecture; there is no class per model. What a backbone lacks is declared
absent with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from deltatune.backbone.blocks import Block, block_sites, embedding_like, find_stacks, is_norm, linear_shape, norm_width
from deltatune.backbone.modules import module_sites, named
from deltatune.backbone.sites import MODULE, ORDER, VOCABULARY, Selection, Site, block_numbers, expand_names, rank
from deltatune.backbone.synonyms import (
    ABSENT_BYPASSED,
    ABSENT_REASON,
    ABSENT_WITH_EXPERTS,
    ABSENT_WITHOUT_NORM,
    BESIDE,
    COMPUTED,
    EMBEDDING_NORM,
    FINAL_NORM,
    OUT_OF_REACH,
    PATCHES,
    PLAIN_NORM,
    STAND_INS,
    UNFOUND,
)  # fmt: skip
from deltatune.errors import SiteError


@dataclass
class Anatomy:
    """The sites of one backbone, and the vocabulary's names that it lacks, each with its reason.

    `modules` is the path of every linear and norm -> its site, which is one of `sites` or one of its own.
    """

    sites: list[Site]
    absent: dict[str, str]
    depth: dict[str, int]
    parameters: dict[str, str]  # canonical key -> path, of every parameter of the trunk that learns, ordered by key
    modules: dict[str, Site]
    by_key: dict[str, Site] = field(init=False)

    def __post_init__(self) -> None:
        self.by_key = {site.key: site for site in (*self.sites, *self.modules.values())}

    def select(self, names: str, blocks: str | None = None) -> Selection:
        """Return the sites with these names in these blocks.

        Raises UnknownName for a name outside the vocabulary, SiteError for a site or a module that this backbone lacks
        or for blocks that it has not.
        """
        wanted = expand_names(names)
        keys: set[str] = set()
        for name in wanted:
            if name.startswith(MODULE):
                keys.update(self.modules[path].key for path in named(name, self.modules))
            if name in self.absent:
                have = sorted({s.name for s in self.sites}, key=ORDER.__getitem__)
                held = f"; it has: {', '.join(have)}" if self.depth else ""
                raise SiteError(f"this backbone has no site {name!r}: {self.absent[name]}{held}")
        allowed = {stack: block_numbers(blocks, n) if blocks else set(range(n)) for stack, n in self.depth.items()}
        found = [
            site
            for site in sorted(self.by_key.values(), key=_place)
            if (site.name in wanted or site.key in keys)
            and (site.block is None or site.block in allowed.get(site.stack, set()))
        ]
        if not found:
            raise SiteError(f"no site matches {names!r} in blocks={blocks!r}; the backbone has {self.depth} blocks")
        return Selection(found)

    @property
    def hidden(self) -> frozenset[str]:
        """Of the absent names, those that the network computes all the same, in no module of their own."""
        return frozenset(name for name, reason in self.absent.items() if reason in OUT_OF_REACH)

    def has(self, name: str) -> bool:
        """Say whether the backbone has a site of this name."""
        return name.startswith(MODULE) or (name in ORDER and name not in self.absent)


def find_anatomy(model: nn.Module) -> Anatomy:
    """Find the sites of a network: of a transformer by the vocabulary, of any other by the names of its modules."""
    trunk = getattr(model, "base_model", model)
    trunk_path = next((path for path, module in model.named_modules() if module is trunk), "")
    stacks = find_stacks(trunk, trunk_path)
    if not stacks:
        return _plain(model)
    sites: list[Site] = []
    for stack, blocks in stacks.items():
        for number, block in enumerate(blocks):
            sites += block_sites(model, stack, number, block)
    widths = {site.stack: site.d_in for site in reversed(sites) if site.name == "block"}
    sites += _global_sites(model, trunk, trunk_path, stacks, widths)
    sites.sort(key=_place)
    parameters = _canonical(model, sites, trunk_path)
    shapes = tuple((key, tuple(model.get_parameter(path).shape)) for key, path in parameters.items())
    width = next(site.d_out for site in sites if site.name == "block")
    sites.append(Site("weights", next(iter(stacks)), None, trunk_path, trunk_path, width, width, shapes=shapes))
    present = {s.name for s in sites}
    absent = {name: _reason(name, sites) for name in VOCABULARY if name not in present}
    depth = {stack: len(blocks) for stack, blocks in stacks.items()}
    return Anatomy(sites, absent, depth, parameters, module_sites(model, sites, trunk_path))


def _place(site: Site) -> tuple[str, int, int]:
    return site.stack, -1 if site.block is None else site.block, rank(site)


def _plain(model: nn.Module) -> Anatomy:
    """The anatomy of a network without a stack of transformer blocks: its modules by their names."""
    parameters = {f"{MODULE}{path}": path for path, _ in model.named_parameters()}
    shapes = tuple((key, tuple(model.get_parameter(path).shape)) for key, path in parameters.items())
    reason = (
        f"no stack of transformer blocks was found in {type(model).__name__} (a ModuleList of blocks with attention "
        f"projections q, k, v); name its linears and norms instead, e.g. at='{MODULE}*'"
    )
    sites = [Site("weights", "", None, "", "", 0, 0, shapes=shapes)] if shapes else []
    absent = {name: reason for name in VOCABULARY if name != "weights" or not shapes}
    return Anatomy(sites, absent, {}, parameters, module_sites(model, [], ""))


def _canonical(model: nn.Module, sites: list[Site], trunk_path: str) -> dict[str, str]:
    """Name every parameter of the trunk by the site it stands behind; what wraps the trunk does not matter."""
    owner: dict[int, str] = {}  # by parameter and not by path: tied ones have several
    for site in sites:
        if site.name not in ("lm_head", "block", "attn", "cross", "ffn", "ffn.act"):
            for parameter in model.get_submodule(site.exit).parameters(recurse=False):
                owner.setdefault(id(parameter), site.key)
    blocks = {site.exit: site.key for site in reversed(sites) if site.name == "block"}
    inside_trunk = f"{trunk_path}." if trunk_path else ""
    found: dict[str, str] = {}
    for path, parameter in model.named_parameters():
        module, _, leaf = path.rpartition(".")
        if leaf in STAND_INS or COMPUTED.search(type(model.get_submodule(module)).__name__):
            continue
        key = owner.get(id(parameter))
        if key is None:
            inside = next((b for b in blocks if module == b or module.startswith(f"{b}.")), None)
            if inside is not None:
                key = f"{blocks[inside]}:{module.removeprefix(inside).lstrip('.')}"
            elif embedding_like(path):
                key = f"embed:{module.rpartition('.')[2]}"
            elif path.startswith(inside_trunk) and not BESIDE.search(module):
                key = f"trunk:{module.removeprefix(inside_trunk)}"
            else:
                continue
        found[f"{key}.{leaf}"] = path
    return dict(sorted(found.items()))


def _reason(name: str, sites: list[Site]) -> str:
    names = {site.name for site in sites}
    if "ffn" in names and "ffn.up" not in names and name in ABSENT_WITH_EXPERTS:
        return ABSENT_WITH_EXPERTS[name]
    if "attn.q" not in names and name in ABSENT_BYPASSED:
        return ABSENT_BYPASSED[name]
    found = ABSENT_REASON.get(name) or ABSENT_REASON.get(name.split(".")[0]) or ABSENT_WITHOUT_NORM.get(name)
    return found or UNFOUND


def _global_sites(
    model: Any, trunk: Any, trunk_path: str, stacks: dict[str, list[Block]], widths: dict[str, int]
) -> list[Site]:
    sites: dict[str, Site] = {}
    paths = {id(module): path for path, module in model.named_modules()}
    first = next(name for name in ("text", "encoder", "decoder", *stacks) if name in stacks)

    def add(name: str, stack: str, path: str, d_in: int, d_out: int, **facts: Any) -> None:
        site = Site(name, stack, None, path, path, d_in, d_out, **facts)
        sites.setdefault(site.key, site)

    # Of an encoder-decoder take the encoder's own module: the shared one may hold the table and never be called.
    two = "encoder" in stacks and "decoder" in stacks
    for owner, stack in ((trunk.get_encoder(), first), (trunk.get_decoder(), "decoder")) if two else ((trunk, first),):
        embed = input_table(owner)
        if embed is not None:
            width, scale = embed.embedding_dim, float(getattr(embed, "embed_scale", 1.0))
            add("embed", stack, paths[id(embed)], width, width, words=embed.num_embeddings, scale=scale)
            break
    inside = tuple(f"{block.path}." for blocks in stacks.values() for block in blocks)
    for path, module in trunk.named_modules(prefix=trunk_path):
        if path.startswith(inside):
            continue
        stack = max(stacks, key=lambda name: _shared(stacks[name][0].path, path))
        if PATCHES.search(path) and not any(s.name == "embed" and s.stack == stack for s in sites.values()):
            add("embed", stack, path, widths[stack], widths[stack])
        if not is_norm(module):
            continue
        width, bias = norm_width(module) or 0, getattr(module, "bias", None) is not None
        if BESIDE.search(path.removeprefix(trunk_path)):
            continue
        if EMBEDDING_NORM.search(path.lower()):
            add("norm.embed", stack, path, width, width, bias=bias)
        elif not any(path.rpartition(".")[0] in ("", *_above(blocks[0].path)) for blocks in stacks.values()):
            continue  # between two groups of blocks
        elif FINAL_NORM.search(path):
            add("norm.final", stack, path, width, width, bias=bias)
        elif PLAIN_NORM.search(path):
            before = _stands_before(model, path, stacks[stack][0].path)
            add("norm.embed" if before else "norm.final", stack, path, width, width, bias=bias)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    shape = linear_shape(head) if head is not None else None
    if head is not None and shape:
        last = "decoder" if "decoder" in stacks else first
        add("lm_head", last, paths[id(head)], *shape, bias=getattr(head, "bias", None) is not None)
    return list(sites.values())


def input_table(owner: Any) -> nn.Embedding | None:
    """Return the table of token embeddings of a network, or None if its input is something else."""
    try:
        table = owner.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        table = getattr(getattr(owner, "text_model", None), "embeddings", None)  # of two towers
        table = getattr(table, "token_embedding", None)
    return table if isinstance(table, nn.Embedding) else None


def _shared(left: str, right: str) -> int:
    """Return how many leading components two paths share."""
    pairs = zip(left.split("."), right.split("."), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(left.count("."), right.count(".")) + 1)


def _above(path: str) -> list[str]:
    """Return the paths of the modules that hold a module, outermost first."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _stands_before(model: nn.Module, path: str, block: str) -> bool:
    """Whether a module comes before the blocks in the module that holds both."""
    shared = _shared(path, block)
    holder = ".".join(path.split(".")[:shared])
    names = [name for name, _ in model.get_submodule(holder).named_children()]
    return names.index(path.split(".")[shared]) < names.index(block.split(".")[shared])
