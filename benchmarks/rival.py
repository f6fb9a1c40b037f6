"""The PEFT side of the trainings: its models, and the plain loop that trains one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.backbone.embedded import EMBEDDED, locate
from deltatune.data.task import Task
from deltatune.heads.base import Example
from deltatune.training.settings import rate


@dataclass(frozen=True)
class Cell:
    """One cell of the search over PEFT's settings; the first values are its defaults."""

    dtype: str = "float32"
    attention: str = "sdpa"
    fused: bool = False
    grouped: bool = False
    threads: int = 0
    dropout: bool = True

    def __str__(self) -> str:
        said = [
            self.dtype,
            f"{self.attention} attention",
            "fused AdamW" if self.fused else "plain AdamW",
            "grouped by length" if self.grouped else "",
            f"{self.threads} threads" if self.threads != 1 else "1 thread",
            "" if self.dropout else "no dropout",
        ]
        return ", ".join(filter(None, said))


def base_model(task: Task, cell: Cell, backbone: str = "minilm") -> nn.Module:
    """Load the transformers model of a task's kind, with a fresh head."""
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
    from transformers.utils import logging

    logging.set_verbosity_error()  # a head is fresh, and transformers says so at length
    logging.disable_progress_bar()
    tagging = task.kind == "token_classification"
    auto: Any = AutoModelForTokenClassification if tagging else AutoModelForSequenceClassification
    options = {} if cell.dropout else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model: nn.Module = auto.from_pretrained(
        locate(backbone) or EMBEDDED[backbone].hub,
        num_labels=len(task.labels),
        dtype=getattr(torch, cell.dtype),
        attn_implementation=cell.attention,
        **options,
    )
    return model


def peft_model(task: Task, cell: Cell, **options: Any) -> nn.Module:
    """Return the task's model with a LoRA of PEFT at its own target modules; `options` are those of LoraConfig."""
    from peft import LoraConfig, TaskType, get_peft_model

    kind = TaskType.TOKEN_CLS if task.kind == "token_classification" else TaskType.SEQ_CLS
    return get_peft_model(base_model(task, cell), LoraConfig(task_type=kind, **options))  # type: ignore[arg-type]


def padded(examples: Sequence[Example], tagging: bool) -> dict[str, Tensor]:
    """Pad examples to the longest of them, labels included."""
    length = max(len(e.ids) for e in examples)

    def rows(values: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*value, *[fill] * (length - len(value))] for value in values])

    made = {
        "input_ids": rows([e.ids for e in examples], 0),
        "attention_mask": rows([[1] * len(e.ids) for e in examples], 0),
        "labels": rows([e.target for e in examples], -100) if tagging else torch.tensor([e.target for e in examples]),
    }
    if examples[0].types is not None:
        made["token_type_ids"] = rows([e.types or () for e in examples], 0)
    return made


class Training:
    """One training as PEFT's users write it: AdamW, a linear schedule, gradients clipped at 1."""

    def __init__(self, task: Task, cell: Cell, lr: float, steps: int, warmup: float = 0.06, **options: Any) -> None:
        self.tagging = task.kind == "token_classification"
        self.model = peft_model(task, cell, **options).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0, fused=cell.fused or None)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, lambda step: rate(step, steps, warmup))

    def step(self, examples: Sequence[Example]) -> None:
        """Do one optimiser step on a batch."""
        loss = self.model(**padded(examples, self.tagging)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.schedule.step()
        self.optimiser.zero_grad()
