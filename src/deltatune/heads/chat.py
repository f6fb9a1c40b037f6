"""Chat: the assistant's answers in a conversation, worded by the tokenizer's own template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.data.task import Kind, Row, Task
from deltatune.errors import TaskError
from deltatune.heads.base import Batch, Example, processor_of
from deltatune.heads.language import Writer, learnt, log_probabilities, mean_loss, wanted

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
Messages = Sequence[dict[str, str]]


class Chat(Writer):
    """Log-loss of the tokens of the assistant's answers, each with its end; all else is read and not learnt.

    Which tokens are answers the template says (`{% generation %}`), or else the difference between the conversation up
    to the answer and with it, which has to go on where the former ends. A conversation that ends with an answer gets
    its log-probability; after one that does not, the next answer is written. No parameters.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("chat",)

    def __init__(self, new_tokens: int) -> None:
        super().__init__()
        self.new_tokens = new_tokens

    @property
    def arguments(self) -> dict[str, Any]:
        return {"new_tokens": self.new_tokens}

    @classmethod
    def make(cls, task: Task, backbone: Backbone, seed: int) -> Chat:
        wanted(backbone, "chat")
        if not getattr(processor_of(backbone), "chat_template", None):
            raise TaskError(
                f"the tokenizer of {backbone.name} has no chat template; take a chat model, or set its "
                f"`processor.chat_template`"
            )
        contents = [one["content"] for row in task.train[:500] for one in row["messages"] if one["role"] == "assistant"]
        longest = max(map(len, processor_of(backbone)(contents, add_special_tokens=False)["input_ids"]))
        return cls(min(longest + 4, 256))

    def writes(self, row: Row) -> bool:
        return bool(row["messages"][-1]["role"] != "assistant")

    def prompts(self, rows: Sequence[Row], backbone: Backbone, limit: int) -> list[Example]:
        """Return the conversations up to the answer; of a long one the oldest messages are left out, then tokens."""
        most = self.room(limit)[0]
        examples = []
        for row in rows:
            messages = list(row["messages"])
            first = int(messages[0]["role"] == "system")
            ids = worded(messages, backbone, asking=True)
            while len(ids) > most and any(one["role"] == "user" for one in messages[first + 1 :]):
                del messages[first]
                while messages[first]["role"] != "user":  # a conversation begins with the user
                    del messages[first]
                ids = worded(messages, backbone, asking=True)
            examples.append(Example(tuple(ids[-most:]), None, None))
        return examples

    def encode(self, rows: Sequence[Row], backbone: Backbone, limit: int) -> list[Example]:
        """Word whole conversations and cut them at `limit` tokens. TaskError if no answer begins within them."""
        examples = []
        for row in rows:
            ids, answers = answered(row["messages"], backbone)
            # Position i predicts token i + 1.
            target = [token if says else -100 for token, says in zip(ids[1:limit], answers[1:limit], strict=True)]
            examples.append(Example(tuple(ids[:limit]), None, [*target, -100]))
        if not any(map(learnt, examples)):
            raise TaskError(f"no conversation has an answer within {limit} tokens; raise max_length")
        return examples

    def scores(self, hidden: Tensor, batch: Batch, backbone: Backbone) -> Tensor:
        """Return the log-probability of each conversation's answers and their number of tokens [rows, 2]."""
        said = log_probabilities(hidden, batch.sequences, backbone)
        return torch.stack([said, torch.tensor([*map(learnt, batch.sequences)]).to(said)], dim=1)

    def loss(self, hidden: Tensor, batch: Batch, backbone: Backbone) -> Tensor:
        return mean_loss(hidden, batch.sequences, backbone)

    def decode(self, scores: Tensor, batch: Batch) -> tuple[list[Any], list[float]]:
        return scores.tolist(), (scores[:, 0] / scores[:, 1].clamp(min=1)).exp().tolist()


def worded(messages: Messages, backbone: Backbone, *, asking: bool = False) -> list[int]:
    """Return a conversation as tokens, `asking` for an answer at its end. TaskError where the template refuses it."""
    from jinja2 import TemplateError

    try:
        made = processor_of(backbone).apply_chat_template(
            list(messages), tokenize=True, return_dict=True, add_generation_prompt=asking
        )
    except (TemplateError, IndexError) as error:
        raise TaskError(_refused(messages, backbone, str(error))) from error
    ids: list[int] = made["input_ids"]
    return ids


def answered(messages: Messages, backbone: Backbone) -> tuple[list[int], list[bool]]:
    """Return a conversation as tokens, and which of them are the assistant's answers.

    TaskError where the template does not say so and words an answer otherwise once it has been given.
    """
    processor = processor_of(backbone)
    whole = worded(messages, backbone)
    if MARKED.search(processor.get_chat_template()):
        made = processor.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return whole, [bool(one) for one in made["assistant_masks"]]
    answers = [False] * len(whole)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = worded(messages[:number], backbone, asking=True)
        after = worded(messages[: number + 1], backbone)
        if whole[: len(before)] != before or whole[: len(after)] != after or len(before) >= len(after):
            reason = (
                f"it words message {number + 1} otherwise in the whole than up to it, so the answers cannot be told"
            )
            raise TaskError(_refused(messages, backbone, f"{reason} apart; mark them with {{% generation %}} in it"))
        end = len(after)
        # What a template puts after the end token is nothing that a model has to write.
        if processor.eos_token_id in after[len(before) :]:
            end -= after[::-1].index(processor.eos_token_id)
        answers[len(before) : end] = [True] * (end - len(before))
    return whole, answers


def _refused(messages: Messages, backbone: Backbone, reason: str) -> str:
    start = messages[0]["content"][:40] if messages else ""
    return f"the chat template of {backbone.name} does not fit the conversation that begins {start!r}: {reason}"
