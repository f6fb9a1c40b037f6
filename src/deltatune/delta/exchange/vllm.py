"""vLLM: which deltas it can serve, in what form, and the words that make it do so.

vLLM reads PEFT's LoRA folders, with one rank and one scale for all modules: it passes over `rank_pattern` and
`alpha_pattern` without a word. So a delta is written with B scaled and with zeros up to the largest rank, which is the
same function.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from torch.nn.functional import pad

from deltatune.backbone.embedded import EMBEDDED
from deltatune.backbone.load import Backbone
from deltatune.delta.delta import Delta
from deltatune.delta.exchange.peft import PeftFolder, export
from deltatune.delta.exchange.thin import PREFIX, whole
from deltatune.delta.method import members
from deltatune.errors import UserError

# The ranks that vLLM makes room for (`--max-lora-rank`).
ROOMS = (8, 16, 32, 64, 128, 256, 320, 512)
A, B = ".lora_A.weight", ".lora_B.weight"


def export_for_vllm(delta: Delta, backbone: Backbone) -> PeftFolder:
    """Return a delta as vLLM can serve it. UserError with the reason if it cannot."""
    others = sorted({method.name() for method in members(delta.spec)} - {"lora"})
    if others:
        raise UserError(f"vLLM serves LoRA alone; {delta.name!r} holds {', '.join(others)}: {delta.spec}")
    if backbone.kind != "decoder":
        raise UserError(f"vLLM serves LoRAs on decoders; {backbone.name!r} is an {backbone.kind}")
    if any(site.words for site in delta.sites.values()):
        raise UserError(f"{delta.name!r} has a LoRA at the table of embeddings, which is not written for vLLM")
    if any(site.experts for site in delta.sites.values()):
        raise UserError(f"{delta.name!r} has a LoRA inside a mixture of experts, which is not written for vLLM")
    made = export(delta, backbone)
    rank = max(made.tensors[key].shape[0] for key in made.tensors if key.endswith(A))
    if rank > ROOMS[-1]:
        raise UserError(f"vLLM makes room for ranks up to {ROOMS[-1]}; {delta.name!r} has {rank}")
    return _uniform(made, rank)


def _uniform(made: PeftFolder, rank: int) -> PeftFolder:
    """The same function with one rank and one scale."""
    config, tensors = dict(made.config), dict(made.tensors)
    alpha = config["lora_alpha"] / config["r"] * rank
    for key in [key for key in tensors if key.endswith(A)]:
        path = key.removesuffix(A)
        module = path.removeprefix(PREFIX)
        own = len(tensors[key])
        factor = _of(config["alpha_pattern"], module, config["lora_alpha"]) / own * rank / alpha
        tensors[key] = pad(tensors[key], (0, 0, 0, rank - own))
        tensors[path + B] = pad(tensors[path + B] * factor, (0, rank - own))
    return PeftFolder(
        {**config, "r": rank, "lora_alpha": whole(alpha), "rank_pattern": {}, "alpha_pattern": {}}, tensors
    )


def _of(patterns: dict[str, float], module: str, default: float) -> float:
    from re import escape

    return patterns.get(escape(module), default)


def command(made: PeftFolder, name: str, folder: Path, backbone: Backbone) -> str:
    """Return the command that serves an exported delta."""
    base = EMBEDDED[backbone.name].hub if backbone.name in EMBEDDED else backbone.name
    room = next(room for room in ROOMS if room >= made.config["r"])
    return (
        f"vllm serve {shlex.quote(base)} --enable-lora --lora-modules {shlex.quote(f'{name}={folder}')} "
        f"--max-lora-rank {room}"
    )
