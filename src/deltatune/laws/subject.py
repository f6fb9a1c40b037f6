"""What a law is held against: one spec on one backbone, with rows to run and ways to compare."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from deltatune.backbone.load import Backbone
from deltatune.delta.adapted import Adapted
from deltatune.delta.call import Call, Draw
from deltatune.delta.delta import Delta, generator
from deltatune.delta.inserted import check_takes_tokens
from deltatune.delta.method import Spec
from deltatune.errors import DeltatuneError, SiteError
from deltatune.methods.addition.adapter import Adapter
from deltatune.methods.addition.prefix import Prefix
from deltatune.methods.addition.prompt import Prompt
from deltatune.methods.specification.bitfit import BitFit

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
TARGET_LENGTH = 5  # decoder tokens of an encoder-decoder


# Backbone -> dtype -> what copies are made of.
_kept: WeakKeyDictionary[Backbone, dict[torch.dtype, Backbone]] = WeakKeyDictionary()


class LawBroken(DeltatuneError):
    """A method does not keep a law; the message says how."""


@dataclass(frozen=True)
class Row:
    """One input: its number (which fixes how it is scored), token ids [length] and decoder ids [TARGET_LENGTH].

    `given` is what goes in beside token ids or in their place, by name: pixels, sound.
    """

    number: int
    ids: Tensor
    target: Tensor
    given: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int | None:
        """Number of tokens; None for a row without any, which is compared whole."""
        return len(self.ids) or None


@dataclass(frozen=True)
class Subject:
    """A spec on a backbone. The backbone is never touched: every law works on copies of it.

    With `length`, all rows have that many tokens: for backbones whose own outputs depend on the padding of a row.
    `dtype` is what the laws compute in unless they say otherwise: float32 for backbones that do so inside anyway.
    `given` is the shape of one row of each input that is no token ids, by its name: `{"pixel_values": (3, 16, 16)}`.
    """

    spec: Spec
    backbone: Backbone
    name: str = field(default="", compare=False)
    length: int | None = None
    dtype: torch.dtype = torch.float64
    given: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def fresh(self, dtype: torch.dtype | None = None) -> Backbone:
        """A copy of the backbone in a dtype (the subject's own by default), in evaluation mode."""
        kept, dtype = _kept.setdefault(self.backbone, {}), dtype or self.dtype
        if dtype not in kept:
            module = copy.deepcopy(self.backbone.module).to(dtype).eval()
            kept[dtype] = Backbone(module, self.backbone.processor, self.backbone.name)
        return kept[dtype].copy()

    @property
    def reads_tokens(self) -> bool:
        """Whether token ids go in, if only beside something else (those of a decoder do not count)."""
        return getattr(self.backbone.module, "main_input_name", "input_ids") == "input_ids"

    @property
    def has_decoder(self) -> bool:
        """Whether a decoder writes what an encoder was given."""
        return self.backbone.kind == "encoder-decoder"

    @cached_property
    def vocabulary(self) -> int:
        """Number of tokens of the backbone."""
        return self.backbone.embeddings.num_embeddings

    @property
    def padding(self) -> int:
        """Token id that fills short rows."""
        found = getattr(getattr(self.backbone.module, "config", None), "pad_token_id", None)
        return 0 if found is None else int(found)

    def rows(self, number: int, *, seed: int = 0, length: int | None = None) -> list[Row]:
        """Rows of 3 to 9 tokens, or all of one length, and of what is `given`; the same for the same seed."""
        made = []
        for row in range(number):
            draw = generator(seed, "row", row)
            size = length or self.length or int(torch.randint(3, 10, (1,), generator=draw))
            ids, target = (
                self._tokens(number, draw) if there else torch.zeros(0, dtype=torch.long)
                for number, there in ((size, self.reads_tokens), (TARGET_LENGTH, self.has_decoder))
            )
            given = {
                name: torch.randn(shape, generator=generator(seed, "row", row, name), dtype=torch.float64)
                for name, shape in self.given.items()
            }
            made.append(Row(row, ids, target, given))
        return made

    def _tokens(self, number: int, draw: torch.Generator) -> Tensor:
        return torch.randint(min(5, self.vocabulary - 1), self.vocabulary, (number,), generator=draw)

    def batch(self, rows: Sequence[Row], *, left: bool = False, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Token ids and mask [rows, longest], padded on the right or the left; decoder ids where there is a decoder.

        What is `given` stands in a dtype, the subject's own by default.
        """
        batch = {name: torch.stack([row.given[name] for row in rows]).to(dtype or self.dtype) for name in self.given}
        if self.reads_tokens:
            batch |= self._padded(rows, left)
        if self.has_decoder:
            batch["decoder_input_ids"] = torch.stack([row.target for row in rows])
        return {name: value.to(self.backbone.device) for name, value in batch.items()}

    def prompted(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """What generation goes on from: a decoder's own tokens padded on the left, or what an encoder reads."""
        batch = self.batch(rows, left=self.backbone.kind == "decoder")
        batch.pop("decoder_input_ids", None)
        return batch

    def _padded(self, rows: Sequence[Row], left: bool) -> dict[str, Tensor]:
        longest = max(len(row.ids) for row in rows)
        ids, mask = [], []
        for row in rows:
            space = longest - len(row.ids)
            around = (space, 0) if left else (0, space)
            ids.append(nn.functional.pad(row.ids, around, value=self.padding))
            mask.append(nn.functional.pad(torch.ones_like(row.ids), around))
        return {"input_ids": torch.stack(ids), "attention_mask": torch.stack(mask)}

    def cut(self, output: Any, rows: Sequence[Row]) -> list[Tensor]:
        """The output of each row [its own length, width]: logits, or hidden states where there are none.

        A pooled vector of an image is one position more. Of two towers, the row's two vectors and how near they
        are [2 * width + 1]: the other logits compare it with the other rows.
        """
        if "text_embeds" in output:
            near = output.logits_per_text.diagonal()[:, None]
            return list(torch.cat([output.text_embeds, output.image_embeds, near], dim=-1))
        values = getattr(output, "logits", None)
        values = output.last_hidden_state if values is None else values
        if "pooler_output" in output and not self.reads_tokens:
            values = torch.cat([values, output.pooler_output[:, None]], dim=1)
        return [values[i, : None if self.has_decoder else row.length] for i, row in enumerate(rows)]

    def run(self, adapted: Adapted, rows: Sequence[Row], route: Any) -> list[Tensor]:
        """Outputs of each row under a route."""
        return self.cut(adapted(**self.batch(rows, dtype=adapted.source.dtype), deltas=route), rows)

    def run_drawn(self, adapted: Adapted, rows: Sequence[Row], names: Sequence[str | None], step: int) -> list[Tensor]:
        """Outputs of each row in training, dropout keyed by delta and step at the length of each delta's own rows."""
        draws = tuple(
            Draw(7, step, max(row.length or 0 for row, own in zip(rows, names, strict=True) if own == name))
            for name in dict.fromkeys(names)
        )
        call: Call = adapted.call(len(rows), list(names), draws=draws)
        return self.cut(adapted.run(call, **self.batch(rows)), rows)


def score(outputs: Sequence[Tensor], rows: Sequence[Row]) -> Tensor:
    """A loss: the sum over rows of a fixed random projection of each row's output."""
    total = outputs[0].new_zeros(())
    for output, row in zip(outputs, rows, strict=True):
        weight = torch.randn(output.shape, generator=generator(0, "score", row.number), dtype=torch.float64)
        total = total + (output * weight.to(output)).mean()
    return total


def moved(delta: Delta, seed: int = 1, size: float = 0.2) -> Delta:
    """Move every parameter of a delta off its start, as training would; return it."""
    with torch.no_grad():
        for name, parameter in delta.layers.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator(seed, name), dtype=torch.float64)
            parameter.add_(size * noise.to(parameter))
    return delta


def takes_prefix(backbone: Backbone) -> bool:
    """Whether all attention comes through ours; LongT5's encoder, for one, asks transformers for no function."""
    found = [site.heads for site in backbone.anatomy.sites if site.name in ("attn", "cross")]
    return bool(found) and all(found)


def takes_prompt(backbone: Backbone) -> bool:
    """Whether trained tokens can be put among the backbone's own."""
    try:
        check_takes_tokens(backbone)
    except SiteError:
        return False
    return True


def prompt(backbone: Backbone, n: int) -> Spec:
    """A prompt to share a batch with; something small where the backbone takes none."""
    return Prompt(n=n) if takes_prompt(backbone) else Adapter(m=n)


def prefix(backbone: Backbone, n: int) -> Spec:
    """A prefix to share a batch with; biases where the backbone's attention takes none."""
    return Prefix(n=n) if takes_prefix(backbone) else BitFit(at="ffn.{up,down}")


def made(spec: Spec, backbone: Backbone, name: str = "subject", *, seed: int = 0, move: bool = True) -> Delta:
    """A delta with parameters in the backbone's dtype, moved off its start."""
    delta = Delta.build(spec, backbone, seed=seed, name=name).to(backbone.dtype)
    return moved(delta, seed + 1) if move else delta


def alone_only(delta: Delta) -> bool:
    """Whether all rows of a call must be this delta's: it has weights of its own, or stands at a table of all rows."""
    return any(layer.port == "weight" or site.rows == "none" for site, layer in delta.at_sites())


def gradients(delta: nn.Module) -> dict[str, Tensor | None]:
    """Name -> gradient of each parameter, copied."""
    return {name: None if p.grad is None else p.grad.clone() for name, p in delta.named_parameters()}


def demand(condition: bool, message: str) -> None:
    """Raise LawBroken with the message unless the condition holds."""
    if not condition:
        raise LawBroken(message)


def agree(got: Tensor, wanted: Tensor, what: str, tolerance: float | None = None) -> None:
    """Demand that two tensors agree to a tolerance relative to the larger of 1 and the greatest value."""
    demand(got.shape == wanted.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(wanted.shape)}")
    limit = TOLERANCE[wanted.dtype] if tolerance is None else tolerance
    scale = max(1.0, float(wanted.detach().abs().max()) if wanted.numel() else 1.0)
    apart = float((got.detach() - wanted.detach()).abs().max()) if wanted.numel() else 0.0
    demand(apart <= limit * scale, f"{what}: {apart:.2e} apart, at most {limit * scale:.0e} allowed")  # NaN fails too


def agree_rows(got: Sequence[Tensor], wanted: Sequence[Tensor], what: str, tolerance: float | None = None) -> None:
    """Demand that the outputs of rows agree one by one."""
    for row, (one, other) in enumerate(zip(got, wanted, strict=True)):
        agree(one, other, f"{what}, row {row}", tolerance)


def agree_gradients(
    got: Mapping[str, Tensor | None], wanted: Mapping[str, Tensor | None], what: str, tolerance: float | None = None
) -> None:
    """Demand that gradients agree parameter by parameter, absent ones included."""
    demand(got.keys() == wanted.keys(), f"{what}: other parameters")
    for name, one in got.items():
        other = wanted[name]
        demand((one is None) == (other is None), f"{what}: {name} has a gradient in one of the two only")
        if one is not None and other is not None:
            agree(one, other, f"{what}: gradient of {name}", tolerance)


def same_bits(got: Tensor, wanted: Tensor) -> bool:
    """Say whether two tensors have the same dtype, shape and bytes (NaN equals itself)."""
    if got.dtype != wanted.dtype or got.shape != wanted.shape:
        return False
    return (
        got.detach()
        .cpu()
        .contiguous()
        .reshape(-1)
        .view(torch.uint8)
        .equal(wanted.detach().cpu().contiguous().reshape(-1).view(torch.uint8))
    )
