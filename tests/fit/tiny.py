"""Tiny backbones with a tokenizer of whole words, tiny tasks of every kind, and jobs made of both."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from deltatune.backbone.load import Backbone
from deltatune.compose.expression import parse
from deltatune.data.task import Kind, Task
from deltatune.laws.families import tiny
from deltatune.training.job import Job, Plan, make_jobs
from deltatune.training.settings import Settings

SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
FRAME = ("Label:", "Answer:", "good", "bad", "fine")
WORDS = tuple(f"w{number}" for number in range(88))
VOCABULARY = (*SPECIAL, *FRAME, *WORDS)
# The precision rule would take bfloat16 on some machines; these tests compare closely.
QUICK = Settings(steps=12, batch=4, evaluations=3, precision="float32", lr=5e-3)


@cache
def tokenizer(ends: bool) -> PreTrainedTokenizerFast:
    """A word is a token; `ends`: as BERT has it, [CLS] a [SEP] b [SEP] with token types."""
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    made.pre_tokenizer = WhitespaceSplit()
    if ends:
        made.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if ends else [])]
    return PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=64, model_input_names=names,
        pad_token="[PAD]", cls_token="[CLS]", bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]",
    )  # fmt: skip


def backbone(family: str = "bert", dtype: torch.dtype = torch.float32) -> Backbone:
    """A tiny random backbone, an object of its own, with its tokenizer."""
    return Backbone(tiny(family).to(dtype), tokenizer(family in ("bert", "roberta", "distilbert")), f"tiny-{family}")


def _words(rng: random.Random, topic: int, number: int) -> list[str]:
    """Words, about half of them of a topic's own twenty."""
    return [WORDS[20 * topic + rng.randrange(20)] if rng.random() < 0.5 else rng.choice(WORDS) for _ in range(number)]


def _row(kind: Kind, rng: random.Random, longest: int) -> dict[str, Any]:
    topic = rng.randrange(3)
    words = _words(rng, topic, rng.randrange(3, longest + 1))
    if kind == "classification":
        return {"text": " ".join(words), "label": FRAME[2:][topic]}
    if kind == "pair_classification":
        other = rng.randrange(3)
        label = "good" if topic == other else "bad"
        return {"text": " ".join(words), "text_b": " ".join(_words(rng, other, 3)), "label": label}
    if kind == "token_classification":
        tags = ["B-low" if word in WORDS[:20] else "B-high" if word in WORDS[60:] else "O" for word in words]
        return {"tokens": words, "tags": tags}
    if kind == "multiple_choice":
        label = rng.randrange(3)
        choices = [" ".join(_words(rng, topic if i == label else (topic + 1 + i) % 3, 2)) for i in range(3)]
        return {"text": " ".join(words), "choices": choices[: max(2, label + 1)], "label": label}
    if kind == "extractive_span":
        words = [f"w{number}" for number in rng.sample(range(60), rng.randrange(9, 3 * max(longest, 4)))]
        words[3 * topic + 1] = f"w{60 + topic}"
        answer = " ".join(words[3 * topic : 3 * topic + 2])
        context = " ".join(words)
        start = len(" ".join([*words[: 3 * topic], ""]))
        return {"context": context, "question": f"w{60 + topic}", "answers": [{"text": answer, "start": start}]}
    return {"source": " ".join(words), "target": words[0]}


@cache
def task(kind: Kind = "classification", name: str = "", rows: int = 40, longest: int = 9, seed: int = 0) -> Task:
    """A task of a kind: `rows` rows to train on, 12 for dev, 12 for test; the same for the same arguments."""
    rng = random.Random(f"{kind} {name} {seed}")
    train, dev, test = ([_row(kind, rng, longest) for _ in range(number)] for number in (rows, 12, 12))
    labels: dict[Kind, tuple[str, ...]] = {
        "classification": ("bad", "fine", "good"),
        "pair_classification": ("bad", "good"),
        "token_classification": ("B-high", "B-low", "O"),
    }
    metrics = {"token_classification": "entity_f1", "generation": "exact_match", "extractive_span": "squad_f1"}
    return Task(
        name or kind, kind, metrics.get(kind, "accuracy"), train, dev, test, labels.get(kind, ()), source="made here"
    )


def plan(delta: str, on: Task | None = None, seed: int = 0, settings: Settings = QUICK, **changes: Any) -> Plan:
    """A plan named by its expression."""
    import dataclasses

    return Plan(parse(delta), on or task(), seed, dataclasses.replace(settings, **changes), delta)


def jobs_of(plans: Sequence[Plan], on: Backbone) -> list[Job]:
    """The jobs of some plans, deltas and heads in the backbone's dtype."""
    jobs = make_jobs(plans, on, on)
    for job in jobs:
        job.delta.to(on.dtype)
    return jobs


def tensors(job: Job) -> dict[str, torch.Tensor]:
    """The present tensors of a job's delta and head, copied."""
    return {name: value.detach().clone() for name, value in job.delta.state_dict().items()}


def furthest(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """The largest difference of two sets of tensors of the same names."""
    assert left.keys() == right.keys() and left
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are equal bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
