"""Sites: the closed vocabulary of places in a backbone, and selections of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, cat

from deltatune.errors import SiteError, UnknownName

# The order is the order in which layers act where several sites share one module's output: inner before outer.
VOCABULARY: tuple[str, ...] = (
    "embed", "norm.embed",
    "attn.q", "attn.k", "attn.v", "attn.o",
    "cross.q", "cross.k", "cross.v", "cross.o",
    "ffn.up", "ffn.gate", "ffn.act", "ffn.down",
    "attn", "cross", "ffn",
    "norm.attn", "norm.cross", "norm.ffn",
    "block", "norm.final", "lm_head", "weights",
)  # fmt: skip
ORDER = {name: i for i, name in enumerate(VOCABULARY)}
MODULE = "module:"
"""What a name begins with that is a module's and not of the vocabulary."""

Rows = Literal["rows", "parts", "none"]


@dataclass(frozen=True)
class View:
    """Columns of a fused output: `start:stop` of every `period` columns, of all of them once if `period` is 0.

    E.g. the query part of GPT-2's `c_attn` ([..., 3 * width]) is one piece; in GPT-NeoX it is one piece per head.
    """

    start: int
    stop: int
    period: int = 0

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}" + (f" of every {self.period}" if self.period else "")

    def take(self, h: Tensor) -> Tensor:
        """Return the viewed columns of `h` [..., width]."""
        if self.period:
            return h.unflatten(-1, (-1, self.period))[..., self.start : self.stop].flatten(-2)
        return h[..., self.start : self.stop]

    def put(self, h: Tensor, part: Tensor) -> Tensor:
        """Return `h` with the viewed columns replaced by `part`; `h` itself stays as it is."""
        if self.period:
            h = h.unflatten(-1, (-1, self.period))
            part = part.unflatten(-1, (h.shape[-2], -1))
        whole = cat([h[..., : self.start], part, h[..., self.stop :]], dim=-1)
        return whole.flatten(-2) if self.period else whole


@dataclass(frozen=True)
class Heads:
    """The attention module behind an `attn` or `cross` site, and the shape of its keys and values."""

    module: str
    number: int
    width: int


@dataclass(frozen=True)
class Site:
    """One named place: a span from the input of module `entry` to the output of module `exit`.

    `entry` and `exit` are module paths in the backbone; for a linear they are the same module. `d_in` and `d_out` are
    the widths at the two ends. `view` picks columns where a checkpoint fuses things. `rows` says what dimension 0 is at
    run time; "parts": each row's windows or tokens, row after row; "none": of a second call of the module in the same
    block, on a table that all rows share. `bias` says whether the exit module has a bias of its own. `call` is for a
    block that serves as several: the site is its run of this number, out of `calls` in a forward. `experts` is
    for what a mixture computes in no module of its own: how many experts it has. `words` and `scale` are for a table of
    tokens alone: how many it has, and what it multiplies its rows by; its entry is their ids, and d_in is what comes
    out. `shapes` is for the site `weights` alone: the canonical key and shape of every parameter of the trunk.
    """

    name: str
    stack: str
    block: int | None
    entry: str
    exit: str
    d_in: int
    d_out: int
    view: View | None = None
    heads: Heads | None = None
    bias: bool = False
    rows: Rows = "rows"
    call: int = 0
    calls: int = 1
    experts: int = 0
    words: int = 0
    scale: float = 1.0
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def key(self) -> str:
        """The canonical address, e.g. `encoder.3.attn.q`; it is what a saved delta names."""
        return ".".join(str(part) for part in (self.stack or None, self.block, self.name) if part is not None)


