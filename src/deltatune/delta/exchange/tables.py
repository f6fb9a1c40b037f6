"""What stands at tables of tokens in PEFT's format: a LoRA's `lora_embedding_A` and `_B`, and trained rows.

A file of LoRAs is put together here: those at linears, at tables and inside mixtures.

PEFT saves the rows themselves, ours are changes of the backbone's own; what is read is kept in float64 where float32
would not give the file's values back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Site, numbers
from deltatune.backbone.weights import read_weight
from deltatune.delta.assemble import Member, Part, assembled, members_of
from deltatune.delta.delta import Delta
from deltatune.delta.exchange.dora import read_lora_or_dora
from deltatune.delta.exchange.mixtures import read_apart, read_mixtures, write_mixtures
from deltatune.delta.exchange.places import Naming, named, same_modules, shortest, site_less, targets
from deltatune.delta.exchange.thin import PREFIX, STARTS, rank_and_alpha, whole, without_own_weights, write_lora
from deltatune.delta.method import members
from deltatune.errors import DeltaFileError, UserError

A, B, ROWS = ".lora_embedding_A", ".lora_embedding_B", ".trainable_tokens_delta"
BESIDE = ".token_adapter"  # where the rows stand in a LoRA's file
TWO_TABLES = "an encoder-decoder reads tokens from two tables, and the decoder's is no site"


def read_lora_and_tables(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], backbone: Backbone, where: str
) -> list[Member]:
    """Make the members of a file of LoRAs, wherever they stand, and of trained rows beside them."""
    apart, tensors = read_apart(config, without_own_weights(tensors, backbone, where), backbone, where)
    inside, tensors = read_mixtures(config, tensors, backbone, where)
    inside += apart
    rows = {key: tensor for key, tensor in tensors.items() if key.endswith(BESIDE + ROWS)}
    thin = {key: tensor for key, tensor in tensors.items() if key.endswith((A, B))}
    rest = {key: tensor for key, tensor in tensors.items() if key not in rows | thin}
    paths = sorted({key.removeprefix(PREFIX).removesuffix(A).removesuffix(B) for key in thin})
    naming = Naming(backbone, paths)
    made = [_table_lora(config, path, thin, backbone, where) for path in paths]
    if rest or not made + inside:  # a file of its own, in which the tables are not selected
        made = [*read_lora_or_dora(_without(config, paths), rest, backbone, where), *made]
    else:
        same_modules({part.site.exit for member in made for part in member.parts}, config, naming, backbone, where)
    made += inside
    if config.get("trainable_token_indices"):
        made.append(_beside(config["trainable_token_indices"], rows, backbone, where))
    elif rows:
        raise DeltaFileError(f"{where} has {min(rows)!r}, but no trainable_token_indices that say whose rows they are")
    return made


def _without(config: Mapping[str, Any], paths: list[str]) -> dict[str, Any]:
    unwanted = config.get("exclude_modules") or []
    if isinstance(unwanted, str):
        return {**config, "exclude_modules": "|".join([f"(?:{unwanted})", *map(re.escape, paths)])}
    return {**config, "exclude_modules": [*unwanted, *paths]}


def _table_lora(
    config: Mapping[str, Any], path: str, tensors: Mapping[str, Tensor], backbone: Backbone, where: str
) -> Member:
    site = _table(path, backbone, where)
    if not targets(config)(path):
        raise DeltaFileError(f"{where} has tensors for {path!r}, which its target_modules do not select")
    if config.get("init_lora_weights") not in STARTS:
        raise DeltaFileError(f"{where} has init_lora_weights={config['init_lora_weights']!r} at the table {path!r}")
    if config.get("use_dora"):
        raise DeltaFileError(f"{where} has DoRA at the table {path!r}, which has no counterpart here; a LoRA there has")
    if config.get("ensure_weight_tying") and _shares(backbone):
        raise DeltaFileError(
            f"{where} has ensure_weight_tying=True: its LoRA of the table acts in the language-model head as well, "
            f"which has no counterpart here"
        )
    r, alpha = rank_and_alpha(config, path)
    made: dict[str, Tensor] = {}
    for name, end, shape in (("A", A, (r, site.words)), ("B", B, (site.d_out, r))):
        made[name] = _shaped(tensors.get(PREFIX + path + end), shape, PREFIX + path + end, where)
    fields = {"r": r, "alpha": alpha, "dropout": config.get("lora_dropout") or 0.0}
    (member,) = members_of("lora", fields, [Part(site, made)], backbone)
    return member


def _table(path: str, backbone: Backbone, where: str) -> Site:
    module = Naming(backbone, [path]).ours(path)
    site = next((site for site in backbone.anatomy.sites if site.words and site.exit == module), None)
    if site is None and backbone.kind == "encoder-decoder":
        raise DeltaFileError(f"{where} has tensors for the table {path!r} of {backbone.name!r}: {TWO_TABLES}")
    if site is None:
        raise site_less(path, backbone, where)
    return site


def _shaped(tensor: Tensor | None, shape: tuple[int, ...], key: str, where: str) -> Tensor:
    if tensor is None:
        raise DeltaFileError(f"{where} lacks {key!r}")
    if tuple(tensor.shape) != shape:
        raise DeltaFileError(f"{where}: {key!r} has shape {tuple(tensor.shape)}, expected {shape} for this backbone")
    return tensor


def _shares(backbone: Backbone) -> bool:
    """Whether the language-model head has the weight of the table."""
    return backbone.output is not None and backbone.output.weight is backbone.embeddings.weight


def write_lora_and_mixtures(
    delta: Delta, bound: Mapping[str, Site], backbone: Backbone
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and tensors of LoRAs at linears and inside mixtures. UserError as for each."""
    inside = {address: site for address, site in bound.items() if site.experts}
    if not inside:
        return write_lora(delta, bound, backbone)
    ranks, tensors = write_mixtures(delta, inside, backbone)
    r, alpha = next(iter(ranks.values()))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": [],
        "bias": "none",
    }
    config |= {"rank_pattern": {}, "alpha_pattern": {}}
    beside = {address: site for address, site in bound.items() if not site.experts}
    if beside:
        config, own = write_lora(delta, beside, backbone)
        tensors |= own
    for path, (r, alpha) in ranks.items():
        for value, name, patterns in ((r, "r", "rank_pattern"), (whole(alpha), "lora_alpha", "alpha_pattern")):
            if value != config[name]:
                config[patterns] = {**config[patterns], re.escape(path): value}
    return {**config, "target_parameters": sorted(ranks)}, tensors


