"""Heads that speak: a language model writes the answer, or picks a label's word. They have no parameters."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.backbone.load import Backbone
from deltatune.backbone.weights import read_weight
from deltatune.data.task import INPUTS, Kind, Row, Task
from deltatune.errors import TaskError
from deltatune.heads.base import Batch, Example, TaskHead, cross_entropy, processor_of, row_weights, tokenise

DEFAULT_TEMPLATES: Mapping[Kind, str] = {
    "classification": "{text}\nLabel:",
    "pair_classification": "{text}\n{text_b}\nLabel:",
    "generation": "{source}\n",
    "preference": "{prompt}",
}
CHUNK = 1024  # positions scored at a time: logits over a large vocabulary are the peak of memory


def wanted(backbone: Backbone, kind: str) -> None:
    """Raise TaskError for a backbone that is no language model."""
    if backbone.kind != "decoder" or backbone.output is None:
        raise TaskError(f"a {kind} task needs a language model such as smollm2; {backbone.name} writes no text")


def template_of(task: Task) -> str:
    """Return the template of a task. TaskError for one that names what is no input of its rows."""
    template = task.template or DEFAULT_TEMPLATES[task.kind]
    have = set(INPUTS[task.kind])
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name}
        if fields <= have:
            template.format(**dict.fromkeys(have, ""))
    except (ValueError, IndexError) as error:
        raise TaskError(f"template {template!r}: {error}; write {{text}} for a field, {{{{ for a brace") from None
    if not fields <= have:
        raise TaskError(f"template {template!r} names {sorted(fields - have)}; the task's rows have {sorted(have)}")
    return template


class Templated(TaskHead):
    """Base of the heads that word a row by a template."""

    def __init__(self, template: str) -> None:
        super().__init__()
        self.template = template

    @property
    def arguments(self) -> dict[str, Any]:
        return {"template": self.template}


class Writer(TaskHead):
    """Base of the heads that write texts."""

    new_tokens: int

    def writes(self, row: Row) -> bool:
        return True

    def room(self, limit: int) -> tuple[int, int]:
        """Return how many tokens a prompt and an answer may have: an answer gets half of the limit at most."""
        answer = min(self.new_tokens, limit // 2)
        return limit - answer - 1, answer

    def prompts(self, rows: Sequence[Row], backbone: Backbone, limit: int) -> list[Example]:
        """Return the tokens that the answers follow; a long row is cut."""
        raise NotImplementedError


class TemplatedWriter(Templated, Writer):
    """Base of the heads that write at most `new_tokens` for a row worded by a template."""

    def __init__(self, template: str, new_tokens: int) -> None:
        super().__init__(template)
        self.new_tokens = new_tokens

    @property
    def arguments(self) -> dict[str, Any]:
        return {**super().arguments, "new_tokens": self.new_tokens}

    def prompts(self, rows: Sequence[Row], backbone: Backbone, limit: int) -> list[Example]:
        """Return the tokens that the answers follow; a long row is cut, the template never."""
        return tokenise(backbone, worded(self.template, rows, backbone, self.room(limit)[0]), limit=limit)


class Generation(TemplatedWriter):
    """Write the answer after the prompt; cross-entropy on the answer's tokens and the end token."""

    kinds: ClassVar[tuple[Kind, ...]] = ("generation",)

    @classmethod
    def make(cls, task: Task, backbone: Backbone, seed: int) -> Generation:
        wanted(backbone, "generation")
        ends = tokenise(backbone, [row["target"] for row in task.train[:500]], limit=10_000, special=False)
        return cls(template_of(task), min(max(len(e.ids) for e in ends) + 4, 128))

    def encode(self, rows: Sequence[Row], backbone: Backbone, limit: int) -> list[Example]:
        end = processor_of(backbone).eos_token_id
        most = self.room(limit)[1]
        answers = tokenise(backbone, [row.get("target", "") for row in rows], limit=most, special=False)
        prompts = self.prompts(rows, backbone, limit)
        examples = []
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = (*prompt.ids, *answer.ids, end)
            # Position i predicts token i + 1.
            target = [-100] * (len(prompt.ids) - 1) + [*answer.ids, end] + [-100]
            examples.append(Example(ids, None, target))
        return examples

    def loss(self, hidden: Tensor, batch: Batch, backbone: Backbone) -> Tensor:
        return mean_loss(hidden, batch.sequences, backbone)


def learnt(text: Example) -> int:
    """Number of tokens of a text that are learnt."""
    return sum(token != -100 for token in text.target)


def log_probabilities(hidden: Tensor, texts: Sequence[Example], backbone: Backbone) -> Tensor:
    """Return the log-probability of each text's target tokens, summed [texts], in float32 or better.

    `hidden` are the last hidden states [texts, tokens, width]. Logits are made where a target is, CHUNK at a time.
    """
    where = [(row, at) for row, text in enumerate(texts) for at, token in enumerate(text.target) if token != -100]
    if not where:
        return hidden.float().sum(dim=(1, 2)) * 0.0
    rows, columns = (torch.tensor(index, device=hidden.device) for index in zip(*where, strict=True))
    target = torch.tensor([texts[row].target[at] for row, at in where], device=hidden.device)
    states = hidden[rows, columns]
    fine = torch.promote_types(hidden.dtype, torch.float32)
    parts = [
        nn.functional.cross_entropy(backbone.logits(part).to(fine), wanted, reduction="none")
        for part, wanted in zip(states.split(CHUNK), target.split(CHUNK), strict=True)
    ]
    return -hidden.new_zeros(len(texts), dtype=fine).index_add(0, rows, torch.cat(parts))


