"""Writing with an encoder-decoder: it reads the source and writes the target."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.data.task import Kind, Row, Task
from deltatune.errors import TaskError
from deltatune.heads.base import Batch, Example, processor_of
from deltatune.heads.language import TemplatedWriter, mean_loss, template_of


class SequenceToSequence(TemplatedWriter):
    """Cross-entropy of the target's tokens, the decoder being given the tokens before (teacher forcing).

    Labels and their shift to the right are the tokenizer's and the network's own. It reads the decoder's hidden states
    [rows, target tokens, width]; the logits of the target's tokens are the network's own. No parameters.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("generation",)
    decodes: ClassVar[bool] = True

    @classmethod
    def make(cls, task: Task, backbone: Backbone, seed: int) -> SequenceToSequence:
        if backbone.output is None or not hasattr(backbone.module, "prepare_decoder_input_ids_from_labels"):
            raise TaskError(f"a generation task needs a model that writes; {backbone.name} has no words to write with")
        ends = labels_of([row["target"] for row in task.train[:500]], backbone, 10_000)
        template = template_of(task) if task.template else "{source}"
        return cls(template, min(max(map(len, ends)) + 4, 128))

    def room(self, limit: int) -> tuple[int, int]:
        """Return how many tokens a source and a target may have: they stand in two stacks."""
        return limit, min(self.new_tokens, limit)

    def encode(self, rows: Sequence[Row], backbone: Backbone, limit: int) -> list[Example]:
        network: Any = backbone.module
        examples = []
        labels = labels_of([row.get("target", "") for row in rows], backbone, self.room(limit)[1])
        for source, target in zip(self.prompts(rows, backbone, limit), labels, strict=True):
            given = network.prepare_decoder_input_ids_from_labels(torch.tensor([target], device=backbone.device))
            examples.append(dataclasses.replace(source, target=target, decoder=tuple(given[0].tolist())))
        return examples

    def loss(self, hidden: Tensor, batch: Batch, backbone: Backbone) -> Tensor:
        return mean_loss(hidden, batch.sequences, backbone)


def labels_of(texts: Sequence[str], backbone: Backbone, limit: int) -> list[list[int]]:
    """Return targets as the tokenizer words them, each with an end."""
    processor = processor_of(backbone)
    end = processor.eos_token_id
    made = processor(text_target=list(texts), truncation=True, max_length=limit)["input_ids"]
    return [ids if ids and ids[-1] == end else [*ids[: limit - 1], end] for ids in made]
