"""Preferences: of two answers to a prompt, the one that people chose becomes the likelier."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from deltatune.backbone.load import Backbone
from deltatune.data.task import Kind, Row, Task
from deltatune.heads.base import Batch, Example, processor_of, tokenise
from deltatune.heads.language import Templated, log_probabilities, template_of, wanted, worded

ANSWERS = ("chosen", "rejected")


class Preference(Templated):
    """margin [rows] = beta ((log p - log q)(chosen) - (log p - log q)(rejected)); loss -log sigmoid(margin).

    log p is the log-probability of the answer's tokens, and of the end token, with the delta on, log q the same with
    the delta off: the reference is no second model, but a call of the backbone alone, once a text. No parameters.
    Source: Rafailov et al. 2023, Direct Preference Optimization, arXiv:2305.18290.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("preference",)
    compares: ClassVar[bool] = True

    def __init__(self, template: str, beta: float = 0.1) -> None:
        super().__init__(template)
        self.beta = beta

    @property
    def arguments(self) -> dict[str, Any]:
        return {**super().arguments, "beta": self.beta}

    @classmethod
    def make(cls, task: Task, backbone: Backbone, seed: int) -> Preference:
        wanted(backbone, "preference")
        return cls(template_of(task))

    def encode(self, rows: Sequence[Row], backbone: Backbone, limit: int) -> list[Example]:
        """Word prompts and answers; answers get half of the limit at most, and are cut at their end as prompts are."""
        end = processor_of(backbone).eos_token_id
        most = limit // 2
        answers = [tokenise(backbone, [row[name] for row in rows], limit=most, special=False) for name in ANSWERS]
        longest = min(most, max(len(answer.ids) + 1 for made in answers for answer in made))
        prompts = tokenise(backbone, worded(self.template, rows, backbone, limit - longest), limit=limit)
        examples = []
        for prompt, *both in zip(prompts, *answers, strict=True):
            chosen, rejected = (_continued(prompt.ids, (*answer.ids, end)[:most]) for answer in both)
            examples.append(dataclasses.replace(chosen, more=(rejected,)))
        return examples

    def compared(self, hidden: Tensor, batch: Batch, backbone: Backbone) -> Tensor:
        return log_probabilities(hidden, batch.sequences, backbone)

    def scores(self, hidden: Tensor, batch: Batch, backbone: Backbone) -> Tensor:
        assert batch.reference is not None
        policy = log_probabilities(hidden, batch.sequences, backbone)
        gain = policy - batch.reference.to(policy)
        return self.beta * (gain[0::2] - gain[1::2])

    def loss(self, hidden: Tensor, batch: Batch, backbone: Backbone) -> Tensor:
        return -nn.functional.logsigmoid(self.scores(hidden, batch, backbone)).mean()

    def decode(self, scores: Tensor, batch: Batch) -> tuple[list[Any], list[float]]:
        return scores.tolist(), scores.abs().sigmoid().tolist()


def _continued(prompt: tuple[int, ...], answer: tuple[int, ...]) -> Example:
    # Position i predicts token i + 1.
    target = [-100] * (len(prompt) - 1) + [*answer, -100]
    return Example((*prompt, *answer), None, target)
