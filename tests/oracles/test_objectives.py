"""Losses of several texts, held against sentence-transformers and TRL."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from tests.fit.tiny import QUICK, backbone
from tests.heads.paired import write

from deltatune.backbone.load import Backbone, load
from deltatune.compose.expression import parse
from deltatune.data.load import load_task
from deltatune.delta.adapted import Adapted
from deltatune.delta.delta import Delta
from deltatune.delta.merge import merge
from deltatune.errors import SiteError, UserError
from deltatune.heads.base import collate
from deltatune.heads.embedding import Embedding
from deltatune.heads.sentences import save
from deltatune.training.engine import Engine
from deltatune.training.evaluate import predict
from deltatune.training.job import Plan, batch_of, make_jobs

TEXTS = [
    {"anchor": "How do I read a file?", "positive": "Open it and call read.", "negative": "Cats sleep all day long."},
    {"anchor": "What is a good dinner?", "positive": "Pasta with tomatoes.", "negative": "A dinner jacket is black."},
    {"anchor": "Sort a list", "positive": "sorted returns a new list in ascending order", "negative": "shuffle it"},
    {"anchor": "The capital of France", "positive": "Paris", "negative": "Lyon lies on the Rhône."},
]


def shaken(delta: Delta, by: float = 0.05) -> Delta:
    """Move every tensor of a fresh delta, so that it does something."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in delta.parameters():
            value.add_(by * torch.randn(value.shape, generator=draw))
    return delta


def test_an_exported_delta_is_a_sentence_transformer_with_its_loss_and_its_embeddings(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    on = load("minilm")
    delta, head = shaken(Delta.build(parse("lora(r=4)"), on), 0.02), Embedding()
    delta.head = head
    texts = [text for row in TEXTS for text in row.values()]
    with Adapted(on, [delta]) as adapted, torch.no_grad():
        mine = torch.tensor(predict(adapted, delta, head, [{"anchor": text} for text in texts], 12).values)
        bare = torch.tensor(predict(adapted, None, head, [{"anchor": text} for text in texts], 12).values)
        losses = []
        for rows in (TEXTS, [{"anchor": row["anchor"], "positive": row["positive"]} for row in TEXTS]):
            batch = collate(head.encode(rows, on, 12), on)
            losses.append(float(head.loss(adapted.encode(batch.inputs, deltas=delta.name), batch, on)))
    save(delta, on, tmp_path / "st", 12)
    theirs = SentenceTransformer(str(tmp_path / "st"), device="cpu")
    assert (mine - bare).norm(dim=1).min() > 0.05  # the delta matters
    found = torch.tensor(theirs.encode(texts))
    assert torch.allclose(found, mine, atol=1e-5)
    judge = MultipleNegativesRankingLoss(theirs)
    with torch.no_grad():
        for fields, loss in zip((("anchor", "positive", "negative"), ("anchor", "positive")), losses, strict=True):
            columns = [theirs.preprocess([row[field] for row in TEXTS]) for field in fields]
            assert loss == pytest.approx(float(judge(columns, torch.tensor([]))), abs=1e-4)
    assert losses[0] > losses[1]  # more to be told apart


def test_what_cannot_be_a_sentence_transformer_is_refused(tmp_path: Path) -> None:
    on = backbone()
    adapter = Delta.build(parse("adapter"), on)
    with pytest.raises(UserError, match="makes no embeddings: its head is NoneType"):
        save(adapter, on, tmp_path / "a", 64)
    adapter.head = Embedding()
    with pytest.raises(SiteError, match="cannot be merged"):
        save(adapter, on, tmp_path / "a", 64)
    assert not (tmp_path / "a").exists()


def test_the_loss_of_preferences_is_that_of_trl(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    on = backbone("llama")
    task = load_task(write(tmp_path, "preference"))
    settings = dataclasses.replace(QUICK, batch=6)
    rows = list(task.train)[:6]
    (job,) = make_jobs([Plan(parse("lora"), dataclasses.replace(task, train=rows), 0, settings, "lora")], on, on)
    shaken(job.delta)
    engine = Engine([job], on)
    ours = float(engine.losses([job], [batch_of(job, on)])[0].detach())
    engine.close()
    policy = copy.deepcopy(on.module)
    merge(Backbone(policy, on.processor), job.delta)
    trainer = DPOTrainer(
        model=policy,
        ref_model=copy.deepcopy(on.module),
        args=DPOConfig(str(tmp_path), beta=0.1, use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=6),
        # A word of the tiny tokenizer begins after a space.
        train_dataset=Dataset.from_list([row | {n: " " + row[n] for n in ("chosen", "rejected")} for row in rows]),
        processing_class=on.processor,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        theirs = float(trainer.compute_loss(trainer.model.eval(), batch))
    assert abs(ours - 0.6931) > 1e-3 and ours == pytest.approx(theirs, abs=1e-5)
