"""OpenDelta's folders, read: `config.json` and `pytorch_model.bin`, the trained tensors under the network's own paths.

The tensors are unpickled by torch's restricted reader alone, so that nothing in the file runs. Its config names the
backbone, and a digest of the network as it was changed, which nobody can check on the bare one: reading warns.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.delta.assemble import Member, assembled
from deltatune.delta.delta import Delta
from deltatune.delta.exchange.opendelta_methods import (
    Read,
    read_adapter,
    read_bitfit,
    read_lora,
    read_parallel_adapter,
    read_prefix,
    read_soft_prompt,
)
from deltatune.delta.exchange.places import site_less
from deltatune.errors import DeltaFileError, DeltatuneError

CONFIG, TENSORS = "config.json", "pytorch_model.bin"
READERS: dict[str, Callable[[Read], list[Member]]] = {
    "lora": read_lora, "adapter": read_adapter, "parallel_adapter": read_parallel_adapter, "bitfit": read_bitfit,
    "prefix": read_prefix, "soft_prompt": read_soft_prompt,
}  # fmt: skip
UNREAD = {
    "low_rank_adapter": "adapters whose two matrices are products of thin ones; no method here has them",
    "compacter": "adapters whose matrices are sums of Kronecker products; no method here has them",
}
# Options that the readers act on, or that say nothing about what is computed; any other must be unset. `scaled` never
# reaches OpenDelta's layers, which scale by 1 whatever it says.
KNOWN = {
    "delta_type", "modified_modules", "exclude_modules", "unfrozen_modules", "common_structure", "backbone_class",
    "backbone_checkpoint_name", "backbone_hash", "transformers_version", "opendelta_version", "interactive_modify",
    "lora_r", "lora_alpha", "lora_dropout", "bottleneck_dim", "non_linearity", "sequential", "scaled",
    "prefix_token_num", "reparameterize", "embed_dim", "mid_dim", "soft_token_num", "init_range", "token_init",
    "other_expand_ids",
}  # fmt: skip
DELTAS = re.compile(
    r"(?:^|\.)((?:lora|adapter|parallel_adapter|bitfit|prefix|reparams|soft_prompt_layer|low_rank_adapter|compacter)"
    r"(?:_\d+)?)\."
)


def recognised(folder: Path) -> bool:
    """Say whether a folder is OpenDelta's: its `config.json` says so, which a network's own does not."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and ("opendelta_version" in config or "delta_type" in config)


def read(folder: Path, backbone: Backbone) -> Delta:
    """Read an OpenDelta folder as a delta on a backbone, with a warning that the backbone cannot be verified.

    DeltaFileError for a folder that is damaged or does not fit, and for an option or tensor without a counterpart.
    """
    where = str(folder)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    kind = str(config.get("delta_type"))
    if kind not in READERS:
        said = f" ({UNREAD[kind]})" if kind in UNREAD else ""
        raise DeltaFileError(f"{where} holds {kind!r}{said}, which is not read; expected {', '.join(READERS)}")
    if config.get("backend", "hf") != "hf":
        raise DeltaFileError(f"{where} has backend={config['backend']!r}: a network of BMTrain; expected 'hf'")
    for name, value in config.items():
        if value and name not in KNOWN and name != "backend":
            raise DeltaFileError(f"{where} has {name}={value!r}, which has no counterpart here")
    held = Read(config, _tensors(folder / TENSORS), backbone, where)
    try:
        made = READERS[kind](held)
        heads = _heads(held)
    except DeltatuneError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError, re.error) as error:
        raise DeltaFileError(f"{folder / CONFIG} is damaged: {type(error).__name__} {error}".splitlines()[0]) from error
    delta = assembled(made, backbone, folder.name)
    base = config.get("backbone_checkpoint_name") or config.get("backbone_class")
    delta.record = {"imported": {"from": "opendelta", "version": config.get("opendelta_version"), "base": base}}
    left = f"; its head {', '.join(heads)} is not read: it has no equal here" if heads else ""
    warnings.warn(
        f"{where} was read; an OpenDelta folder does not say which weights it was trained on (it names {base!r}, and a "
        f"digest of the changed network), so {backbone.name!r} cannot be verified{left}",
        stacklevel=5,
    )
    return delta


def _tensors(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a file by torch's restricted unpickler. DeltaFileError for anything else in it."""
    if not file.is_file():
        raise DeltaFileError(f"{file.parent} lacks {file.name}")
    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError) as error:
        raise DeltaFileError(
            f"{file} is damaged, or holds something else than tensors, which is never unpickled"
        ) from error
    if not isinstance(held, Mapping) or not held:
        raise DeltaFileError(f"{file} holds no tensors")
    for name, value in held.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or not value.is_floating_point():
            raise DeltaFileError(f"{file} has {name!r}, which is no tensor of floating numbers")
    return {name: value.detach() for name, value in held.items()}


def _heads(held: Read) -> list[str]:
    """Return the names of the heads that tensors belong to.

    DeltaFileError for a tensor of another delta, and for one inside the backbone: without it the delta is another one.
    """
    naming, backbone, where = held.naming, held.backbone, held.where
    parts = {path.partition(".")[0] for path in naming.modules if path}
    heads: dict[str, None] = {}
    for key in held.left:
        delta = DELTAS.search(key)
        if delta:
            raise DeltaFileError(f"{where} has {key!r}, of a delta {delta[1]!r} that its {CONFIG} does not describe")
        path = key.rpartition(".")[0]
        if naming.ours(path) in naming.modules:
            raise DeltaFileError(
                f"{where} has {key!r}: a weight of the backbone, trained whole (unfrozen_modules), which has no "
                f"counterpart here"
            )
        if key.startswith(naming.base) if naming.longer else path.partition(".")[0] in parts:
            raise site_less(path, backbone, where)
        heads[path.partition(".")[0]] = None
    return list(heads)
