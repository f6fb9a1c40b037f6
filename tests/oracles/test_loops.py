"""An `Adapted` in other people's loops: TRL's DPO, accelerate, sentence-transformers; and groups for any optimiser."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fit.tiny import backbone, tokenizer
from tests.oracles.test_trainers import ARGUMENTS, moved, rows, state
from torch import Tensor

import deltatune as dt
from deltatune.backbone.load import Backbone
from deltatune.delta.adapted import Adapted, adapt
from deltatune.delta.delta import Delta
from deltatune.laws.families import tiny
from deltatune.methods.addition.adapter import Adapter
from deltatune.methods.addition.prompt import Prompt
from deltatune.methods.reparameterization.lora import LoRA
from deltatune.methods.specification.bitfit import BitFit


def weights(adapted: Adapted) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in adapted.backbone.named_parameters()}


@pytest.mark.parametrize("spec", [LoRA(r=2), Prompt(n=3)], ids=str)
def test_dpo_has_the_bare_backbone_as_its_reference(tmp_path: Path, spec: LoRA) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    words = [" ".join(f"w{i * j % 80}" for j in range(1, 6)) for i in range(1, 9)]
    data = {"prompt": words, "chosen": [f" w{i}" for i in range(8)], "rejected": [f" w{i + 20} w3" for i in range(8)]}
    adapted = adapt(Backbone(tiny("llama")), spec)
    before, frozen = state(adapted), weights(adapted)
    arguments = {**ARGUMENTS, "max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 0.05}
    trainer = DPOTrainer(
        model=adapted,
        ref_model=adapted.backbone,  # outside a call of `adapted` no delta acts: no second copy
        args=DPOConfig(str(tmp_path), **arguments, max_length=32, loss_type="sigmoid"),
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer(False),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if isinstance(spec, LoRA):  # the identity at its start: policy and reference agree
        assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < losses[0] - 0.01
    assert moved(adapted, before) == list(before)
    assert all(torch.equal(p, frozen[n]) for n, p in adapted.backbone.named_parameters())


def batches() -> list[dict[str, Tensor]]:
    made = rows()
    return [
        {key: torch.stack([row[key] for row in made[i : i + 2]]) for key in ("input_ids", "attention_mask", "labels")}
        for i in range(0, len(made), 2)
    ]


def loop(adapted: Any, optimiser: torch.optim.Optimizer, backward: Any) -> None:
    for batch in batches():
        optimiser.zero_grad()
        backward(adapted(**batch).loss)
        optimiser.step()


def test_accelerate_trains_as_a_plain_loop() -> None:
    from accelerate import Accelerator

    ours, theirs = (adapt(Backbone(tiny("llama")), LoRA(r=2) | BitFit()).train() for _ in range(2))
    loop(ours, torch.optim.AdamW(ours.bank.parameters(), lr=1e-2), lambda loss: loss.backward())
    accelerator = Accelerator(cpu=True)
    model, optimiser = accelerator.prepare(theirs, torch.optim.AdamW(theirs.bank.parameters(), lr=1e-2))
    loop(model, optimiser, accelerator.backward)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])
    assert accelerator.unwrap_model(model) is theirs


def test_sentence_transformers_trains_the_delta(tmp_path: Path) -> None:
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    on = backbone("bert")
    on.module.save_pretrained(tmp_path / "bert")  # type: ignore[operator]
    tokenizer(True).save_pretrained(tmp_path / "bert")
    model = SentenceTransformer(str(tmp_path / "bert"), device="cpu")
    bare = model.encode(["w1 w2"])
    adapted = adapt(Backbone(model[0].model, tokenizer(True), "bert"), LoRA(r=2))
    model[0].model = adapted
    assert model.encode(["w1 w2"]) == pytest.approx(bare)
    before, frozen = state(adapted), weights(adapted)
    arguments = {name: value for name, value in ARGUMENTS.items() if name != "use_cpu"}
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(str(tmp_path / "out"), **arguments, use_cpu=True),
        train_dataset=Dataset.from_dict(
            {"anchor": [f"w{i}" for i in range(8)], "positive": [f"w{i + 9}" for i in range(8)]}
        ),
        loss=MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    assert moved(adapted, before) == list(before)
    assert all(torch.equal(p, frozen[n]) for n, p in adapted.backbone.named_parameters())


def test_every_delta_has_its_own_rate_in_one_optimiser() -> None:
    on = Backbone(tiny("llama"))
    specs = {"a": LoRA(r=2), "b": Adapter(m=3), "c": LoRA(r=2) | BitFit()}
    adapted = adapt(on, *(Delta.build(spec, on, name=name) for name, spec in specs.items()))
    adapted.bank["b"].head = torch.nn.Linear(32, 2)
    groups = dt.optimizer_groups(adapted, weight_decay=0.1)
    assert {g["name"]: g["lr"] for g in groups} == {name: s.lr for name, s in specs.items()} | {"b head": 2e-3}
    assert [g["weight_decay"] for g in groups] == [0.1, 0.1, 0.0, 0.1]
    every = [id(p) for g in groups for p in g["params"]]
    assert sorted(every) == sorted(id(p) for p in adapted.bank.parameters())
    optimiser = torch.optim.SGD(groups)
    batch = batches()[0]
    adapted(**batch, deltas=["a", "b"]).loss.backward()
    before = state(adapted)
    gradients = {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}
    optimiser.step()
    rates = {0: specs["a"].lr, 1: specs["b"].lr}
    assert {name.split(".")[2] for name in gradients} == {"0", "1"}
    for name, gradient in gradients.items():
        number = int(name.split(".")[2])
        wanted = before[name] - rates[number] * (gradient + 0.1 * before[name])
        torch.testing.assert_close(adapted.state_dict()[name], wanted)
    only = dt.optimizer_groups(adapted.bank["b"], lr=0.5, head_lr=0.25)
    assert [(g["name"], g["lr"]) for g in only] == [("b", 0.5), ("b head", 0.25)]
