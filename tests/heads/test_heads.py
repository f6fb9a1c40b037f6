"""What all heads have in common: shapes, padding, learning, saving, and that added tokens move nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.fit.tiny import QUICK, backbone, plan, task

from deltatune.compose.expression import parse
from deltatune.data.metrics import references
from deltatune.delta.adapted import Adapted
from deltatune.delta.delta import Delta
from deltatune.heads.base import collate
from deltatune.heads.choice import MultipleChoice
from deltatune.heads.choose import head_for
from deltatune.heads.classification import SequenceClassification
from deltatune.heads.language import Generation, Verbalized
from deltatune.heads.span import ExtractiveSpan
from deltatune.heads.tokens import TokenClassification
from deltatune.training.evaluate import predict
from deltatune.training.fit import fit_plans

WORDED = dataclasses.replace(task(), template="{text} Label:")
CASES = {
    "text, encoder": ("bert", task(), SequenceClassification),
    "text, decoder": ("llama", task(), SequenceClassification),
    "text, encoder of two": ("t5", task(), SequenceClassification),
    "pair, encoder": ("bert", task("pair_classification"), SequenceClassification),
    "pair, no types": ("roberta", task("pair_classification"), SequenceClassification),
    "tokens, encoder": ("bert", task("token_classification"), TokenClassification),
    "tokens, decoder": ("gpt2", task("token_classification"), TokenClassification),
    "choices, encoder": ("bert", task("multiple_choice"), MultipleChoice),
    "choices, decoder": ("gpt2", task("multiple_choice"), MultipleChoice),
    "span, encoder": ("bert", task("extractive_span"), ExtractiveSpan),
    "span, decoder": ("llama", task("extractive_span"), ExtractiveSpan),
    "words": ("llama", WORDED, Verbalized),
    "writing": ("llama", task("generation"), Generation),
}
SCORED = [name for name, (_, _, head) in CASES.items() if head is not Generation]


def case(name):
    family, data, _ = CASES[name]
    on = backbone(family)
    return on, data, head_for(data, on, 0)


def scores(name, extra=0, delta=None):
    """Scores of eight rows, padded to `extra` positions more than they need, with what they were made from."""
    on, data, head = case(name)
    examples = head.encode(data.train[:8], on, 64)
    batch = collate(examples, on, max(len(e.ids) for e in examples) + extra)
    with torch.no_grad():
        if delta is None:
            hidden = on.trunk(**batch.inputs).last_hidden_state
        else:
            with Adapted(on, [Delta.build(parse(delta), on)]) as adapted:
                adapted.eval()
                hidden = adapted.encode(dict(batch.inputs))
        assert hidden.shape[1] == batch.length
        return head.scores(hidden, batch, on), batch, head


@pytest.mark.parametrize("name", CASES)
def test_a_task_gets_its_head(name):
    assert type(case(name)[2]) is CASES[name][2]


def test_only_a_decoder_with_a_template_or_words_answers_in_words():
    assert type(head_for(WORDED, backbone("bert"), 0)) is SequenceClassification
    assert type(head_for(WORDED, backbone("t5"), 0)) is SequenceClassification
    words = dataclasses.replace(task(), verbalizer={"good": "good", "bad": "bad", "fine": "fine"})
    assert type(head_for(words, backbone("gpt2"), 0)) is Verbalized


@pytest.mark.parametrize("name", SCORED)
def test_scores_have_a_value_for_each_label_of_each_row_or_token(name):
    found, batch, head = scores(name)
    labels = len(CASES[name][1].labels)
    shapes = {
        TokenClassification: (8, batch.length, labels),
        MultipleChoice: (len(batch.sequences),),
        ExtractiveSpan: (len(batch.sequences), batch.length, 2),
    }
    assert found.shape == shapes.get(CASES[name][2], (8, labels))
    assert found.dtype == torch.float32 and torch.isfinite(found).all()
    values, sure = head.decode(found, batch)
    assert len(values) == len(sure) == 8 and all(0 <= value <= 1 for value in sure)


@pytest.mark.parametrize("name", CASES)
def test_more_padding_changes_nothing(name):
    on, data, head = case(name)
    examples = head.encode(data.train[:8], on, 64)
    assert len({len(e.ids) for e in examples}) > 2
    losses = []
    for extra in (0, 9):
        batch = collate(examples, on, max(len(e.ids) for e in examples) + extra)
        with torch.no_grad():
            losses.append(float(head.loss(on.trunk(**batch.inputs).last_hidden_state, batch, on)))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    if name in SCORED:
        plain, batch, _ = scores(name)
        padded, longer, _ = scores(name, extra=9)
        assert torch.allclose(padded[:, : batch.length] if padded.ndim == 3 else padded, plain, atol=1e-5)
        assert head.decode(padded, longer)[0] == head.decode(plain, batch)[0]


@pytest.mark.parametrize("name", CASES)
def test_a_row_beside_others_is_as_it_is_alone(name):
    on, data, head = case(name)
    adapted = Adapted(on, [])
    together = predict(adapted, None, head, data.train[:8], 64)
    for i, row in enumerate(data.train[:8]):
        alone = predict(adapted, None, head, [row], 64)
        assert alone.values[0] == together.values[i]
        assert alone.confidence[0] == pytest.approx(together.confidence[i], abs=1e-5)


LEARNS = dataclasses.replace(QUICK, steps=120, batch=8, evaluations=4, lr=3e-3, head_lr=2e-2, probe=False, warmup=0.05)


@pytest.mark.parametrize("name", CASES)
def test_it_learns_eight_rows_by_heart_and_predicts_the_same_after_it_was_saved(name, tmp_path):
    family, data, kind = CASES[name]
    rows = data.train[:8]
    few = dataclasses.replace(data, train=rows, dev=rows, test=rows)
    on = backbone(family)
    (trained,) = fit_plans(on, [plan("full", few, 0, LEARNS)])
    gold = references(few.kind, rows)
    right = [value in answers if isinstance(answers, list) and isinstance(value, str) else value == answers
             for value, answers in zip(trained.test.values, gold, strict=True)]  # fmt: skip
    assert sum(right) == 8, trained.curve
    assert trained.metrics["test"] == {data.metric: 1.0} and trained.curve[-1].loss < 0.95 * trained.curve[0].loss
    trained.delta.save(str(tmp_path / "saved"))
    loaded = Delta.load(str(tmp_path / "saved"), on)
    assert type(loaded.head) is kind and loaded.head.arguments == trained.delta.head.arguments
    again = predict(Adapted(on, [loaded]), loaded, loaded.head, rows, 64)
    assert again.values == trained.test.values
    assert again.confidence == pytest.approx(trained.test.confidence, abs=1e-6)


@pytest.mark.parametrize("name", SCORED)
def test_a_prompt_of_five_tokens_moves_no_index_of_a_head(name):
    plain, batch, _ = scores(name)
    prompted, same, _ = scores(name, delta="prompt(n=5)")
    assert prompted.shape == plain.shape and not torch.allclose(prompted, plain)
    assert [e.words for e in batch.examples] == [e.words for e in same.examples]


def blind(on):
    """Let no position see another, nor know where it stands: its hidden state tells which token it is and no more."""
    with torch.no_grad():
        for site in on.anatomy.sites:
            if site.name == "attn.o":
                for parameter in on.module.get_submodule(site.exit).parameters():
                    parameter.zero_()
        for name, parameter in on.module.named_parameters():
            if "position_embeddings" in name or ".wpe." in name:
                parameter.zero_()
    return on


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2", "llama", "t5"])
def test_with_a_prompt_every_hidden_state_stands_at_its_own_token(family):
    on = blind(backbone(family))
    data = task("token_classification")
    head = head_for(data, on, 0)
    batch = collate(head.encode(data.train[:8], on, 64), on)
    with torch.no_grad():
        plain = on.trunk(**batch.inputs).last_hidden_state
        with Adapted(on, [Delta.build(parse("prompt(n=5)"), on)]) as adapted:
            prompted = adapted.encode(dict(batch.inputs))
    assert len({tuple(row.tolist()) for row in plain[0].round(decimals=4)}) > 3
    real = batch.inputs["attention_mask"].bool()
    assert torch.allclose(prompted[real], plain[real], atol=1e-5)


def test_spans_learnt_beside_a_prompt_stand_where_they_belong():
    data = task("token_classification")
    rows = data.train[:8]
    few = dataclasses.replace(data, train=rows, dev=rows, test=rows)
    (trained,) = fit_plans(backbone(), [plan("prompt(n=5) | adapter(m=16)", few, 0, LEARNS, lr=1e-2)])
    assert trained.test.values == [row["tags"] for row in rows]


def test_a_fresh_head_depends_on_its_seed_alone():
    on = backbone()
    one, same, other = (head_for(task(), on, seed).linear.weight for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
