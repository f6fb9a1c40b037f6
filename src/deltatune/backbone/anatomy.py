"""Anatomy: find the sites of a backbone from its modules' names and shapes.

One table of synonyms serves every architecture; there is no class per model. What a backbone lacks is declared
absent with the reason.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from torch import Tensor, nn

from deltatune.backbone.sites import ORDER, VOCABULARY, Heads, Selection, Site, View, block_numbers, expand_names
from deltatune.errors import BackboneError, SiteError

CROSS = re.compile(r"(^|\.)(EncDecAttention|crossattention|encoder_attn|cross_attn)(\.|$)")
ATTENTION = re.compile(r"(^|\.)(attention|self_attn|attn|SelfAttention|self_attention|self)(\.|$)")
# A linear's last path component (or last two) -> its part. `dense` alone says nothing, so its parent is named too.
PARTS: dict[str, re.Pattern[str]] = {
    "q": re.compile(r"(^|\.)(query|q_proj|q_lin|q)$"),
    "k": re.compile(r"(^|\.)(key|k_proj|k_lin|k)$"),
    "v": re.compile(r"(^|\.)(value|v_proj|v_lin|v)$"),
    "o": re.compile(r"(^|\.)(o_proj|out_proj|out_lin|o|output\.dense|c_proj)$"),
    "qkv": re.compile(r"(^|\.)(c_attn|qkv_proj)$"),
    "up": re.compile(r"(^|\.)(intermediate\.dense|lin1|c_fc|up_proj|wi|wi_1|fc1)$"),
    "gate": re.compile(r"(^|\.)(gate_proj|wi_0)$"),
    "down": re.compile(r"(^|\.)(output\.dense|lin2|c_proj|down_proj|wo|fc2)$"),
}
ACTIVATION = re.compile(r"(^|\.)(intermediate_act_fn|activation|act|act_fn)$")
NORMS: dict[str, re.Pattern[str]] = {
    "attn": re.compile(r"^(ln_1|input_layernorm|sa_layer_norm|self_attn_layer_norm)$"),
    "cross": re.compile(r"^(encoder_attn_layer_norm|ln_cross_attn)$"),
    "ffn": re.compile(r"^(ln_2|post_attention_layernorm|output_layer_norm|final_layer_norm)$"),
}
FINAL_NORM = re.compile(r"(^|\.)(ln_f|norm|final_layer_norm|final_layernorm)$")
ABSENT_REASON = {
    "cross": "no attention to an encoder",
    "ffn.gate": "the feed-forward has no gate",
    "norm.cross": "no attention to an encoder",
    "norm.final": "norms stand after each sub-layer; the last block's norm.ffn is the last norm",
    "norm.embed": "no norm after the embeddings",
    "lm_head": "loaded without a language-model head",
    "ffn.act": "the activation is a plain function, not a module",
}


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (d_in, d_out) of a linear-like module (nn.Linear, the transposed Conv1D of GPT-2), or None."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor):
        return weight.shape[0], weight.shape[1]
    return None


def is_norm(module: nn.Module) -> bool:
    """Say whether a module is a layer norm or an RMS norm: named so, with a weight vector."""
    weight = getattr(module, "weight", None)
    return "Norm" in type(module).__name__ and isinstance(weight, Tensor) and weight.ndim == 1


@dataclass
class Anatomy:
    """The sites of one backbone, and the vocabulary's names that it lacks, each with its reason."""

    sites: list[Site]
    absent: dict[str, str]
    depth: dict[str, int]
    parameters: dict[str, str]  # canonical key -> path, of every parameter of the trunk, ordered by key
    by_key: dict[str, Site] = field(init=False)

    def __post_init__(self) -> None:
        self.by_key = {site.key: site for site in self.sites}

    def select(self, names: str, blocks: str | None = None) -> Selection:
        """Return the sites with these names in these blocks.

        Raises UnknownName for a name outside the vocabulary, SiteError for a site that this backbone lacks or for
        blocks that it has not.
        """
        wanted = expand_names(names)
        for name in wanted:
            if name in self.absent:
                have = sorted({s.name for s in self.sites}, key=ORDER.__getitem__)
                raise SiteError(f"this backbone has no site {name!r}: {self.absent[name]}; it has: {', '.join(have)}")
        allowed = {stack: block_numbers(blocks, n) if blocks else set(range(n)) for stack, n in self.depth.items()}
        found = [
            s for s in self.sites if s.name in wanted and (s.block is None or s.block in allowed.get(s.stack, set()))
        ]
        if not found:
            raise SiteError(f"no site matches {names!r} in blocks={blocks!r}; the backbone has {self.depth} blocks")
        return Selection(found)

    def has(self, name: str) -> bool:
        """Say whether the backbone has a site of this name."""
        return name in ORDER and name not in self.absent