def mean_loss(hidden: Tensor, texts: Sequence[Example], backbone: Backbone) -> Tensor:
    """Return the mean log-loss over the target tokens of all texts, 0 where there are none."""
    return -log_probabilities(hidden, texts, backbone).sum() / max(1, sum(map(learnt, texts)))


class Verbalized(Templated):
    """Pick the label whose word the language model would write next; cross-entropy over the labels' words.

    scores [rows, labels]: the logit of the first token of each label's word after the template.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("classification", "pair_classification")

    def __init__(self, template: str, verbalizer: Mapping[str, str]) -> None:
        super().__init__(template)
        self.verbalizer = dict(verbalizer)
        self.labels = tuple(self.verbalizer)

    @property
    def arguments(self) -> dict[str, Any]:
        return {**super().arguments, "verbalizer": self.verbalizer}

    @classmethod
    def make(cls, task: Task, backbone: Backbone, seed: int) -> Verbalized:
        wanted(backbone, "verbalised")
        words = {label: (task.verbalizer or {}).get(label, f" {label}") for label in task.labels}
        head = cls(template_of(task), words)
        head.word_ids(backbone)
        return head

    def word_ids(self, backbone: Backbone) -> list[int]:
        """Return the first token of each label's word. TaskError if two labels begin with the same token."""
        first: dict[int, str] = {}
        for label, word in self.verbalizer.items():
            ids = processor_of(backbone)(word, add_special_tokens=False)["input_ids"]
            if not ids or ids[0] in first:
                other = first.get(ids[0]) if ids else None
                raise TaskError(
                    f"verbalizer: {label!r} -> {word!r} begins like {other!r}; choose words with different first tokens"
                    if other
                    else f"verbalizer: {label!r} -> {word!r} is empty"
                )
            first[ids[0]] = label
        return list(first)

    def encode(self, rows: Sequence[Row], backbone: Backbone, limit: int) -> list[Example]:
        number = {label: i for i, label in enumerate(self.labels)}
        examples = tokenise(backbone, worded(self.template, rows, backbone, limit), limit=limit)
        return [
            dataclasses.replace(e, target=number.get(row.get("label", ""), -100), weight=row.get("weight", 1.0))
            for e, row in zip(examples, rows, strict=True)
        ]

    def scores(self, hidden: Tensor, batch: Batch, backbone: Backbone) -> Tensor:
        mask = batch.inputs["attention_mask"]
        last = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)
        states = hidden[torch.arange(len(hidden), device=hidden.device), last]
        output = backbone.output
        assert output is not None
        rows = torch.tensor(self.word_ids(backbone), device=hidden.device)
        bias = output.bias[rows] if getattr(output, "bias", None) is not None else None
        return nn.functional.linear(states, read_weight(output, "weight")[rows], bias).float()

    def loss(self, hidden: Tensor, batch: Batch, backbone: Backbone) -> Tensor:
        target = torch.tensor([e.target for e in batch.examples], device=hidden.device)
        scores = self.scores(hidden, batch, backbone)
        return cross_entropy(scores, target, row_weights(batch, scores), self.class_weights)

    def decode(self, scores: Tensor, batch: Batch) -> tuple[list[Any], list[float]]:
        best = scores.softmax(dim=-1).max(dim=-1)
        return [self.labels[i] for i in best.indices.tolist()], best.values.tolist()


def worded(template: str, rows: Sequence[Row], backbone: Backbone, room: int) -> list[str]:
    """Fill a template so that it fits `room` tokens: each field's text is cut at its end, the template stays whole.

    TaskError if the template leaves no room for a text.
    """
    processor = processor_of(backbone)
    fields = [name for _, name, _, _ in string.Formatter().parse(template) if name]

    def filled(row: Row, share: int) -> str:
        return template.format(**{name: _cut(processor, str(row[name]), share) for name in fields})

    frame = len(processor(template.format(**dict.fromkeys(fields, "")))["input_ids"])
    if frame >= room:
        raise TaskError(f"template {template!r} takes {frame} of {room} tokens; shorten it, or raise max_length")
    share = (room - frame) // max(1, len(fields))
    texts = [filled(row, share) for row in rows]
    # Tokens may come out otherwise where a text meets the template, or where it was cut: then it is cut further.
    for i, ids in enumerate(processor(texts)["input_ids"]):
        over, left = len(ids) - room, share
        while over > 0 and left > 0:
            left = max(0, left - over)
            texts[i] = filled(rows[i], left)
            over = len(processor(texts[i])["input_ids"]) - room
    return texts


def _cut(processor: Any, text: str, room: int) -> str:
    if len(text.encode()) <= room:  # a token is one byte at least
        return text
    ids = processor(text, add_special_tokens=False)["input_ids"]
    # A cut inside a character leaves half of it.
    return text if len(ids) <= room else str(processor.decode(ids[:room])).rstrip("\ufffd")
