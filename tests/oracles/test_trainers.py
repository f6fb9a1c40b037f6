"""Other people's training loops train an `Adapted`: transformers' Trainer and TRL's SFTTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from deltatune.backbone.load import Backbone
from deltatune.delta.adapted import Adapted, adapt
from deltatune.laws.families import tiny
from deltatune.methods.addition.prompt import Prompt
from deltatune.methods.reparameterization.lora import LoRA
from deltatune.methods.specification.bitfit import BitFit

ARGUMENTS: dict[str, Any] = dict(
    max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, learning_rate=1e-2, logging_steps=1,
    disable_tqdm=True, save_strategy="no", bf16=False,
)  # fmt: skip


def rows() -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    made = []
    for _ in range(8):
        ids = torch.randint(3, 99, (6,), generator=draw)
        made.append(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "note": "not for the model"}
        )
    return made


def moved(adapted: Adapted, before: dict[str, Tensor]) -> list[str]:
    return [name for name, value in adapted.state_dict().items() if not torch.equal(value, before[name])]


def state(adapted: Adapted) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in adapted.state_dict().items()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("spec", [LoRA(r=2), Prompt(n=3), LoRA(r=2) | BitFit()], ids=str)
def test_trainer_moves_the_delta_and_saves_it(tmp_path: Path, spec: LoRA, checkpointing: bool) -> None:
    from transformers import Trainer, TrainingArguments

    adapted = adapt(Backbone(tiny("llama")), spec)
    before, weights = state(adapted), {n: p.detach().clone() for n, p in adapted.backbone.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path), **ARGUMENTS, eval_strategy="steps", eval_steps=1, gradient_checkpointing=checkpointing
    )
    trainer = Trainer(model=adapted, args=arguments, train_dataset=rows(), eval_dataset=rows())
    trainer.train()
    assert trainer.state.global_step == 2
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2  # labels are found, though a class of ours stands in front of the model
    batch = {key: torch.stack([row[key] for row in rows()]) for key in ("input_ids", "attention_mask", "labels")}
    counted = batch["labels"][:, 1:].numel()  # as Trainer counts; a prompt predicts the first token of a row, too
    with torch.no_grad():
        wanted = adapted.eval()(**batch, num_items_in_batch=counted).loss
    assert losses[-1] == pytest.approx(wanted.item(), abs=1e-5)
    # A LoRA's A moves from the second step on; all else at the first.
    assert moved(adapted, before) == list(before)
    assert all(torch.equal(p, weights[n]) for n, p in adapted.backbone.named_parameters())
    trainer.save_model(str(tmp_path / "out"))
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == before.keys()
    other = adapt(Backbone(tiny("llama")), spec)
    other.load_state_dict(saved)
    batch = {"input_ids": torch.arange(3, 9)[None]}
    assert torch.equal(other.eval()(**batch).logits, adapted.eval()(**batch).logits)


def test_trainer_takes_the_steps_of_a_plain_loop(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(tmp_path), **{**ARGUMENTS, "per_device_train_batch_size": 8}, lr_scheduler_type="constant", weight_decay=0.0
    )
    theirs = adapt(Backbone(tiny("llama")), LoRA(r=2))
    Trainer(model=theirs, args=arguments, train_dataset=rows()).train()
    ours = adapt(Backbone(tiny("llama")), LoRA(r=2)).train()
    optimiser = torch.optim.AdamW(ours.bank.parameters(), lr=1e-2, weight_decay=0.0)
    batch = {key: torch.stack([row[key] for row in rows()]) for key in ("input_ids", "attention_mask", "labels")}
    for _ in range(2):
        optimiser.zero_grad()
        ours(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(ours.bank.parameters(), 1.0)
        optimiser.step()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_trainer_refuses_reentrant_checkpointing(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from deltatune.errors import RoutingError

    arguments = TrainingArguments(
        str(tmp_path), **ARGUMENTS, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    )
    trainer = Trainer(model=adapt(Backbone(tiny("llama")), LoRA(r=2)), args=arguments, train_dataset=rows())
    with pytest.raises(RoutingError, match="use_reentrant=False"):
        trainer.train()


@pytest.mark.parametrize("spec", [LoRA(r=2), Prompt(n=3)], ids=str)
def test_sft_trainer_moves_the_delta(tmp_path: Path, spec: LoRA) -> None:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(90))])}
    made = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    processor = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", bos_token="<s>")
    texts = [" ".join(f"w{i * j % 90}" for j in range(8)) for i in range(8)]
    adapted = adapt(Backbone(tiny("llama")), spec)
    before = state(adapted)
    trainer = SFTTrainer(
        model=adapted,
        args=SFTConfig(str(tmp_path), **{**ARGUMENTS, "per_device_train_batch_size": 8}, max_length=16),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=processor,
    )
    (batch,) = trainer.get_train_dataloader()  # all rows are one batch
    with torch.no_grad():
        logits = adapted(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    wanted = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wanted.item(), abs=1e-5)
    assert moved(adapted, before) == list(before)
    trainer.save_model(str(tmp_path / "out"))
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == before.keys()
    logits = adapted.eval()(input_ids=torch.arange(3, 9)[None]).logits
    assert logits.shape == (1, 6, 99)
