"""Extractive answers: where in a text the answer to a question begins and ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.data.task import Kind, Row, Task
from deltatune.delta.delta import generator
from deltatune.errors import TaskError
from deltatune.heads.base import Batch, Example, TaskHead, linear, processor_of, row_weights, tokenise, weighted_mean

LEAST_ROOM = 32  # tokens of a window: half for the question, a quarter shared with the next window
LONGEST = 30  # tokens of an answer, or as many as the longest that was learnt from


@dataclass(frozen=True)
class Window(Example):
    """A question with a stretch of its text: which characters each token covers ((0, 0): none of the text's).

    `target` has the positions at which an answer begins, and those at which one ends.
    """

    context: str = ""
    offsets: tuple[tuple[int, int], ...] = ()

    @property
    def inside(self) -> list[int]:
        """Positions of the text's tokens."""
        return [at for at, (start, end) in enumerate(self.offsets) if end > start]


class ExtractiveSpan(TaskHead):
    """scores [sequences, tokens, 2] = W hidden, of beginning and end; cross-entropy of each over a text's tokens.

    A text that is too long for one sequence is read in overlapping windows under one softmax, and an answer counts
    wherever it stands, as in Clark and Gardner 2018, arXiv:1710.10723. The prediction is the best span that ends where
    it begins or later, within one window and `longest` tokens. No bias, which a softmax would not feel.
    Parameters: 2 width.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("extractive_span",)

    def __init__(self, width: int, longest: int, seed: torch.Generator | None = None) -> None:
        super().__init__()
        self.width, self.longest = width, longest
        self.linear = linear(width, 2, seed, bias=False)

    @property
    def arguments(self) -> dict[str, Any]:
        return {"width": self.width, "longest": self.longest}

    @classmethod
    def make(cls, task: Task, backbone: Backbone, seed: int) -> ExtractiveSpan:
        answers = [answer["text"] for row in task.train for answer in row["answers"]]
        longest = max(len(e.ids) for e in tokenise(backbone, answers, limit=10_000, special=False))
        return cls(backbone.width, max(longest, LONGEST), generator(seed, "head", cls.__name__))

    def encode(self, rows: Sequence[Row], backbone: Backbone, limit: int) -> list[Example]:
        processor = processor_of(backbone)
        if not processor.is_fast:
            raise TaskError(f"{backbone.name} has a slow tokenizer, which does not say where its tokens stand")
        if limit < LEAST_ROOM:
            raise TaskError(f"max_length is {limit}: expected {LEAST_ROOM} or more for a question and its text")
        made = processor(
            [_cut(processor, row["question"], limit // 2) for row in rows],
            [row["context"] for row in rows],
            truncation="only_second",
            max_length=limit,
            stride=limit // 4,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        types = made.get("token_type_ids")
        windows: list[list[Window]] = [[] for _ in rows]
        for i, number in enumerate(made["overflow_to_sample_mapping"]):
            row = rows[number]
            offsets = tuple(
                (int(start), int(end)) if part == 1 else (0, 0)
                for (start, end), part in zip(made["offset_mapping"][i], made.sequence_ids(i), strict=True)
            )
            windows[number].append(
                Window(
                    tuple(made["input_ids"][i]),
                    tuple(types[i]) if types is not None else None,
                    _places(offsets, row.get("answers", ())),
                    weight=row.get("weight", 1.0),
                    context=row["context"],
                    offsets=offsets,
                )
            )
        return [_joined(several) for several in windows]

    def scores(self, hidden: Tensor, batch: Batch, backbone: Backbone) -> Tensor:
        ends: Tensor = self.linear(hidden.to(self.linear.weight.dtype))
        return ends

    def loss(self, hidden: Tensor, batch: Batch, backbone: Backbone) -> Tensor:
        scores = self.scores(hidden, batch, backbone)
        losses, learnt = [], []
        for example, share in zip(batch.examples, _log_shares(scores, batch), strict=True):
            of_row = torch.cat([share[n, list(w.inside)] for n, w in enumerate(_windows(example))])
            right = [[at in w.target[end] for w in _windows(example) for at in w.inside] for end in (0, 1)]
            # An answer that no window holds whole teaches nothing.
            learnt.append(float(any(right[0]) and any(right[1])))
            if learnt[-1]:
                losses.append(-sum(of_row[torch.tensor(right[end]), end].logsumexp(0) for end in (0, 1)) / 2)
            else:
                losses.append(of_row.sum() * 0.0)
        each = torch.stack(losses)  # type: ignore[arg-type]
        return weighted_mean(each, row_weights(batch, each) * torch.tensor(learnt).to(each))

    def decode(self, scores: Tensor, batch: Batch) -> tuple[list[Any], list[float]]:
        texts, sure = [], []
        for example, share in zip(batch.examples, _log_shares(scores.float(), batch), strict=True):
            found = []
            for n, window in enumerate(_windows(example)):
                inside = window.inside
                if not inside:
                    continue
                start, end = share[n, inside, 0], share[n, inside, 1]
                spans = start[:, None] + end[None, :]
                allowed = torch.ones_like(spans, dtype=torch.bool).triu().tril(self.longest - 1)
                best = spans.masked_fill(~allowed, float("-inf")).flatten().max(dim=0)
                first, last = divmod(int(best.indices), len(inside))
                begins, ends = window.offsets[inside[first]][0], window.offsets[inside[last]][1]
                found.append((float(best.values), window.context[begins:ends].strip()))
            best_of_row = max(found, default=(float("-inf"), ""), key=lambda one: one[0])
            texts.append(best_of_row[1])
            sure.append(torch.tensor(best_of_row[0]).exp().item())
        return texts, sure


def _windows(example: Example) -> list[Window]:
    return [one for one in example.sequences if isinstance(one, Window)]


def _joined(windows: Sequence[Window]) -> Window:
    import dataclasses

    return dataclasses.replace(windows[0], more=tuple(windows[1:]))


def _log_shares(scores: Tensor, batch: Batch) -> list[Tensor]:
    """Log-probabilities [windows, tokens, 2] of each row: one softmax over its text's tokens in all windows."""
    made = []
    for example, own in zip(batch.examples, scores.split([len(e.sequences) for e in batch.examples]), strict=True):
        inside = torch.zeros(own.shape[:2], dtype=torch.bool)
        for n, window in enumerate(_windows(example)):
            inside[n, window.inside] = True
        masked = own.masked_fill(~inside.to(own.device)[:, :, None], float("-inf"))
        made.append(masked.flatten(0, 1).log_softmax(dim=0).view_as(own))
    return made


def _places(offsets: Sequence[tuple[int, int]], answers: Sequence[dict[str, Any]]) -> tuple[set[int], set[int]]:
    """Positions of the first and the last tokens of the answers that a window holds whole."""
    inside = [at for at, (start, end) in enumerate(offsets) if end > start]
    firsts, lasts = set(), set()
    for answer in answers:
        text = answer["text"]
        begins = answer["start"] + len(text) - len(text.lstrip())
        ends = begins + len(text.strip())
        touched = [at for at in inside if offsets[at][0] < ends and offsets[at][1] > begins]
        # Where the window cuts the answer, its first or last token is another's.
        if touched and offsets[inside[0]][0] <= begins and offsets[inside[-1]][1] >= ends:
            firsts.add(touched[0])
            lasts.add(touched[-1])
    return firsts, lasts


def _cut(processor: Any, question: str, room: int) -> str:
    """Cut a question to so many tokens, special ones included, and part it from the text by a line's end."""
    offsets = processor(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    room -= processor.num_special_tokens_to_add(pair=True)
    return (question if len(offsets) <= room else question[: offsets[room - 1][1]]) + "\n"