class Selection(Sequence[Site]):
    """An ordered, printable, countable set of sites of one backbone."""

    def __init__(self, sites: Iterable[Site]) -> None:
        self._sites = tuple(sites)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._sites[index]

    def __len__(self) -> int:
        return len(self._sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def expect(self, number: int) -> Selection:
        """Return itself if it holds `number` sites; SiteError otherwise."""
        if len(self) != number:
            raise SiteError(f"the selection holds {len(self)} sites, {number} expected: {self}")
        return self

    def narrow(self, names: str | None = None, blocks: str | None = None) -> Selection:
        """Return the sites that also match `names` and `blocks`."""
        wanted = None if names is None else set(expand_names(names))
        kept = [s for s in self if wanted is None or s.name in wanted]
        return Selection(_in_blocks(kept, blocks) if blocks else kept)

    def __repr__(self) -> str:
        by_name: dict[tuple[str, str], list[int | None]] = {}
        for site in self:
            by_name.setdefault((site.stack, site.name), []).append(site.block)
        parts = [
            f"{stack}.{name}" if blocks == [None] else f"{stack}.[{','.join(map(str, blocks))}].{name}"
            for (stack, name), blocks in by_name.items()
        ]
        return f"{len(self)} sites: {' '.join(parts)}"


def expand_names(pattern: str) -> list[str]:
    """Expand `"attn.{q,v} ffn"` to site names.

    A pattern is names separated by spaces or commas outside braces; `{a,b}` lists alternatives. UnknownName for a name
    outside the vocabulary. What begins with `module:` is kept as it is: a pattern of names of modules.
    """
    names: list[str] = []
    if re.search(r"[{}]", re.sub(r"\{[^{}]*\}", "", pattern)):
        raise SiteError(f"the braces of {pattern!r} do not match: expected a selection such as 'attn.{{q,v}} ffn'")
    for word in re.findall(r"(?:[^\s,{}]|\{[^}]*\})+", pattern):
        braces = re.fullmatch(r"([^{}]*)\{([^}]*)\}([^{}]*)", word)
        found = [word]
        if braces:
            found = [f"{braces[1]}{option.strip()}{braces[3]}" for option in braces[2].split(",")]
        for name in found:
            if name not in ORDER and not name.startswith(MODULE):
                raise UnknownName("site", name, VOCABULARY, "`deltatune sites BACKBONE` lists them")
            if name not in names:
                names.append(name)
    if not names:
        raise SiteError(f"an empty selection of sites: got {pattern!r}, expected names such as 'attn.{{q,v}} ffn'")
    return names


def rank(site: Site) -> int:
    """Return the place of a site in the order in which layers act: inner before outer."""
    return ORDER.get(site.name, ORDER["attn.q"])


def _in_blocks(sites: Sequence[Site], blocks: str) -> list[Site]:
    """Keep the sites whose block number lies in the slice or list `blocks` (`"-4:"`, `"0,2,5"`), stack by stack."""
    depth = {s.stack: 0 for s in sites}
    for site in sites:
        if site.block is not None:
            depth[site.stack] = max(depth[site.stack], site.block + 1)
    kept = [s for s in sites if s.block is None or s.block in block_numbers(blocks, depth[s.stack])]
    if not kept:
        raise SiteError(f"no block matches blocks={blocks!r}; the backbone has {depth}")
    return kept


def block_numbers(blocks: str, depth: int) -> set[int]:
    """Return the block numbers that `blocks` names in a stack of `depth` blocks. SiteError as for `numbers`."""
    return set(numbers(blocks, depth, "blocks", "the stack"))


def numbers(text: str, size: int, what: str, where: str = "the table") -> list[int]:
    """Return the numbers below `size` that a slice or list such as "-4:" or "0,2,5" names, each once, in its order.

    `what` is in it (blocks, tokens), `where` holds them. SiteError if it does not parse, names none, or one that is not
    there.
    """
    found: dict[int, None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)?\s*(:)?\s*(-?\d+)?\s*", part)
        if not match or not part.strip() or (match[3] and not match[2]):
            raise SiteError(f"{what}={text!r} does not parse: expected a slice or a list such as '-4:' or '0,2,5'")
        first, colon, last = match.groups()
        if colon:
            found.update(dict.fromkeys(range(size)[slice(int(first) if first else None, int(last) if last else None)]))
            continue
        if not -size <= int(first) < size:
            raise SiteError(f"{what}={text!r} names {what[:-1]} {first}; {where} has {size} {what}, 0 to {size - 1}")
        found[int(first) % size] = None
    return list(found)