def write_lora_and_tables(
    delta: Delta, bound: Mapping[str, Site], backbone: Backbone
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and tensors of LoRAs wherever they stand. UserError as for linears, and for two at a table."""
    at_table = {address: site for address, site in bound.items() if site.words}
    beside = {address: site for address, site in bound.items() if not site.words}
    if not at_table:
        return write_lora_and_mixtures(delta, bound, backbone)
    if len(at_table) > 1:
        raise UserError(f"{delta.name!r} has several LoRAs at a table; PEFT has one a table")
    ((address, site),) = at_table.items()
    method = members(delta.spec)[int(address.split("/")[0])].model_dump()
    r, alpha = method["r"], whole(method["alpha"])
    layer = delta.layers[address]
    own: dict[str, Tensor] = {PREFIX + site.exit + end: layer.get_parameter(end[-1]) for end in (A, B)}
    if not beside:
        alone = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "lora_dropout": method["dropout"], "bias": "none"}
        return {**alone, "target_modules": shortest([site.exit], backbone)}, own
    config, tensors = write_lora_and_mixtures(delta, beside, backbone)
    for name, value, patterns in (("r", r, "rank_pattern"), ("lora_alpha", alpha, "alpha_pattern")):
        if value != config[name]:
            config[patterns] = {**config[patterns], re.escape(site.exit): value}
    config["target_modules"] = shortest({site.exit for site in bound.values() if not site.experts}, backbone)
    return config, tensors | own


# Trained rows


def read_tokens(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], backbone: Backbone, where: str
) -> list[Member]:
    """Make the member of a file of trained rows. DeltaFileError for rows of anything but the table and its head."""
    _refuse_two(backbone, where)
    paths = {key.removeprefix(PREFIX).removesuffix(ROWS): tensor for key, tensor in tensors.items()}
    wrong = next((key for key in tensors if not key.startswith(PREFIX) or not key.endswith(ROWS)), None)
    if wrong or not paths:
        raise DeltaFileError(f"{where} {f'has {wrong!r}' if wrong else 'holds no tensors'}; expected MODULE{ROWS}")
    naming = Naming(backbone, paths)
    have = {naming.ours(path) for path in paths}
    head = {site.exit for site in backbone.anatomy.sites if site.name == "lm_head"}
    # What shares the table learns with it, selected or not.
    same_modules(have - head if _shares(backbone) else have, config, naming, backbone, where)
    return [_rows(config["token_indices"], paths, backbone, where)]


def _refuse_two(backbone: Backbone, where: str) -> None:
    if backbone.kind == "encoder-decoder":
        raise DeltaFileError(f"{where} holds trained rows, which cannot be read onto {backbone.name!r}: {TWO_TABLES}")


def _beside(indices: Any, rows: Mapping[str, Tensor], backbone: Backbone, where: str) -> Member:
    """The trained rows in a LoRA's file: one list for the table, or one for each module that is named."""
    _refuse_two(backbone, where)
    paths = {key.removeprefix(PREFIX).removesuffix(BESIDE + ROWS): tensor for key, tensor in rows.items()}
    if not isinstance(indices, dict):
        indices = dict.fromkeys(paths, indices)
    if len(paths) != 1 or len(indices) != 1 or not named(next(iter(paths)), list(indices)):
        raise DeltaFileError(
            f"{where} has trainable_token_indices for {', '.join(map(str, indices)) or 'no module'} and rows of "
            f"{', '.join(paths) or 'none'}; expected those of one table"
        )
    ((path, tensor),) = paths.items()
    both = {path: tensor}
    if _shares(backbone):  # PEFT keeps the head's rows with the table's and saves them once
        head = next(site.exit for site in backbone.anatomy.sites if site.name == "lm_head")
        both[Naming(backbone, [path]).theirs(head)] = tensor
    return _rows(next(iter(indices.values())), both, backbone, where)


def _rows(tokens: list[int], paths: Mapping[str, Tensor], backbone: Backbone, where: str) -> Member:
    naming = Naming(backbone, paths)
    if len(set(tokens)) != len(tokens) or not all(0 <= token < backbone.embeddings.num_embeddings for token in tokens):
        raise DeltaFileError(
            f"{where} names tokens {tokens}: expected each once, below {backbone.embeddings.num_embeddings}"
        )
    places = {s.exit: s for s in backbone.anatomy.sites if s.words or s.name == "lm_head"}
    parts: list[Part] = []
    for path, rows in paths.items():
        site = places.get(naming.ours(path))
        if site is None:
            raise site_less(path, backbone, where)
        _shaped(rows, (len(tokens), site.d_in), f"{PREFIX}{path}{ROWS}", where)
        parts.append(Part(site, {"change": _change(rows, tokens, site, backbone)}))
    tie = "change" if _shares(backbone) and len(parts) > 1 else ""
    fields = {"tokens": ",".join(map(str, tokens)), "tie": tie}
    (member,) = members_of("trainabletokens", fields, parts, backbone)
    return member


def _own_rows(tokens: list[int], site: Site, backbone: Backbone) -> Tensor:
    return read_weight(backbone.module.get_submodule(site.exit), "weight")[tokens].cpu()


def _change(rows: Tensor, tokens: list[int], site: Site, backbone: Backbone) -> Tensor:
    """What makes the rows of the backbone's own."""
    own = _own_rows(tokens, site, backbone).double()
    change = rows.double() - own
    single = change.float()
    return single if torch.equal((own + single.double()).to(rows.dtype), rows) else change


def write_tokens(
    delta: Delta, bound: Mapping[str, Site], backbone: Backbone
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and tensors of trained rows, rounded to the table's own dtype as PEFT's are.

    UserError for two sets of them, and where PEFT's head learns with the table that it shares and ours does not.
    """
    tokens, rows = _written(delta, bound, backbone)
    # A head that shares the table is not selected: it learns with it unasked.
    selected = [site.exit for site in rows if site.words or not _shares(backbone)]
    return {
        "peft_type": "TRAINABLE_TOKENS",
        "token_indices": tokens,
        "target_modules": shortest(selected, backbone),
        "init_weights": True,
    }, {f"{PREFIX}{site.exit}{ROWS}": tensor for site, tensor in rows.items()}


def write_lora_beside_tokens(
    delta: Delta, bound: Mapping[str, Site], backbone: Backbone
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and tensors of LoRAs and trained rows of the table in one. UserError as for each."""
    loras, rest = (_only(delta, bound, name, backbone) for name in ("lora", "trainabletokens"))
    config, tensors = write_lora_and_tables(loras, loras.sites, backbone)
    tokens, rows = _written(rest, rest.sites, backbone)
    table = next((site for site in rows if site.words), None)
    if table is None or (len(rows) > 1 and not _shares(backbone)):
        raise UserError(f"beside a LoRA, PEFT trains rows of the table of embeddings; {delta.name!r} has other ones")
    config["trainable_token_indices"] = tokens
    return config, {**tensors, f"{PREFIX}{table.exit}{BESIDE}{ROWS}": rows[table]}


def _only(delta: Delta, bound: Mapping[str, Site], name: str, backbone: Backbone) -> Delta:
    """The members of one method, as a delta of its own."""
    made = []
    for number, method in enumerate(members(delta.spec)):
        if method.name() == name:
            own = [address for address in bound if address.startswith(f"{number}/")]
            made.append(Member(method, [Part(bound[a], dict(delta.layers[a].named_parameters())) for a in own]))
    return assembled(made, backbone, delta.name)


def _written(delta: Delta, bound: Mapping[str, Site], backbone: Backbone) -> tuple[list[int], dict[Site, Tensor]]:
    methods = members(delta.spec)
    if len(methods) > 1:
        raise UserError(f"PEFT has one set of trained tokens a folder; {delta.name!r} has several: {delta.spec}")
    fields = methods[0].model_dump()
    if backbone.kind == "encoder-decoder":
        raise UserError(f"{delta.name!r} cannot go to PEFT: {TWO_TABLES}")
    if _shares(backbone) and (len(bound) < 2 or "change" not in fields["tie"].replace(",", " ").split()):
        raise UserError(
            f"{delta.name!r} cannot go to PEFT: there the language-model head, which shares the table, changes with "
            f"it; fit it with trainabletokens(at='embed lm_head', tie='change')"
        )
    tokens = numbers(fields["tokens"], backbone.embeddings.num_embeddings, "tokens")
    rows: dict[Site, Tensor] = {}
    for address, site in bound.items():
        own, change = _own_rows(tokens, site, backbone), delta.layers[address].get_parameter("change").detach().cpu()
        rows[site] = (own.double() + change.double()).to(own.dtype)
    return tokens, rows
