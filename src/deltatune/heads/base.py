"""What a head is: it words a task for a backbone, and turns hidden states into scores and predictions.

A head never sees which delta is on, and never looks inside the backbone: it reads the last hidden states of the trunk,
from which inserted positions have been taken out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.backbone.load import Backbone
from deltatune.data.task import Kind, Row, Task
from deltatune.delta.head import Head as SavedHead
from deltatune.errors import TaskError
from deltatune.heads.pixels import pixels


@dataclass(frozen=True)
class Example:
    """One row as the backbone reads it: token ids, token types (pairs), and what the head learns from it.

    `target` is a class number, or one number per token position (-100: not counted), by the head. A row that takes
    several sequences (choices, windows of a long text, the texts of a pair) has the further ones in `more`. `weight` is
    the row's in the loss. `decoder` is what a decoder is given, one token for each of the target. An image has no ids:
    the backbone makes `patches` positions of it, which count as tokens.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...] | None
    target: Any
    words: tuple[int, ...] = ()
    more: tuple[Example, ...] = ()
    weight: float = 1.0
    decoder: tuple[int, ...] = ()
    image: str | None = None
    patches: int = 0

    @property
    def sequences(self) -> tuple[Example, ...]:
        """All sequences of the row, in the order in which they stand in a batch."""
        return (self, *self.more)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, on both sides of an encoder-decoder."""
        return sum(e._length + len(e.decoder) for e in self.sequences)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(e._length for e in self.sequences)

    @property
    def _length(self) -> int:
        return len(self.ids) if self.image is None else self.patches


@dataclass
class Batch:
    """Padded examples: `inputs` for the backbone and the examples themselves.

    Inputs are ids, mask and types [sequences, tokens], or pixels [rows, channels, height, width]. Each example has one
    sequence or more; those of one stand together. `reference` [sequences] is what a head that compares made of
    the bare backbone's hidden states.
    """

    inputs: dict[str, Tensor]
    examples: Sequence[Example]
    reference: Tensor | None = None

    @property
    def length(self) -> int:
        """Padded length in tokens."""
        return int(self.inputs["input_ids"].shape[1]) if "input_ids" in self.inputs else self.examples[0].longest

    @property
    def size(self) -> int:
        """Tokens of all sequences, padding included."""
        return len(self.sequences) * self.length

    @property
    def sequences(self) -> list[Example]:
        """The sequences of all examples, one for each row of the inputs."""
        return [one for example in self.examples for one in example.sequences]

    @property
    def positions(self) -> int:
        """Number of positions that a head reads: those of the decoder, where it is given something."""
        return int(self.inputs["decoder_input_ids"].shape[1]) if "decoder_input_ids" in self.inputs else self.length

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return sum(e.tokens for e in self.examples)


class TaskHead(SavedHead):
    """Base of the heads that a task is fitted with.

    A head that `compares` gets with each batch what it made of the bare backbone, once a text; one that `decodes` reads
    the hidden states of an encoder-decoder's decoder where others read those of its encoder.
    """

    kinds: ClassVar[tuple[Kind, ...]]
    compares: ClassVar[bool] = False
    decodes: ClassVar[bool] = False
    labels: tuple[str, ...] = ()
    """What the scores are of, in their order, where a task has labels."""
    class_weights: tuple[float, ...] | None = None
    """Weights of the labels in the loss, in their order; a matter of one training that does not travel."""

    @classmethod
    def make(cls, task: Task, backbone: Backbone, seed: int) -> TaskHead:
        """Make a fresh head for a task. TaskError if the task is not of this head's kinds."""
        raise NotImplementedError

    def encode(self, rows: Sequence[Row], backbone: Backbone, limit: int) -> list[Example]:
        """Word and tokenise rows, cut to `limit` tokens."""
        raise NotImplementedError

    def scores(self, hidden: Tensor, batch: Batch, backbone: Backbone) -> Tensor:
        """Return the scores of a batch from hidden states [texts, tokens, width]."""
        raise NotImplementedError

    def loss(self, hidden: Tensor, batch: Batch, backbone: Backbone) -> Tensor:
        """Return the mean loss over the valid items of a batch by their weights, a scalar."""
        raise NotImplementedError

    def compared(self, hidden: Tensor, batch: Batch, backbone: Backbone) -> Tensor:
        """Return one number a sequence [sequences] of the bare backbone's hidden states, for a head that compares.

        It may depend on the sequence alone: it is computed once a fit.
        """
        raise NotImplementedError

    def decode(self, scores: Tensor, batch: Batch) -> tuple[list[Any], list[float]]:
        """Return one prediction per row as plain Python, and the confidence in it (0 to 1)."""
        raise NotImplementedError

    def writes(self, row: Row) -> bool:
        """Say whether the answer to a row is a text to be written."""
        return False

    def conclude(self, values: list[Any], rows: Sequence[Row]) -> list[Any]:
        """Return the predictions of all rows, for a head whose predictions depend on the other rows."""
        return values


