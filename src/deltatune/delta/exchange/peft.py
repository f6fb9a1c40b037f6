"""PEFT's folders: `adapter_config.json` and `adapter_model.safetensors`, read and written.

Such a folder says nothing of the backbone's weights, so that reading one warns that they cannot be verified; shapes and
names are checked. What has no counterpart is refused by name, never left out in silence.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from deltatune.backbone.embedded import EMBEDDED
from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Site
from deltatune.delta.assemble import Member, assembled
from deltatune.delta.attach import check_fits
from deltatune.delta.delta import Delta
from deltatune.delta.exchange.dora import write_dora
from deltatune.delta.exchange.norms import read_ln, write_ln
from deltatune.delta.exchange.oft import read_oft, write_oft
from deltatune.delta.exchange.places import Naming
from deltatune.delta.exchange.sequences import (
    read_prefix,
    read_prompt,
    write_p_tuning,
    write_prefix,
    write_prompt,
)
from deltatune.delta.exchange.tables import (
    read_lora_and_tables,
    read_tokens,
    write_lora_and_tables,
    write_lora_beside_tokens,
    write_tokens,
)
from deltatune.delta.exchange.thin import PREFIX, read_ia3, write_ia3
from deltatune.delta.exchange.vera import read_vera, write_vera
from deltatune.delta.files import whole_folder
from deltatune.delta.method import members
from deltatune.errors import DeltaFileError, DeltatuneError, OutputError, UnknownName, UserError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
TASK = {"plain": None, "encoder": "FEATURE_EXTRACTION", "decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"}

Reader = Callable[[Mapping[str, Any], Mapping[str, Tensor], Backbone, str], list[Member]]
Writer = Callable[[Delta, Mapping[str, Site], Backbone], tuple[dict[str, Any], dict[str, Tensor]]]
READERS: dict[str, Reader] = {
    "LORA": read_lora_and_tables, "IA3": read_ia3, "PROMPT_TUNING": read_prompt, "PREFIX_TUNING": read_prefix,
    "OFT": read_oft, "LN_TUNING": read_ln, "VERA": read_vera, "P_TUNING": read_prompt, "TRAINABLE_TOKENS": read_tokens,
}  # fmt: skip
WRITERS: dict[str, Writer] = {
    "lora": write_lora_and_tables, "ia3": write_ia3, "prompt": write_prompt, "prefix": write_prefix,
    "dora": write_dora, "oft": write_oft, "lntuning": write_ln, "vera": write_vera, "ptuning": write_p_tuning,
    "trainabletokens": write_tokens, "lora | trainabletokens": write_lora_beside_tokens,
}  # fmt: skip

# Options that the readers act on, or that say nothing about what is computed; any other must be unset.
KNOWN = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping",
    "peft_version", "modules_to_save", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "fan_in_fan_out", "r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "rank_pattern", "alpha_pattern",
    "init_lora_weights", "megatron_core", "qalora_group_size", "eva_config", "runtime_config",
    "ensure_weight_tying", "feedforward_modules", "init_ia3_weights", "num_virtual_tokens", "token_dim",
    "num_layers", "num_attention_heads", "num_transformer_submodules", "prefix_projection", "encoder_hidden_size",
    "use_dora",
    "projection_prng_key", "save_projection", "vera_dropout", "d_initial",
    "oft_block_size", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms", "eps",
    "encoder_reparameterization_type", "encoder_num_layers", "encoder_dropout",
    "token_indices", "trainable_token_indices", "target_parameters",
    "init_weights", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
}  # fmt: skip
WORDS = {
    "coft": "constrained OFT: it shortens its parameters in each forward",
    "module_dropout": "OFT's dropout of whole blocks",
    "loftq_config": "LoftQ: it belongs to weights that it quantised itself",
    "layer_replication": "blocks that the backbone has not",
    "lora_bias": "biases of the LoRA itself",
    "alora_invocation_tokens": "aLoRA: it acts from certain tokens on",
}


@dataclass(frozen=True)
class PeftFolder:
    """What such a folder holds."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


def recognised(folder: Path) -> bool:
    """Say whether a folder is PEFT's."""
    return (folder / CONFIG).is_file()


