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


@dataclass(frozen=True)
class Example:
    """One row as the backbone reads it: token ids, token types (pairs), and what the head learns from it.

    `target` is a class number, or one number per token position (-100: not counted), by the head. A row of several
    texts has the others beside the first. `decoder` is what a decoder is given, one token for each of the target.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...] | None
    target: Any
    words: tuple[int, ...] = ()
    others: tuple[Example, ...] = ()
    decoder: tuple[int, ...] = ()

    @property
    def texts(self) -> tuple[Example, ...]:
        """The texts of the row, the first and the others, in the order in which they stand in a batch."""
        return (self, *self.others)

    @property
    def length(self) -> int:
        """Tokens of the longest text."""
        return max(len(text.ids) for text in self.texts)

    @property
    def tokens(self) -> int:
        """Tokens of all texts, on both sides of an encoder-decoder."""
        return sum(len(text.ids) + len(text.decoder) for text in self.texts)


@dataclass
class Batch:
    """Padded examples: `inputs` for the backbone (ids, mask, types: [texts, tokens]) and the examples themselves.

    `reference` [texts, tokens, width] is what the bare backbone gives, for heads that compare with it.
    """

    inputs: dict[str, Tensor]
    examples: Sequence[Example]
    reference: Tensor | None = None

    @property
    def texts(self) -> list[Example]:
        """The texts of all examples, one for each row of the inputs."""
        return [text for example in self.examples for text in example.texts]

    @property
    def length(self) -> int:
        """Padded length in tokens."""
        return int(self.inputs["input_ids"].shape[1])

    @property
    def positions(self) -> int:
        """Number of positions that a head reads: those of the decoder, where it is given something."""
        return int(self.inputs.get("decoder_input_ids", self.inputs["input_ids"]).shape[1])


class TaskHead(SavedHead):
    """Base of the heads that a task is fitted with.

    A head that `compares` gets in each batch what the bare backbone gives for it; one that `decodes` reads the logits
    of an encoder-decoder where others read hidden states.
    """

    kinds: ClassVar[tuple[Kind, ...]]
    compares: ClassVar[bool] = False
    decodes: ClassVar[bool] = False

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
        """Return the mean loss over the valid items of a batch, a scalar."""
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
    """Pad the texts of examples on the right to `length`, or to the longest of them."""
    texts = [text for example in examples for text in example.texts]
    length = max(len(text.ids) for text in texts) if length is None else length
    pad = getattr(backbone.processor, "pad_token_id", None) or 0
    ids = torch.full((len(texts), length), pad, dtype=torch.long)
    mask = torch.zeros(len(texts), length, dtype=torch.long)
    types = torch.zeros(len(texts), length, dtype=torch.long) if texts[0].types is not None else None
    for row, text in enumerate(texts):
        ids[row, : len(text.ids)] = torch.tensor(text.ids)
        mask[row, : len(text.ids)] = 1
        if types is not None and text.types is not None:
            types[row, : len(text.types)] = torch.tensor(text.types)
    inputs = {"input_ids": ids, "attention_mask": mask, **({"token_type_ids": types} if types is not None else {})}
    if texts[0].decoder:
        # Where the padding stands nothing is read, and the decoder sees what is before a position only.
        given = [torch.tensor(text.decoder) for text in texts]
        inputs["decoder_input_ids"] = torch.nn.utils.rnn.pad_sequence(given, batch_first=True, padding_value=pad)
    return Batch({name: value.to(backbone.device) for name, value in inputs.items()}, examples)


def linear(width: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    """A linear with weights from N(0, 0.02²) and zero biases."""
    made = nn.Linear(width, outputs)
    with torch.no_grad():
        made.weight.normal_(0.0, 0.02, generator=generator)
        made.bias.zero_()
    return made