def tokenise(backbone: Backbone, *texts: Sequence[str], limit: int, special: bool = True) -> list[Example]:
    """Tokenise texts, or pairs of texts, into examples without targets."""
    processor = processor_of(backbone)
    made = processor(*(list(t) for t in texts), truncation=True, max_length=limit, add_special_tokens=special)
    types = made.get("token_type_ids")
    return [
        Example(tuple(ids), tuple(types[i]) if types is not None else None, None)
        for i, ids in enumerate(made["input_ids"])
    ]


def processor_of(backbone: Backbone) -> Any:
    if backbone.processor is None:
        raise TaskError(f"{backbone.name} was given without a tokenizer; load it by name, or set `processor`")
    return backbone.processor


def collate(examples: Sequence[Example], backbone: Backbone, length: int | None = None) -> Batch:
    """Pad examples on the right to `length`, or to the longest of them."""
    images = [e.image for e in examples if e.image is not None]
    if images:
        return Batch({"pixel_values": pixels(images, backbone)}, examples)
    length = max(e.longest for e in examples) if length is None else length
    sequences = [one for e in examples for one in e.sequences]
    pad = getattr(backbone.processor, "pad_token_id", None) or 0
    ids = torch.full((len(sequences), length), pad, dtype=torch.long)
    mask = torch.zeros(len(sequences), length, dtype=torch.long)
    types = torch.zeros(len(sequences), length, dtype=torch.long) if sequences[0].types is not None else None
    for row, example in enumerate(sequences):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        mask[row, : len(example.ids)] = 1
        if types is not None and example.types is not None:
            types[row, : len(example.types)] = torch.tensor(example.types)
    inputs = {"input_ids": ids, "attention_mask": mask, **({"token_type_ids": types} if types is not None else {})}
    if sequences[0].decoder:
        # Where the padding stands nothing is read, and the decoder sees what is before a position only.
        given = [torch.tensor(text.decoder) for text in sequences]
        inputs["decoder_input_ids"] = torch.nn.utils.rnn.pad_sequence(given, batch_first=True, padding_value=pad)
    return Batch({name: value.to(backbone.device) for name, value in inputs.items()}, examples)


class Blocks(nn.Linear):
    """A linear whose outputs are computed block by block, so that a further block changes no bit of those before it."""

    def __init__(self, width: int, outputs: int, blocks: Sequence[int], bias: bool) -> None:
        super().__init__(width, outputs, bias=bias)
        self.blocks = tuple(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., outputs] of x [..., width]."""
        biases = [None] * len(self.blocks) if self.bias is None else self.bias.split(self.blocks)
        parts = zip(self.weight.split(self.blocks), biases, strict=True)
        return torch.cat([nn.functional.linear(x, weight, bias) for weight, bias in parts], dim=-1)


def linear(
    width: int,
    outputs: int,
    generator: torch.Generator | None,
    *,
    bias: bool = True,
    blocks: Sequence[int] = (),
) -> Blocks:
    """A linear with weights from N(0, 0.02²) and zero biases."""
    made = Blocks(width, outputs, blocks or (outputs,), bias)
    with torch.no_grad():
        made.weight.normal_(0.0, 0.02, generator=generator)
        if bias:
            made.bias.zero_()
    return made


def row_weights(batch: Batch, like: Tensor) -> Tensor:
    """Return the weights of the rows [rows], in the dtype and on the device of another tensor."""
    return torch.tensor([e.weight for e in batch.examples], dtype=torch.float64).to(like)


def weighted_mean(each: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of losses by their weights, a scalar; 0 where nothing has a weight."""
    return (each * weights).sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


def cross_entropy(
    scores: Tensor, target: Tensor, weights: Tensor, class_weights: Sequence[float] | None = None
) -> Tensor:
    """Return the weighted mean of the cross-entropy of items: scores [items, classes], target and weights [items].

    A target of -100 is not counted. An item's weight is its own times its class's.
    """
    each = nn.functional.cross_entropy(scores, target, reduction="none")
    weights = weights * (target >= 0)
    if class_weights is not None:
        weights = weights * torch.tensor(class_weights, dtype=torch.float64).to(scores)[target.clamp(min=0)]
    return weighted_mean(each, weights)
