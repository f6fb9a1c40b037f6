"""What OpenDelta's methods compute, said in ours: tensors and options of a file -> members of a delta."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.backbone.blocks import linear_shape
from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Site
from deltatune.backbone.weights import read_weight
from deltatune.delta.activation import Activation
from deltatune.delta.assemble import Member, Part, members_of
from deltatune.delta.catalogue import find
from deltatune.delta.exchange.opendelta_names import Places, selected
from deltatune.delta.exchange.places import Naming, agree, linears, site_less
from deltatune.errors import DeltaFileError, UnknownName

LORA = {"lora.lora_A": "A", "lora.lora_B": "B"}
BOTTLENECK = {
    "modulelist.down_proj.weight": "down", "modulelist.down_proj.bias": "down_bias",
    "modulelist.up_proj.weight": "up", "modulelist.up_proj.bias": "up_bias",
}  # fmt: skip
ACTS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh", "gelu_orig": "gelu", "gelu": "gelu", "relu": "relu", "swish": "silu", "silu": "silu",
    "tanh": "tanh", "leakyrelu": "leaky_relu",
}  # fmt: skip
NETWORK = {
    "reparams.wte.weight": "table", "reparams.control_trans.0.weight": "first",
    "reparams.control_trans.0.bias": "first_bias", "reparams.control_trans.2.weight": "second",
    "reparams.control_trans.2.bias": "second_bias",
}  # fmt: skip
PREFIXED = ("bert", "roberta", "xlm-roberta", "gpt2", "bart")
T5_PREFIX = (
    "there its keys have relative positions, and the blocks after the first lose their table of positions; a prefix "
    "here does neither"
)


@dataclass
class Read:
    """A folder while it is read; `left` are the tensors that no reader has taken."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    backbone: Backbone
    where: str
    left: dict[str, Tensor] = field(init=False)
    naming: Naming = field(init=False)

    def __post_init__(self) -> None:
        self.left = dict(self.tensors)
        self.naming = Naming(self.backbone, [])

    def take(self, ends: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
        """Take the tensors with these ends: the file's module path -> {name: tensor}.

        DeltaFileError if there are none, or a module has some of them only.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for key in self.tensors:
            end = next((end for end in ends if f".{key}".endswith(f".{end}")), None)
            if end is not None:
                found.setdefault(f".{key}".removesuffix(f".{end}").lstrip("."), {})[ends[end]] = self.left.pop(key)
        for path, own in found.items():
            for end, name in ends.items():
                if name not in own:
                    raise DeltaFileError(f"{self.where} lacks {f'{path}.{end}'.lstrip('.')!r}, a part of {path!r}")
        if not found:
            raise DeltaFileError(
                f"{self.where} holds no {self.config['delta_type']}: expected MODULE.{next(iter(ends))}"
            )
        self.naming = Naming(self.backbone, found)
        return found

    def agree(self, paths: Iterable[str], chosen: Iterable[str]) -> None:
        """Check that the file's modules are those that its config selects (our paths). DeltaFileError otherwise.

        OpenDelta leaves what is not there as it starts.
        """
        have = {self.naming.ours(path): path for path in paths}
        for path in have.keys() - self.naming.modules.keys():
            raise site_less(have[path], self.backbone, self.where)
        agree(set(have), set(chosen), "modified_modules", self.naming, self.where)

    def selected(self) -> list[str]:
        """Return the modules that the config selects (our paths), in the network's order."""
        return selected(self.config, self.naming, self.backbone)

    def check(self, path: str, own: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
        """Check the shapes of a module's tensors. DeltaFileError otherwise."""
        for name, shape in expected.items():
            if tuple(own[name].shape) != shape:
                raise DeltaFileError(
                    f"{self.where}: {name!r} of {path!r} has shape {tuple(own[name].shape)}, expected {shape} for this "
                    f"backbone"
                )


def read_lora(held: Read) -> list[Member]:
    """y = W x + (alpha / r) B A x at linears: ours."""
    config, backbone = held.config, held.backbone
    sites, r = linears(backbone), int(config["lora_r"])
    parts: list[Part] = []
    found = held.take(LORA)
    held.agree(found, held.selected())
    for path, own in found.items():
        module = held.naming.ours(path)
        shape = linear_shape(backbone.module.get_submodule(module)) if module in sites else None
        if shape is None or sum(site.d_out for site in sites[module]) != shape[1]:
            raise site_less(path, backbone, held.where)
        held.check(path, own, {"A": (r, shape[0]), "B": (shape[1], r)})
        parts += [
            Part(site, {"A": own["A"], "B": _columns(site, own["B"].mT).mT.contiguous()}) for site in sites[module]
        ]
    fields = {"r": r, "alpha": float(config["lora_alpha"]), "dropout": config.get("lora_dropout") or 0.0}
    return members_of("lora", fields, parts, backbone)


def read_adapter(held: Read) -> list[Member]:
    """h + U act(D h + b) + c after a module: ours at the site where that module ends."""
    found = held.take({f"adapter.{end}": name for end, name in BOTTLENECK.items()})
    held.agree(found, held.selected())
    places = Places(held.backbone, held.naming, held.where)
    parts = []
    for path, own in found.items():
        site = places.exit_at(held.naming.ours(path))
        parts.append(_bottleneck(held, path, own, site, site.d_out))
    _once(held, parts)
    return members_of("adapter", {"m": held.config["bottleneck_dim"], "act": _act(held)}, parts, held.backbone)


def read_parallel_adapter(held: Read) -> list[Member]:
    """h + U act(D x + b) + c, x what one module takes and h what another gives: ours, unscaled, at the span of both.

    The names in `modified_modules` are pairs, and the modules that they select are begun and ended in turns.
    """
    found = held.take({f"parallel_adapter.{end}": name for end, name in BOTTLENECK.items()})
    names = [str(name) for name in held.config["modified_modules"]]
    ends: dict[str, str] = {}
    entry, turn = "", 0
    for path in held.selected():
        if turn % 2 == 0:
            entry = path
        if turn % 2 == 1 or names[turn] == names[turn + 1]:
            ends[entry] = path
            turn |= 1
        turn = (turn + 1) % len(names)
    held.agree(found, ends)
    places = Places(held.backbone, held.naming, held.where)
    parts = []
    for path, own in found.items():
        site = places.span(held.naming.ours(path), ends[held.naming.ours(path)])
        parts.append(_bottleneck(held, path, own, site, site.d_in))
    _once(held, parts)
    fields = {"m": held.config["bottleneck_dim"], "act": _act(held), "scale": 1.0}
    return members_of("parallel_adapter", fields, parts, held.backbone)


def read_bitfit(held: Read) -> list[Member]:
    """b' in place of the bias b of a linear or norm, or a bias where it has none: ours with d = b' - b, or d = b'.

    What else ends in a module without weights of a known kind gets a bias beside it, `bitfit.bias`.
    """
    backbone, sites = held.backbone, linears(held.backbone)
    own = {key: key.removesuffix(".bias").removesuffix(".bitfit") for key in held.tensors if key.endswith(".bias")}
    held.naming = Naming(backbone, own.values())
    places = Places(backbone, held.naming, held.where)
    chosen = {owner for path in held.selected() for owner in _owners(backbone.module.get_submodule(path), path)}
    parts: list[Part] = []
    have: set[str] = set()
    for key, path in own.items():
        module = held.naming.ours(path)
        if module not in held.naming.modules:
            continue
        bias = held.left.pop(key)
        have.add(path)
        at = sites.get(module) or [places.exit_at(module)]
        held.check(path, {"bias": bias}, {"bias": (sum(site.d_out for site in at),)})
        if (
            not key.endswith(".bitfit.bias")
            and getattr(backbone.module.get_submodule(module), "bias", None) is not None
        ):
            bias = bias.float() - read_weight(backbone.module, f"{module}.bias").cpu().float()
        parts += [Part(site, {"bias": _columns(site, bias).contiguous()}) for site in at]
    held.agree(have, chosen)
    if not parts:
        raise DeltaFileError(f"{held.where} holds no biases")
    return members_of("bitfit", {}, parts, backbone)


def read_prefix(held: Read) -> list[Member]:
    """n keys and values before the text's, without a position: ours. A network that makes them is run once for good."""
    backbone, n = held.backbone, int(held.config["prefix_token_num"])
    family = getattr(backbone.module.config, "model_type", "")
    if family not in PREFIXED:
        said = T5_PREFIX if "t5" in family else f"known for {', '.join(PREFIXED)}"
        raise DeltaFileError(f"{held.where} holds a prefix, which cannot be read onto {backbone.name!r}: {said}")
    network = any("reparams." in key for key in held.tensors)
    found = held.take(NETWORK if network else {"prefix.past_key": "keys", "prefix.past_value": "values"})
    chosen = held.selected()
    sites = {path: _attention(held, path) for path in chosen}
    first, own = next(iter(found.items()))
    if not network:
        tables = {held.naming.ours(path): tensors for path, tensors in found.items()}
        held.agree(found, chosen)
    else:
        held.agree(found, chosen[:1])
        widths = [site.heads.number * site.heads.width for site in sites.values() if site.heads]
        held.check(first, own, {"second_bias": (2 * sum(widths),)})
        inner = torch.tanh(own["table"] @ own["first"].T + own["first_bias"])
        pieces = (inner @ own["second"].T + own["second_bias"]).chunk(2 * len(chosen), dim=1)
        tables = {
            path: {"keys": pieces[2 * i].contiguous(), "values": pieces[2 * i + 1].contiguous()}
            for i, path in enumerate(chosen)
        }
    parts = []
    for path, site in sites.items():
        assert site.heads is not None
        shape = (n, site.heads.number * site.heads.width)
        held.check(held.naming.theirs(path), tables[path], {"keys": shape, "values": shape})
        parts.append(Part(site, tables[path]))
    return members_of("prefix", {"n": n}, parts, backbone)


def read_soft_prompt(held: Read) -> list[Member]:
    """Tokens before the text, of an encoder-decoder before the encoder's: ours but for encoders."""
    backbone = held.backbone
    if backbone.kind == "encoder":
        raise DeltaFileError(
            f"{held.where} holds a prompt for an encoder, {backbone.name!r}: OpenDelta puts it before the first token, "
            f"ours stands after it (the pooler reads it)"
        )
    if getattr(backbone.module.config, "scale_embedding", False):
        raise DeltaFileError(
            f"{held.where} holds a prompt for {backbone.name!r}, which scales the embeddings of its tokens; with "
            f"OpenDelta's prompt it does not"
        )
    found = held.take({"soft_prompt_layer.soft_embeds": "prompt"})
    if len(found) > 1:
        raise DeltaFileError(f"{held.where} holds prompts at {' and '.join(map(repr, found))}; expected one")
    ((path, own),) = found.items()
    site = backbone.anatomy.select("embed")[0]
    n = int(held.config["soft_token_num"])
    held.check(path or "the input", own, {"prompt": (n, site.d_out)})
    return [Member(find("prompt")(n=n), [Part(site, own)])]


def _bottleneck(held: Read, path: str, own: dict[str, Tensor], site: Site, d_in: int) -> Part:
    m = int(held.config["bottleneck_dim"])
    shapes = {"down": (m, d_in), "down_bias": (m,), "up": (site.d_out, m), "up_bias": (site.d_out,)}
    held.check(path, own, shapes)
    return Part(site, own)


def _act(held: Read) -> Activation:
    name = str(held.config["non_linearity"]).lower()
    if name not in ACTS:
        raise UnknownName("activation", name, ACTS, f"{held.where} cannot be read")
    return ACTS[name]


def _once(held: Read, parts: list[Part]) -> None:
    keys = [part.site.key for part in parts]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise DeltaFileError(
            f"{held.where} has two adapters at {twice!r} of {held.backbone.name!r}, one after the other"
        )


def _columns(site: Site, values: Tensor) -> Tensor:
    """The last axis of a tensor, [..., width of the module], cut to the site."""
    return values if site.view is None else site.view.take(values)


def _owners(module: nn.Module, path: str) -> list[str]:
    """The modules below a selected one that get a bias: those that have one, linears and norms of torch's."""
    inside = [(f"{path}.{name}" if name else path, one) for name, one in module.named_modules()]
    if len(inside) == 1:
        return [path]
    return [
        name
        for name, one in inside
        if isinstance(one._parameters.get("bias"), Tensor) or isinstance(one, nn.Linear | nn.LayerNorm)
    ]


def _attention(held: Read, path: str) -> Site:
    """The self-attention site that a module is or holds. DeltaFileError if there is none."""
    for site in held.backbone.anatomy.sites:
        if site.name == "attn" and site.heads is not None and f"{site.heads.module}.".startswith(f"{path}."):
            return site
    raise DeltaFileError(
        f"{held.where} has a prefix in {held.naming.theirs(path)!r}, which is no self-attention of "
        f"{held.backbone.name!r} that takes keys and values"
    )