def find_anatomy(model: nn.Module) -> Anatomy:
    """Find the sites of a transformer.

    BackboneError if no stack of blocks with attention is found.
    """
    trunk = getattr(model, "base_model", model)
    trunk_path = next((path for path, module in model.named_modules() if module is trunk), "")
    stacks = _find_stacks(model, trunk, trunk_path)
    if not stacks:
        raise BackboneError(
            f"no stack of transformer blocks found in {type(model).__name__}: expected a ModuleList of blocks with "
            f"attention projections (q, k, v); give modules by name for other networks"
        )
    sites: list[Site] = []
    for stack, path in stacks.items():
        blocks = model.get_submodule(path)
        for number, block in enumerate(blocks.children()):
            sites += _block_sites(model, stack, number, f"{path}.{number}", block)
    sites += _global_sites(model, trunk, trunk_path, stacks)
    sites.sort(key=lambda s: (s.stack, -1 if s.block is None else s.block, ORDER[s.name]))
    parameters = _canonical(model, sites)
    shapes = tuple((key, tuple(model.get_parameter(path).shape)) for key, path in parameters.items())
    width = next(site.d_out for site in sites if site.name == "block")
    sites.append(Site("weights", next(iter(stacks)), None, trunk_path, trunk_path, width, width, shapes=shapes))
    present = {s.name for s in sites}
    absent = {name: _reason(name) for name in VOCABULARY if name not in present}
    depth = {stack: len(list(model.get_submodule(path).children())) for stack, path in stacks.items()}
    return Anatomy(sites, absent, depth, parameters)


def _canonical(model: nn.Module, sites: list[Site]) -> dict[str, str]:
    """Name every parameter of the trunk by the site it stands behind; what wraps the trunk does not matter."""
    owner: dict[int, str] = {}  # by parameter and not by path: tied ones have several
    for site in sites:
        if site.name not in ("lm_head", "block", "attn", "cross", "ffn", "ffn.act"):
            for parameter in model.get_submodule(site.exit).parameters(recurse=False):
                owner.setdefault(id(parameter), site.key)
    blocks = {site.exit: site.key for site in sites if site.name == "block"}
    found: dict[str, str] = {}
    for path, parameter in model.named_parameters():
        module, _, leaf = path.rpartition(".")
        key = owner.get(id(parameter))
        if key is None:
            inside = next((b for b in blocks if module.startswith(f"{b}.")), None)
            if inside is not None:
                key = f"{blocks[inside]}:{module.removeprefix(inside + '.')}"
            elif re.search(r"(^|\.)(embeddings|wpe|position_embeddings)(\.|$)", path):
                key = f"embed:{module.rpartition('.')[2]}"
            else:
                continue
        found[f"{key}.{leaf}"] = path
    return dict(sorted(found.items()))


def _reason(name: str) -> str:
    return ABSENT_REASON.get(name) or ABSENT_REASON.get(name.split(".")[0]) or "no module found for it"


def _find_stacks(model: nn.Module, trunk: nn.Module, trunk_path: str) -> dict[str, str]:
    """Map stack name (`encoder`, `decoder`) to the path of its ModuleList; lists inside a block do not count."""
    found: list[str] = []
    for path, module in trunk.named_modules(prefix=trunk_path):
        if not isinstance(module, nn.ModuleList) or len(module) == 0 or any(path.startswith(f"{p}.") for p in found):
            continue
        if len({type(child) for child in module}) == 1 and any(
            PARTS["q"].search(p) or PARTS["qkv"].search(p) for p, m in module[0].named_modules() if linear_shape(m)
        ):
            found.append(path)
    if len(found) == 1:
        causal = any(getattr(m, "is_causal", False) is True for m in trunk.modules())
        return {"decoder" if causal else "encoder": found[0]}
    return {("decoder" if "decoder" in path.split(".") else "encoder"): path for path in found}


def _group(path: str) -> str:
    if CROSS.search(path):
        return "cross"
    return "attn" if ATTENTION.search(path) else "ffn"


