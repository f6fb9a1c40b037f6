"""Load a backbone: an embedded name, a hub id, a folder, or any `nn.Module`."""

from __future__ import annotations

import copy
import inspect
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltatune.backbone import digits
from deltatune.backbone.anatomy import Anatomy, find_anatomy, input_table
from deltatune.backbone.embedded import EMBEDDED, locate
from deltatune.backbone.fingerprint import fingerprint
from deltatune.backbone.html import facts
from deltatune.backbone.weights import device_of
from deltatune.backbone.words import body_of, logits_of
from deltatune.errors import BackboneError, nearest

Kind = Literal["encoder", "decoder", "encoder-decoder", "plain"]
Reads = Literal["text", "images", "sound"]
READS: dict[str, Reads] = {"pixel_values": "images", "input_values": "sound", "input_features": "sound"}
CLASS_TOKENS = ("cls_token", "class_embedding")
TWO_TOWERS = ("clip", "siglip", "siglip2")
"""Pairs of an image and a text network, of which the one for images is loaded."""


class Backbone:
    """A network, its processor, its anatomy and its fingerprint.

    `module` is the network, untouched; `processor` its tokenizer or image processor, or None; `name` is what it was
    loaded by.
    """

    def __init__(self, module: nn.Module, processor: Any = None, name: str = "") -> None:
        self.module, self.processor, self.name = module, processor, name or type(module).__name__
        self._fingerprint: tuple[tuple[Any, ...], dict[str, str]] | None = None

    @cached_property
    def anatomy(self) -> Anatomy:
        """The sites of the network."""
        return find_anatomy(self.module)

    @property
    def kind(self) -> Kind:
        """Which stacks of transformer blocks the network has; `plain` without any."""
        stacks = set(self.anatomy.depth)
        if stacks == {"encoder", "decoder"}:
            return "encoder-decoder"
        return "decoder" if stacks == {"decoder"} else "encoder" if stacks else "plain"

    @property
    def reads(self) -> Reads:
        """What goes in first: token ids, pixels, or waveforms and spectrograms."""
        return READS.get(getattr(self.module, "main_input_name", ""), "text")

    @cached_property
    def takes_embeddings(self) -> bool:
        """Whether embeddings can be given in place of token ids."""
        return "inputs_embeds" in inspect.signature(self.module.forward).parameters

    @property
    def class_token(self) -> bool:
        """Whether an image network puts a token for the whole image before the patches."""
        names = {name.rpartition(".")[2] for name, _ in self.module.named_parameters()}
        return not names.isdisjoint(CLASS_TOKENS)

    @property
    def trunk(self) -> nn.Module:
        """The network without its head; for an encoder-decoder, its encoder."""
        base: nn.Module = getattr(self.module, "base_model", self.module)
        return base.get_encoder() if self.kind == "encoder-decoder" else base  # type: ignore[operator]

    @property
    def embeddings(self) -> nn.Embedding:
        """The table of token embeddings. BackboneError if there is none."""
        found = input_table(self.module)
        if found is None:
            raise BackboneError(f"{self.name!r} reads {self.reads} and has no table of token embeddings")
        return found

    @property
    def output(self) -> nn.Linear | None:
        """The language-model head, or None."""
        found: nn.Linear | None = self.module.get_output_embeddings()  # type: ignore[operator]
        return found

    def logits(self, states: Tensor) -> Tensor:
        """Return the network's own logits [items, words] of its last hidden states [items, width].

        Where an encoder-decoder does not keep them apart, its states are the logits.
        """
        body = body_of(self.module)
        if body is not None:
            return logits_of(self.module, body, states)
        if self.kind == "encoder-decoder" or self.output is None:
            return states
        made: Tensor = self.output(states)
        return made

    @property
    def width(self) -> int:
        """Width of the hidden states that the trunk returns."""
        blocks = [s for s in self.anatomy.sites if s.name == "block"]
        # The last of the trunk's stack: in a network of stages the widths of blocks differ.
        return [s.d_out for s in blocks if s.stack == blocks[0].stack][-1]

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.module.parameters())

    def _repr_html_(self) -> str:
        names = list(dict.fromkeys(site.name for site in self.anatomy.by_key.values()))
        return facts(
            self.name,
            {
                "network": f"{type(self.module).__name__}, {self.kind}",
                "parameters": f"{self.parameters:,}, {self.dtype}",
                "sites": " ".join(names),
            },
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the computation: that of the weights, or what quantised ones stand for."""
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Device that the network begins on: that of its weights, or where accelerate brings them."""
        return device_of(input_table(self.module) or self.module) or device_of(self.module) or torch.device("cpu")

    @property
    def positions(self) -> int | None:
        """Number of positions that the network has embeddings for, or None if any length goes."""
        config = getattr(self.module, "config", None)
        if getattr(config, "model_type", "") in ("t5", "mt5"):
            return None
        limit = getattr(config, "max_position_embeddings", None)
        after_padding = getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert")
        return None if limit is None else int(limit) - 2 * after_padding

    @property
    def length_limit(self) -> int:
        """Longest input in tokens."""
        tokenizer = getattr(self.processor, "model_max_length", None) or 512
        return int(min(self.positions or 512, tokenizer))

    def copy(self) -> Backbone:
        """Return a copy with weights of its own; sites and digests, which are the same, are not worked out again."""
        made = Backbone(copy.deepcopy(self.module), self.processor, self.name)
        made.anatomy = self.anatomy
        made._fingerprint = (made._stamp(), self.fingerprint())
        return made

    def _stamp(self) -> tuple[Any, ...]:
        return tuple((p.data_ptr(), p.dtype, p._version) for p in self.module.parameters())

    def fingerprint(self) -> dict[str, str]:
        """Return the digests of the trunk's weights; computed again when a weight was written to."""
        stamp = self._stamp()
        if self._fingerprint is None or self._fingerprint[0] != stamp:
            self._fingerprint = (stamp, fingerprint(self.module, self.anatomy))
        return self._fingerprint[1]

    def __repr__(self) -> str:
        depth = ", ".join(f"{n} {stack} blocks" for stack, n in self.anatomy.depth.items())
        depth = depth or f"{len(self.anatomy.modules)} linears and norms"
        return f"Backbone({self.name!r}, {self.parameters / 1e6:.1f} M parameters, {depth}, {self.dtype})"


def load(source: str | Path | nn.Module | Backbone, *, dtype: torch.dtype = torch.float32) -> Backbone:
    """Load a backbone by embedded name, hub id or folder, or wrap a module.

    `dtype` is the dtype of the weights; a module keeps its own. BackboneError if the name is unknown, the folder holds
    no model, or the hub cannot be reached.
    """
    if isinstance(source, Backbone):
        return source
    if isinstance(source, nn.Module):
        return Backbone(source, name=getattr(getattr(source, "config", None), "name_or_path", "") or "")
    name = str(source)
    place: str | Path = name
    if name in EMBEDDED:
        place = locate(name) or EMBEDDED[name].hub
    elif name == digits.NAME:
        place = digits.folder()
    elif not Path(name).exists() and "/" not in name:
        known = (*EMBEDDED, digits.NAME)
        raise BackboneError(
            f"unknown backbone {name!r}{nearest(name, known)}; expected an embedded name ({', '.join(known)}), "
            f"a folder, or a hub id such as 'owner/name'"
        )
    return _from_pretrained(place, name, dtype)


def _from_pretrained(place: str | Path, name: str, dtype: torch.dtype) -> Backbone:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(place)
        if config.model_type in TWO_TOWERS:
            config = config.vision_config
        architectures = " ".join(getattr(config, "architectures", None) or [])
        if config.is_encoder_decoder:
            auto: Any = AutoModelForSeq2SeqLM
        elif "CausalLM" in architectures or "LMHeadModel" in architectures:
            auto = AutoModelForCausalLM
        else:
            auto = AutoModel
        module, found = auto.from_pretrained(place, config=config, dtype=dtype, output_loading_info=True)
        processor = _processor(place, module)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fix = f"; or install it: {EMBEDDED[name].install}" if name in EMBEDDED else ""
        raise BackboneError(f"cannot load backbone {name!r}: {reason}{fix}") from error
    backbone = Backbone(module.eval(), processor, name)
    lacking = sorted(set(found["missing_keys"]) & set(backbone.anatomy.parameters.values()))
    if lacking:  # transformers draws them at random and warns
        raise BackboneError(f"backbone {name!r} lacks the weights {lacking[0]!r} and {len(lacking) - 1} more")
    return backbone


def _processor(place: str | Path, module: nn.Module) -> Any:
    from transformers import AutoImageProcessor, AutoTokenizer

    if getattr(module, "main_input_name", "") == "pixel_values":
        return AutoImageProcessor.from_pretrained(place)
    tokenizer = AutoTokenizer.from_pretrained(place)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
