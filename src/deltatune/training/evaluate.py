"""Predict and score, for one job or many in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deltatune.backbone.load import Backbone
from deltatune.data.metrics import references, score
from deltatune.data.task import Row, Task
from deltatune.delta.adapted import Adapted
from deltatune.delta.call import Call, Segment
from deltatune.delta.delta import Delta
from deltatune.errors import TaskError
from deltatune.heads.base import Example, TaskHead, collate
from deltatune.heads.language import Writer
from deltatune.training.job import Job, room
from deltatune.training.references import References

TOKENS = 2048  # most tokens of one physical batch of predictions: larger ones leave the cache (docs/log.md)


@dataclass
class Predictions:
    """One prediction per row, and the confidence in each (0 to 1; 1 for written text)."""

    values: list[Any]
    confidence: list[float]


def predict(adapted: Adapted, delta: Delta | None, head: TaskHead, rows: Sequence[Row], limit: int) -> Predictions:
    """Predict rows with one delta (None: the bare backbone)."""
    return predict_many(adapted, [(delta, head)], rows, limit)[0]


def predict_many(
    adapted: Adapted,
    members: Sequence[tuple[Delta | None, TaskHead]],
    rows: Sequence[Row],
    limit: int,
    read: References | None = None,
) -> list[Predictions]:
    """Predict the same rows with several deltas: each batch of rows runs once for all of them.

    `read` is what was read of the bare backbone so far, for heads that compare with it.
    """
    read = References() if read is None else read
    source = adapted.source
    writers = [(delta, head) for delta, head in members if isinstance(head, Writer)]
    asked = sum(members[0][1].writes(row) for row in rows)
    if 0 < asked < len(rows):
        raise TaskError(f"{asked} of {len(rows)} rows ask for an answer and the others have one; give rows of one sort")
    if asked:
        return [_generate(adapted, delta, head, rows, limit) for delta, head in writers]
    examples = members[0][1].encode(rows, source, limit)
    order = sorted(range(len(examples)), key=lambda i: examples[i].longest)
    values: list[list[Any]] = [[None] * len(rows) for _ in members]
    confidence: list[list[float]] = [[0.0] * len(rows) for _ in members]
    training = adapted.bank.training
    adapted.bank.eval()
    try:
        with torch.inference_mode():
            for chunk in _chunks(order, examples, len(members)):
                batch = collate([examples[i] for i in chunk], source)
                names = [d.name if d is not None and len(d.layers) else None for d, _ in members]
                read.give(adapted, [members[0][1]], [batch])
                for hidden, call in _runs(adapted, names, batch.inputs):
                    for number, (_, head) in enumerate(members):
                        if names[number] not in hidden:
                            continue
                        with adapted.weights_of(call):
                            scores = head.scores(hidden[names[number]], batch, source)
                        found, sure = head.decode(scores, batch)
                        for i, value, certain in zip(chunk, found, sure, strict=True):
                            values[number][i], confidence[number][i] = value, certain
    finally:
        adapted.bank.train(training)
    return [Predictions(head.conclude(v, rows), c) for (_, head), v, c in zip(members, values, confidence, strict=True)]


def _runs(
    adapted: Adapted, names: Sequence[str | None], inputs: dict[str, torch.Tensor]
) -> Iterator[tuple[dict[str | None, torch.Tensor], Call]]:
    """Yield the hidden states of the same rows under each delta, by name, and their call.

    Deltas that change the weights run by themselves, one after the other.
    """
    rows = len(next(iter(inputs.values())))
    heavy = {name for name in names if name is not None and _changes_weights(adapted.bank[name])}
    light: list[str | None] = list(dict.fromkeys(name for name in names if name not in heavy))
    groups: list[list[str | None]] = [light] if light else []
    groups += [[name] for name in heavy]
    for group in groups:
        call = adapted.routed(tuple(Segment(name, rows) for name in group))
        repeated = {key: value.repeat(len(group), *[1] * (value.ndim - 1)) for key, value in inputs.items()}
        hidden = adapted.encode(repeated, call=call)
        yield dict(zip(group, hidden.split(rows), strict=True)), call


def _changes_weights(delta: Delta) -> bool:
    return any(layer.port == "weight" for _, layer in delta.at_sites())


def _chunks(order: Sequence[int], examples: Sequence[Example], times: int) -> list[list[int]]:
    """Cut rows, shortest first, into chunks of at most TOKENS tokens over all deltas."""
    chunks: list[list[int]] = []
    sequences = 0
    for i in order:
        sequences += len(examples[i].sequences)
        if not chunks or sequences * times * examples[i].longest > TOKENS:
            chunks.append([])
            sequences = len(examples[i].sequences)
        chunks[-1].append(i)
    return chunks


def _generate(adapted: Adapted, delta: Delta | None, head: Writer, rows: Sequence[Row], limit: int) -> Predictions:
    source = adapted.source
    prompts = head.prompts(rows, source, limit)
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i].ids))
    values: list[Any] = [""] * len(rows)
    end, pad = source.processor.eos_token_id, source.processor.pad_token_id
    # A decoder goes on where a row ends; an encoder reads rows as in training.
    left = source.kind == "decoder"
    training = adapted.bank.training
    adapted.bank.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(order), 16):
                chunk = order[start : start + 16]
                longest = max(len(prompts[i].ids) for i in chunk)
                ids = torch.tensor([_filled(prompts[i].ids, pad, longest, left) for i in chunk])
                mask = torch.tensor([_filled([1] * len(prompts[i].ids), 0, longest, left) for i in chunk])
                made = adapted.generate(
                    ids.to(source.device),
                    attention_mask=mask.to(source.device),
                    deltas=delta.name if delta is not None and len(delta.layers) else None,
                    max_new_tokens=head.room(limit)[1],
                    do_sample=False,
                    eos_token_id=end,
                    pad_token_id=pad,
                )
                # What a decoder alone returns begins with the prompt, what one of two stacks does with its start.
                for i, row in zip(chunk, made[:, longest if left else 1 :].tolist(), strict=True):
                    row = row[: row.index(end)] if end in row else row
                    values[i] = source.processor.decode(row, skip_special_tokens=True).strip()
    finally:
        adapted.bank.train(training)
    return Predictions(values, [1.0] * len(rows))


def _filled(row: Sequence[int], fill: int, length: int, left: bool) -> list[int]:
    gap = [fill] * (length - len(row))
    return [*gap, *row] if left else [*row, *gap]


def task_rows(task: Task, split: str, most: int | None = None) -> Sequence[Row]:
    """Return a split's rows, at most `most`. TaskError for a split that is empty."""
    rows: Sequence[Row] = getattr(task, split)
    if not rows:
        raise TaskError(f"{task.name} has no {split} rows")
    return rows if most is None else rows[:most]


