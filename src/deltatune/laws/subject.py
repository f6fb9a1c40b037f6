"""What a law is held against: one spec on one backbone, with rows to run and ways to compare."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.backbone.load import Backbone
from deltatune.delta.adapted import Adapted
from deltatune.delta.call import Call, Draw
from deltatune.delta.delta import Delta, generator
from deltatune.delta.method import Spec
from deltatune.errors import DeltatuneError
from deltatune.methods.addition.prefix import Prefix
from deltatune.methods.specification.bitfit import BitFit

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
TARGET_LENGTH = 5  # decoder tokens of an encoder-decoder


class LawBroken(DeltatuneError):
    """A method does not keep a law; the message says how."""


@dataclass(frozen=True)
class Row:
    """One input: its number (which fixes how it is scored), token ids [length] and decoder ids [TARGET_LENGTH]."""

    number: int
    ids: Tensor
    target: Tensor


@dataclass(frozen=True)
class Subject:
    """A spec on a backbone. The backbone is never touched: every law works on copies of it.

    With `length`, all rows have that many tokens: for backbones whose own outputs depend on the padding of a row.
    `dtype` is what the laws compute in unless they say otherwise: float32 for backbones that do so inside anyway.
    """

    spec: Spec
    backbone: Backbone
    name: str = field(default="", compare=False)
    length: int | None = None
    dtype: torch.dtype = torch.float64

    def fresh(self, dtype: torch.dtype | None = None) -> Backbone:
        """A copy of the backbone in a dtype (the subject's own by default), in evaluation mode."""
        module = copy.deepcopy(self.backbone.module).to(dtype or self.dtype).eval()
        return Backbone(module, self.backbone.processor, self.backbone.name)

    @cached_property
    def vocabulary(self) -> int:
        """Number of tokens of the backbone."""
        return int(self.backbone.module.get_input_embeddings().weight.shape[0])  # type: ignore[operator]

    @property
    def padding(self) -> int:
        """Token id that fills short rows."""
        found = getattr(getattr(self.backbone.module, "config", None), "pad_token_id", None)
        return 0 if found is None else int(found)

    def rows(self, number: int, *, seed: int = 0, length: int | None = None) -> list[Row]:
        """Rows of 3 to 9 tokens, or all of one length; the same for the same seed."""
        made = []
        for row in range(number):
            draw = generator(seed, "row", row)
            size = length or self.length or int(torch.randint(3, 10, (1,), generator=draw))
            low = min(5, self.vocabulary - 1)
            made.append(
                Row(
                    row,
                    torch.randint(low, self.vocabulary, (size,), generator=draw),
                    torch.randint(low, self.vocabulary, (TARGET_LENGTH,), generator=draw),
                )
            )
        return made

    def batch(self, rows: Sequence[Row], *, left: bool = False) -> dict[str, Tensor]:
        """Token ids and mask [rows, longest], padded on the right or the left; decoder ids where there is a decoder."""
        longest = max(len(row.ids) for row in rows)
        ids, mask = [], []
        for row in rows:
            space = longest - len(row.ids)
            around = (space, 0) if left else (0, space)
            ids.append(nn.functional.pad(row.ids, around, value=self.padding))
            mask.append(nn.functional.pad(torch.ones_like(row.ids), around))
        batch = {"input_ids": torch.stack(ids), "attention_mask": torch.stack(mask)}
        if self.backbone.kind == "encoder-decoder":
            batch["decoder_input_ids"] = torch.stack([row.target for row in rows])
        return {name: value.to(self.backbone.device) for name, value in batch.items()}

    def cut(self, output: Any, rows: Sequence[Row]) -> list[Tensor]:
        """The output of each row [its own length, width]: logits, or hidden states where there are none."""
        values = getattr(output, "logits", None)
        values = output.last_hidden_state if values is None else values
        both = self.backbone.kind == "encoder-decoder"
        return [values[i, : TARGET_LENGTH if both else len(row.ids)] for i, row in enumerate(rows)]

    def run(self, adapted: Adapted, rows: Sequence[Row], route: Any) -> list[Tensor]:
        """Outputs of each row under a route."""
        return self.cut(adapted(**self.batch(rows), deltas=route), rows)

    def run_drawn(self, adapted: Adapted, rows: Sequence[Row], names: Sequence[str | None], step: int) -> list[Tensor]:
        """Outputs of each row in training, dropout keyed by delta and step at the length of each delta's own rows."""
        draws = tuple(
            Draw(7, step, max(len(row.ids) for row, own in zip(rows, names, strict=True) if own == name))
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
