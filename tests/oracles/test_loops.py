"""An `Adapted` in other people's loops: TRL's DPO, accelerate, sentence-transformers; and groups for any optimiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.fit.tiny import backbone, tokenizer
from tests.oracles.test_trainers import ARGUMENTS, moved, rows, state
from torch import Tensor, nn

import deltatune as dt
from deltatune.backbone.load import Backbone
from deltatune.delta.adapted import Adapted, adapt
from deltatune.delta.delta import Delta
from deltatune.laws.families import tiny
from deltatune.laws.subject import made
from deltatune.methods.addition.adapter import Adapter
from deltatune.methods.addition.prompt import Prompt
from deltatune.methods.reparameterization.lora import LoRA
from deltatune.methods.specification.bitfit import BitFit


def own_names(adapted: Adapted) -> list[str]:
    return [f"bank.{name}" for name, _ in adapted.bank.named_parameters()]


def weights(adapted: Adapted) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in adapted.backbone.named_parameters()}


def preferences(adapted: Adapted, batch: dict[str, Tensor]) -> Tensor:
    """DPO's loss at beta 0.1, written out: https://arxiv.org/abs/2305.18290, equation 7. Batch [chosen, then rejected]."""

    def written(route: str | None) -> Tensor:
        logits = adapted(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], deltas=route).logits
        found = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        return (found * batch["completion_mask"][:, 1:]).sum(dim=1)

    chosen, rejected = (written(adapted.bank.names[0]) - written(None)).chunk(2)
    return -nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()