def evaluate(adapted: Adapted, jobs: Sequence[Job], split: str, *, whole: bool = False) -> list[float]:
    """Return the score of each job on a split of its own task; jobs of one task run together."""
    found: dict[str, float] = {}
    for limit, group in in_groups(jobs, adapted.source):
        task, settings = group[0].plan.task, group[0].plan.settings
        rows = task_rows(task, split, None if whole else settings.dev_rows)
        made = predict_many(adapted, [(job.delta, job.head) for job in group], rows, limit, jobs[0].references)
        gold = references(task.kind, rows)
        for job, predictions in zip(group, made, strict=True):
            found[job.name] = score(task.metric, predictions.values, gold, task.labels)
    return [found[job.name] for job in jobs]


def in_groups(jobs: Sequence[Job], backbone: Backbone) -> list[tuple[int, list[Job]]]:
    """Group the jobs that predict the same examples: the length these are cut to, and the jobs."""
    groups: dict[tuple[Any, ...], list[Job]] = {}
    for job in jobs:
        task, settings = job.plan.task, job.plan.settings
        limit = min(settings.max_length, room(job.plan.spec, backbone))
        key = (limit, task.fingerprint, task.metric, repr(job.head.arguments), settings.dev_rows)
        groups.setdefault(key, []).append(job)
    return [(key[0], group) for key, group in groups.items()]