def _block_sites(model: nn.Module, stack: str, number: int, path: str, block: nn.Module) -> list[Site]:
    sites: list[Site] = []
    parts: dict[str, str] = {}
    for relative, module in block.named_modules():
        if not relative:
            continue
        full, group = f"{path}.{relative}", _group(relative)
        shape = linear_shape(module)
        bias = getattr(module, "bias", None) is not None
        if shape:
            options = ("up", "gate", "down") if group == "ffn" else ("q", "k", "v", "o", "qkv")
            part = next((p for p in options if PARTS[p].search(relative)), None)
            if part == "qkv":
                width = shape[1] // 3
                for i, name in enumerate(("q", "k", "v")):
                    parts[f"{group}.{name}"] = full
                    view = View(i * width, (i + 1) * width)
                    sites.append(Site(f"{group}.{name}", stack, number, full, full, shape[0], width, view, bias=bias))
            elif part:
                parts[f"{group}.{part}"] = full
                sites.append(Site(f"{group}.{part}", stack, number, full, full, *shape, bias=bias))
        elif is_norm(module):
            norm = _norm_name(relative, block)
            if norm:
                width = module.get_parameter("weight").shape[0]
                sites.append(Site(norm, stack, number, full, full, width, width, bias=bias))
        elif group == "ffn" and ACTIVATION.search(relative):
            parts["ffn.act"] = full
    by_name = {s.name: s for s in sites}
    for group in ("attn", "cross"):
        if {f"{group}.q", f"{group}.k", f"{group}.o"} <= parts.keys():
            q, o, k = by_name[f"{group}.q"], by_name[f"{group}.o"], by_name[f"{group}.k"]
            heads = _heads(model, parts[f"{group}.q"], parts[f"{group}.k"], q.d_out, k.d_out)
            sites.append(
                Site(group, stack, number, parts[f"{group}.q"], parts[f"{group}.o"], q.d_in, o.d_out, heads=heads)
            )
    if "ffn.up" in parts and "ffn.down" in parts:
        up, down = by_name["ffn.up"], by_name["ffn.down"]
        sites.append(Site("ffn", stack, number, parts["ffn.up"], parts["ffn.down"], up.d_in, down.d_out))
        if "ffn.act" in parts:
            sites.append(Site("ffn.act", stack, number, parts["ffn.act"], parts["ffn.act"], down.d_in, down.d_in))
    width = next((s.d_in for s in sites if s.name in ("attn.q", "ffn.up")), 0)
    sites.append(Site("block", stack, number, path, path, width, width))
    return sites


def _norm_name(relative: str, block: nn.Module) -> str | None:
    """Name a norm by the linears beside it; where it stands directly in the block, by its own name."""
    parent = relative.rpartition(".")[0]
    if parent:
        beside = [p for p, m in block.get_submodule(parent).named_modules() if linear_shape(m)]
        if beside:
            return f"norm.{_group(f'{parent}.{beside[0]}')}"
    own = relative.rpartition(".")[2]
    return next((f"norm.{group}" for group, pattern in NORMS.items() if pattern.search(own)), None)


def _heads(model: nn.Module, q_path: str, k_path: str, q_width: int, k_width: int) -> Heads | None:
    module = q_path.rpartition(".")[0] if q_path == k_path else _common(q_path, k_path)
    config = getattr(model.get_submodule(module), "config", None) or getattr(model, "config", None)
    number = getattr(config, "num_attention_heads", None)
    if not isinstance(number, int) or q_width % number:
        return None
    width = q_width // number
    return Heads(module, k_width // width, width)


def _common(left: str, right: str) -> str:
    """Return the path of the innermost module that holds both."""
    pairs = zip(left.split("."), right.split("."), strict=False)
    return ".".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _global_sites(model: Any, trunk: Any, trunk_path: str, stacks: dict[str, str]) -> list[Site]:
    sites: list[Site] = []
    paths = {id(module): path for path, module in model.named_modules()}
    # Of an encoder-decoder take the encoder's own module: the shared one may hold the table and never be called.
    owner: Any = trunk.get_encoder() if len(stacks) == 2 and hasattr(trunk, "get_encoder") else trunk
    embed = owner.get_input_embeddings() if hasattr(owner, "get_input_embeddings") else None
    first = "encoder" if "encoder" in stacks else "decoder"
    if isinstance(embed, nn.Embedding):
        path = paths[id(embed)]
        sites.append(Site("embed", first, None, path, path, embed.embedding_dim, embed.embedding_dim))
    inside = tuple(f"{path}." for path in stacks.values())
    for path, module in trunk.named_modules(prefix=trunk_path):
        if not is_norm(module) or path.startswith(inside):
            continue
        width, bias = module.get_parameter("weight").shape[0], getattr(module, "bias", None) is not None
        stack = next((s for s, p in stacks.items() if p.rpartition(".")[0] == path.rpartition(".")[0]), first)
        if "embed" in path.lower():
            sites.append(Site("norm.embed", first, None, path, path, width, width, bias=bias))
        elif FINAL_NORM.search(path):
            sites.append(Site("norm.final", stack, None, path, path, width, width, bias=bias))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    shape = linear_shape(head) if head is not None else None
    if head is not None and shape:
        last = "decoder" if "decoder" in stacks else first
        path = paths[id(head)]
        sites.append(Site("lm_head", last, None, path, path, *shape, bias=getattr(head, "bias", None) is not None))
    return sites