@pytest.mark.parametrize("spec", [LoRA(r=2), Prompt(n=3)], ids=str)
def test_dpo_has_the_bare_backbone_as_its_reference(tmp_path: Path, spec: LoRA) -> None:
    """All rows are one batch, so that losses and steps are those of a plain loop."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    words = [" ".join(f"w{i * j % 80}" for j in range(1, 6 - i % 3)) for i in range(1, 9)]
    data = {"prompt": words, "chosen": [f" w{i}" for i in range(8)], "rejected": [f" w{i + 20} w3" for i in range(8)]}
    on = Backbone(tiny("llama"))
    adapted = adapt(on, made(spec, on))
    before, frozen = state(adapted), weights(adapted)
    arguments = {**ARGUMENTS, "max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 10.0, "optim": "sgd"}
    trainer = DPOTrainer(
        model=adapted,
        ref_model=adapted.backbone,  # outside a call of `adapted` no delta acts: no second copy
        args=DPOConfig(str(tmp_path), **arguments, max_length=32, loss_type="sigmoid", lr_scheduler_type="constant"),
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer(False),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(torch.equal(p, frozen[n]) for n, p in adapted.backbone.named_parameters())
    on = Backbone(tiny("llama"))
    plain = adapt(on, made(spec, on))
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    optimiser = torch.optim.SGD(plain.bank.parameters(), lr=10.0)
    (batch,) = trainer.get_train_dataloader()
    for loss in losses:
        wanted = preferences(plain, batch)
        assert loss == pytest.approx(wanted.item(), abs=2e-5)
        optimiser.zero_grad()
        wanted.backward()
        nn.utils.clip_grad_norm_(plain.bank.parameters(), 1.0)
        optimiser.step()
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.01
    assert moved(plain, before) == own_names(plain)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(adapted.state_dict()[name], value, rtol=1e-3, atol=1e-5)


def batches() -> list[dict[str, Tensor]]:
    found = rows()
    return [
        {key: torch.stack([row[key] for row in found[i : i + 2]]) for key in ("input_ids", "attention_mask", "labels")}
        for i in range(0, len(found), 2)
    ]


def loop(adapted: Any, optimiser: torch.optim.Optimizer, backward: Any) -> None:
    for batch in batches():
        optimiser.zero_grad()
        backward(adapted(**batch).loss)
        optimiser.step()


def test_accelerate_trains_as_a_plain_loop(tmp_path: Path) -> None:
    from accelerate import Accelerator

    ours, theirs = (adapt(Backbone(tiny("llama")), LoRA(r=2) | BitFit()).train() for _ in range(2))
    before = state(ours)
    loop(ours, torch.optim.AdamW(ours.bank.parameters(), lr=1e-2), lambda loss: loss.backward())
    accelerator = Accelerator(cpu=True)
    model, optimiser = accelerator.prepare(theirs, torch.optim.AdamW(theirs.bank.parameters(), lr=1e-2))
    loop(model, optimiser, accelerator.backward)
    assert moved(ours, before) == own_names(ours)
    trained = dict(theirs.bank.named_parameters())
    for name, value in ours.bank.named_parameters():
        assert torch.equal(value, trained[name])
    assert accelerator.unwrap_model(model) is theirs
    accelerator.save_state(str(tmp_path))
    assert load_file(tmp_path / "model.safetensors").keys() == set(own_names(theirs))
    loop(model, optimiser, accelerator.backward)
    assert moved(theirs, state(ours)) == own_names(theirs)
    accelerator.load_state(str(tmp_path))
    assert moved(theirs, state(ours)) == []


def test_sentence_transformers_trains_the_delta(tmp_path: Path) -> None:
    """All rows are one batch, so that the step is that of a plain loop."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    on = backbone("bert")
    on.module.save_pretrained(tmp_path / "bert")  # type: ignore[operator]
    tokenizer(True).save_pretrained(tmp_path / "bert")
    model = SentenceTransformer(str(tmp_path / "bert"), device="cpu")
    texts = ["w1 w2", "w3 w4 w5 w6 w7"]  # of two lengths: one is padded
    bare = model.encode(texts)
    on = Backbone(model[0].model, tokenizer(True), "bert")
    adapted = adapt(on, made(LoRA(r=2), on))
    model[0].model = adapted
    with adapted.using(None):
        assert model.encode(texts) == pytest.approx(bare)
    before, frozen = state(adapted), weights(adapted)

    def embedded(text: str) -> Tensor:
        """The mean of the hidden states: one text alone needs no mask."""
        ids = torch.tensor([tokenizer(True)(text)["input_ids"]])
        return adapted(input_ids=ids).last_hidden_state.mean(dim=1)[0]

    def loss(pairs: dict[str, list[str]]) -> Tensor:
        """Cross-entropy of each anchor's own positive among all of them, over 20 times the cosine."""
        one, two = (nn.functional.normalize(torch.stack([embedded(t) for t in pairs[k]]), dim=1) for k in pairs)
        return nn.functional.cross_entropy(20 * one @ two.T, torch.arange(len(one)))

    pairs = {"anchor": [f"w{i}" for i in range(8)], "positive": [f"w{i + 9} w{i}" for i in range(8)]}
    wanted = loss(pairs)
    wanted.backward()
    gradients = {f"bank.{name}": p.grad.clone() for name, p in adapted.bank.named_parameters() if p.grad is not None}
    adapted.zero_grad()
    plainly: dict[str, Any] = dict(optim="sgd", max_grad_norm=0.0)
    arguments = {**ARGUMENTS, "max_steps": 1, "per_device_train_batch_size": 8, **plainly}
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(str(tmp_path / "out"), **arguments),
        train_dataset=Dataset.from_dict(pairs),
        loss=MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wanted.item(), abs=2e-5)
    assert list(gradients) == own_names(adapted)
    for name, value in adapted.state_dict().items():
        torch.testing.assert_close(value - before[name], -1e-2 * gradients[name], rtol=1e-3, atol=1e-6)
    assert all(torch.equal(p, frozen[n]) for n, p in adapted.backbone.named_parameters())
    after = model.encode(texts)
    assert abs(after - bare).max() > 1e-2
    for text, vector in zip(texts, after, strict=True):
        assert vector == pytest.approx(embedded(text).detach().numpy(), abs=1e-5)


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
