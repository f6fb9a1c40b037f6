"""Blocks: the stacks of a transformer, and the sites within one block."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from torch import Tensor, nn

from deltatune.backbone.sites import Heads, Rows, Site, View
from deltatune.backbone.synonyms import (
    ACTIVATION,
    ATTENTION,
    BYPASSED,
    CAUSAL,
    CHUNKED,
    CROSS,
    EXPERTS,
    FLATTENED,
    HEAD_NORM,
    INTERLEAVED,
    NORMS,
    PARTS,
    TOWERS,
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """One block of a stack: a module, which run of it in a forward this is, and of how many."""

    path: str
    call: int = 0
    calls: int = 1


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (d_in, d_out) of a linear-like module (nn.Linear, the transposed Conv1D of GPT-2), or None."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor):
        return weight.shape[0], weight.shape[1]
    return None


def norm_width(module: nn.Module) -> int | None:
    """Return the width of a layer norm or an RMS norm, with a weight vector or without one, or None."""
    # Those norm channels, which do not stand last.
    by_channel = (nn.GroupNorm, nn.modules.batchnorm._NormBase)
    if "Norm" not in type(module).__name__ or isinstance(module, by_channel):
        return None
    weight = getattr(module, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else getattr(module, "normalized_shape", ())
    return int(shape[0]) if len(shape) == 1 else None


def is_norm(module: nn.Module) -> bool:
    """Say whether a module is a layer norm or an RMS norm."""
    return norm_width(module) is not None


def find_stacks(trunk: nn.Module, trunk_path: str) -> dict[str, list[Block]]:
    """Map stack name (`encoder`, `decoder`, `text`, `vision`) to its blocks in the order in which they run."""
    lists: list[str] = []
    for path, module in trunk.named_modules(prefix=trunk_path):
        if not _holds_blocks(module) or any(path.startswith(f"{outer}.") for outer in lists):
            continue
        assert isinstance(module, nn.ModuleList)
        if not any(_holds_blocks(inner) for inner in module[0].modules()):  # stages or groups of blocks
            lists.append(path)
    config = getattr(trunk, "config", None)
    named: dict[str, list[str]] = {}
    for path in lists:
        named.setdefault(_stack_name(trunk, path.split(".")), []).append(path)
    return {name: _in_order(trunk, trunk_path, paths, config) for name, paths in named.items()}


def _holds_blocks(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.ModuleList)
        and len({type(child) for child in module}) == 1
        and any(PARTS["q"].search(p) or PARTS["qkv"].search(p) for p, m in module[0].named_modules() if linear_shape(m))
    )


def _stack_name(trunk: nn.Module, path: list[str]) -> str:
    tower = next((TOWERS[part] for part in path if part in TOWERS), None)
    both = all(hasattr(trunk, part) for part in TOWERS)
    if tower is not None and both:
        return tower
    if hasattr(trunk, "get_encoder") and "encoder" in path and _has_decoder(trunk):
        return "encoder"
    causal = getattr(getattr(trunk, "config", None), "model_type", "") in CAUSAL
    causal = causal or any(getattr(module, "is_causal", False) is True for module in trunk.modules())
    return "decoder" if causal or "decoder" in path else "encoder"


def _has_decoder(trunk: nn.Module) -> bool:
    return any("decoder" in path.split(".") for path, _ in trunk.named_modules())


def _in_order(trunk: nn.Module, trunk_path: str, lists: list[str], config: Any) -> list[Block]:
    """The blocks of one stack: list after list; those of a group that is run again and again, once for each run."""
    times = 1
    if getattr(config, "num_hidden_groups", 0):
        times = int(config.num_hidden_layers) // len(lists)
    blocks: list[Block] = []
    for path in lists:
        inside = trunk.get_submodule(path.removeprefix(f"{trunk_path}.") if trunk_path else path)
        numbers = range(len(list(inside.children())))
        blocks += [Block(f"{path}.{i}", call, times) for call in range(times) for i in numbers]
    return blocks


def group_of(path: str) -> str:
    """Say to which sub-layer of its block a module belongs, by its path: attn, cross or ffn."""
    if CROSS.search(path):
        return "cross"
    return "attn" if ATTENTION.search(path) else "ffn"


def block_sites(model: nn.Module, stack: str, number: int, block: Block) -> list[Site]:
    """Find the sites within one block."""
    finder = _Finder(model, stack, number, block)
    finder.linears()
    finder.norms()
    finder.spans()
    return [replace(site, call=block.call, calls=block.calls) for site in finder.sites.values()]


class _Finder:
    """The sites of one block while they are being found, by name."""

    def __init__(self, model: nn.Module, stack: str, number: int, block: Block) -> None:
        self.model, self.stack, self.number, self.path = model, stack, number, block.path
        self.block = model.get_submodule(block.path)
        self.config = getattr(self.block, "config", None) or getattr(model, "config", None)
        self.sites: dict[str, Site] = {}

    def add(self, name: str, entry: str, exit: str, d_in: int, d_out: int, **facts: Any) -> None:
        self.sites.setdefault(name, Site(name, self.stack, self.number, entry, exit, d_in, d_out, **facts))

    def linears(self) -> None:
        for relative, module in self.block.named_modules():
            shape = linear_shape(module)
            if not shape or EXPERTS.search(relative):
                continue
            group, full = group_of(relative), f"{self.path}.{relative}"
            if group == "attn" and getattr(self.config, "model_type", "") in BYPASSED:
                continue
            options = ("up", "gate", "gate_up", "down") if group == "ffn" else ("q", "k", "v", "o", "qkv")
            part = next((p for p in options if PARTS[p].search(relative)), None)
            bias = getattr(module, "bias", None) is not None
            if part in ("qkv", "gate_up"):
                for name, view in self._views(part, full, shape).items():
                    width = (view.stop - view.start) * (shape[1] // view.period if view.period else 1)
                    self.add(
                        f"{group}.{name}", full, full, shape[0], width, view=view, bias=bias, rows=self._rows(group)
                    )
            elif part:
                rows = "none" if part in ("q", "k") and self._on_tables(full) else self._rows(group)
                self.add(f"{group}.{part}", full, full, *shape, bias=bias, rows=rows)

    def _rows(self, group: str, norm: bool = False) -> Rows:
        windows = group == "attn" and not norm and hasattr(self.block, "window_size")
        flat = group == "ffn" and getattr(self.config, "model_type", "") in FLATTENED
        return "parts" if windows or flat else "rows"

    def _on_tables(self, path: str) -> bool:
        """Whether the projection also runs on a table of relative positions."""
        module = self.model.get_submodule(path.rpartition(".")[0])
        return bool(getattr(module, "share_att_key", False) and getattr(module, "relative_attention", False))

    def _views(self, part: str, path: str, shape: tuple[int, int]) -> dict[str, View]:
        """The columns of the parts of a fused projection; grouped keys and values are told by its width."""
        width = shape[1]
        if part == "gate_up":
            return {"gate": View(0, width // 2), "up": View(width // 2, width)}
        kind = getattr(self.config, "model_type", "")
        heads = int(getattr(self.config, "num_attention_heads", 1))
        size = getattr(self.config, "head_dim", None) or int(getattr(self.config, "hidden_size", width // 3)) // heads
        keys = (width // size - heads) // 2
        cut = path.endswith("query_key_value") or kind in INTERLEAVED
        pieces, order = CHUNKED.get(kind, (keys if cut else 1, "qkv"))
        sizes = {"q": heads * size // pieces, "k": keys * size // pieces, "v": keys * size // pieces}
        views, start = {}, 0
        for name in order:
            views[name] = View(start, start + sizes[name], width // pieces if pieces > 1 else 0)
            start += sizes[name]
        return views

    def norms(self) -> None:
        direct: dict[str, str] = {}
        for relative, module in self.block.named_modules():
            width = norm_width(module)
            if width is None or HEAD_NORM.search(relative) or EXPERTS.search(relative):
                continue
            parent, _, own = relative.rpartition(".")
            beside = (
                [p for p, m in self.block.get_submodule(parent).named_modules() if linear_shape(m)] if parent else []
            )
            if beside:
                self._norm(group_of(f"{parent}.{beside[0]}"), relative)
            else:
                direct.setdefault(own, relative)
        taken: set[str] = set()
        for group in ("ffn", "cross", "attn"):
            name = next((n for n in NORMS[group] if n in direct and n not in taken), None)
            if name is not None and f"norm.{group}" not in self.sites:
                taken.add(name)
                self._norm(group, direct[name])

    def _norm(self, group: str, relative: str) -> None:
        full = f"{self.path}.{relative}"
        module = self.model.get_submodule(full)
        width = norm_width(module)
        assert width is not None
        bias = getattr(module, "bias", None) is not None
        self.add(f"norm.{group}", full, full, width, width, bias=bias, rows=self._rows(group, norm=True))

    def spans(self) -> None:
        for group in ("attn", "cross"):
            q, k, v, o = (self.sites.get(f"{group}.{part}") for part in "qkvo")
            if q and k and o:
                heads = heads_of(self.model, q, k)
                first = v if v and q.rows == "none" else q  # what also runs on a table begins more than the attention
                self.add(group, first.entry, o.exit, first.d_in, o.d_out, heads=heads, rows=self._rows(group))
        up, down = self.sites.get("ffn.up"), self.sites.get("ffn.down")
        width = next((s.d_in for s in self.sites.values() if s.name in ("attn.q", "ffn.up")), 0)
        if up and down:
            self.add("ffn", up.entry, down.exit, up.d_in, down.d_out, rows=self._rows("ffn"))
            act = next(
                (p for p, _ in self.block.named_modules() if ACTIVATION.search(p) and group_of(p) == "ffn"), None
            )
            if act is not None:
                self.add(
                    "ffn.act", f"{self.path}.{act}", f"{self.path}.{act}", down.d_in, down.d_in, rows=self._rows("ffn")
                )
        else:
            self._mixture(width)
        self.add("block", self.path, self.path, width, width)

    def _mixture(self, width: int) -> None:
        experts = next((p for p, _ in self.block.named_modules() if EXPERTS.search(p)), "")
        if not experts:
            return
        mixture, full = f"{self.path}.{experts.rpartition('.')[0]}", f"{self.path}.{experts}"
        self.add("ffn", mixture, mixture, width, width)
        module: Any = self.model.get_submodule(full)
        if not fused_experts(module):
            return
        inner = module.down_proj.shape[1 if module.is_transposed else 2]
        facts = {"rows": "parts", "experts": len(module.down_proj)}
        for name in ("ffn.up", "ffn.gate"):
            self.add(name, full, full, width, inner, bias=hasattr(module, "gate_up_proj_bias"), **facts)
        self.add("ffn.act", full, full, inner, inner, **facts)
        self.add("ffn.down", full, full, inner, width, bias=hasattr(module, "down_proj_bias"), **facts)


def fused_experts(module: Any) -> bool:
    """Whether a mixture keeps its experts as transformers' interface of experts has them: gated, with plain gates."""
    gate = getattr(type(module), "_apply_gate", None)
    return (
        getattr(gate, "__name__", "") == "_default_apply_gate"
        and bool(module.has_gate and module.is_concatenated and not module.has_post_expert_norm)
        and not module._is_expert_parallel
    )


def heads_of(model: nn.Module, q: Site, k: Site) -> Heads | None:
    """Return the attention module of two sites and its heads; None if it takes no keys and values of ours."""
    path = q.entry.rpartition(".")[0] if q.entry == k.entry else _common(q.entry, k.entry)
    module = model.get_submodule(path)
    config = getattr(module, "config", None) or getattr(model, "config", None)
    number = getattr(config, "num_attention_heads", None)
    # Only attention that asks transformers' table of functions comes through ours.
    asks = "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(module).forward).__code__.co_names
    if not isinstance(number, int) or q.d_out % number or not asks:
        return None
    width = q.d_out // number
    return Heads(path, k.d_out // width, width)


def _common(left: str, right: str) -> str:
    """Return the path of the innermost module that holds both."""
    pairs = zip(left.split("."), right.split("."), strict=False)
    return ".".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def embedding_like(path: str) -> bool:
    """Say whether a parameter outside the blocks stands at the embeddings."""
    return bool(re.search(r"(^|\.)(embeddings|wpe|position_embeddings)(\.|$)", path))