def read(folder: Path, backbone: Backbone) -> Delta:
    """Read a PEFT folder as a delta on a backbone, with a warning that the backbone's weights cannot be verified.

    DeltaFileError for a folder that is damaged or does not fit, and for an option or tensor without a counterpart.
    """
    held = _held(folder)
    config, where = held.config, str(folder)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in READERS:
        raise DeltaFileError(f"{where} holds {kind!r}, which is not read; expected {', '.join(READERS)}")
    for name, value in config.items():
        if value and name not in KNOWN:
            said = f" ({WORDS[name]})" if name in WORDS else ""
            raise DeltaFileError(f"{where} has {name}={value!r}{said}, which has no counterpart here")
    tensors, heads = _without_heads(held, backbone, where)
    try:
        made = READERS[kind](config, tensors, backbone, where)
    except DeltatuneError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, re.error) as error:
        raise DeltaFileError(f"{folder / CONFIG} is damaged: {type(error).__name__} {error}".splitlines()[0]) from error
    delta = assembled(made, backbone, folder.name)
    delta.record = {
        "imported": {
            "from": "peft",
            "version": config.get("peft_version"),
            "base": config.get("base_model_name_or_path"),
        }
    }
    base = config.get("base_model_name_or_path")
    left = f"; its head {', '.join(heads)} is not read: it has no equal here" if heads else ""
    warnings.warn(
        f"{where} was read; a PEFT folder does not say which weights it was trained on (it names {base!r}), so "
        f"{backbone.name!r} cannot be verified{left}",
        stacklevel=5,
    )
    return delta


def _held(place: Path) -> PeftFolder:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (place / TENSORS).is_file():
        pickled = (place / "adapter_model.bin").is_file()
        fix = (
            "; adapter_model.bin is a pickle, which is never opened: save it from PEFT as safetensors"
            if pickled
            else ""
        )
        raise DeltaFileError(f"{place} lacks {TENSORS}{fix}")
    try:
        config = json.loads((place / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DeltaFileError(f"{place / CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise DeltaFileError(f"{place / CONFIG} holds a {type(config).__name__}, expected an object")
    try:
        return PeftFolder(config, load_file(place / TENSORS))
    except SafetensorError as error:
        raise DeltaFileError(f"{place / TENSORS} is not a safetensors file: {error}") from error


def _without_heads(held: PeftFolder, backbone: Backbone, where: str) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors without those of heads, and the heads' names.

    DeltaFileError if what was saved whole is a module of the backbone: without it the delta is another one.
    """
    saved = [str(name) for name in held.config.get("modules_to_save") or []]
    tensors = dict(held.tensors)
    modules = Naming(backbone, [])
    heads: dict[str, None] = {}
    for key in held.tensors:
        words = key.removeprefix(PREFIX).split(".")
        name = next((name for name in saved if name in words), None)
        if name is None:
            continue
        path = ".".join(words[: words.index(name) + 1])
        if any(option in modules.modules for option in (path, path.removeprefix(modules.base), modules.base + path)):
            raise DeltaFileError(
                f"{where} has modules_to_save={saved}: {path!r} is a module of the backbone, trained whole, which has "
                f"no counterpart here"
            )
        heads[name] = None
        del tensors[key]
    return tensors, list(heads)


def export(delta: Delta, backbone: Backbone) -> PeftFolder:
    """Return a delta as PEFT would save it.

    UserError for a method that PEFT lacks, for several methods in one delta, and where PEFT would compute something
    else. A head is left out: none of its classes scores as ours do.
    """
    bound = check_fits(delta, backbone)
    names = list(dict.fromkeys(method.name() for method in members(delta.spec)))
    for name in names:
        if name not in WRITERS:
            raise UnknownName("method of PEFT", name, WRITERS, f"{delta.name!r} cannot be exported")
    kind = " | ".join(sorted(names))
    if kind not in WRITERS:
        raise UserError(f"PEFT holds one method a folder; {delta.name!r} is a composition of {', '.join(names)}")
    config, tensors = WRITERS[kind](delta, bound, backbone)
    base = EMBEDDED[backbone.name].hub if backbone.name in EMBEDDED else backbone.name
    common = {"base_model_name_or_path": base, "task_type": TASK[backbone.kind], "inference_mode": True}
    return PeftFolder(
        {**common, "modules_to_save": None, **config},
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
    )


def write(made: PeftFolder, folder: str | Path) -> Path:
    """Write an exported delta into a folder of its own. OutputError if it exists or cannot be written."""
    from safetensors.torch import save_file

    target = Path(folder)
    if target.exists():
        raise OutputError(f"{target} exists already; choose another place or remove it")
    with whole_folder(target) as work:
        save_file(made.tensors, work / TENSORS, metadata={"format": "pt"})
        (work / CONFIG).write_text(json.dumps(made.config, indent=2, sort_keys=True), encoding="utf-8")
    return target
