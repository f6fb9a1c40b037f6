"""Classification of texts and pairs, and of tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.fit.tiny import WORDS, backbone, plan, task

from deltatune.data.metrics import references
from deltatune.errors import TaskError
from deltatune.heads.base import Batch, Example, collate
from deltatune.heads.choose import head_for
from deltatune.heads.classification import SequenceClassification
from deltatune.heads.tokens import TokenClassification
from deltatune.training.fit import fit_plans

HIDDEN = torch.arange(2 * 4 * 3, dtype=torch.float32).reshape(2, 4, 3)
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("first", torch.stack([HIDDEN[0, 0], HIDDEN[1, 0]])),
        ("last", torch.stack([HIDDEN[0, 3], HIDDEN[1, 1]])),
        ("mean", torch.stack([HIDDEN[0].mean(dim=0), HIDDEN[1, :2].mean(dim=0)])),
    ],
)
def test_pooling_reads_real_tokens_alone(pooling, expected):
    head = SequenceClassification(3, ["a", "b"], pooling, pair=False)
    assert torch.equal(head.pool(HIDDEN, Batch({"attention_mask": MASK}, [])), expected)


def test_scores_and_loss_are_a_linear_and_cross_entropy():
    head = SequenceClassification(3, ["a", "b"], "mean", pair=False)
    batch = Batch({"attention_mask": MASK}, [Example((), None, 1), Example((), None, 0)])
    mean = torch.stack([HIDDEN[0].mean(dim=0), HIDDEN[1, :2].mean(dim=0)])
    scores = mean @ head.linear.weight.T + head.linear.bias
    assert torch.allclose(head.scores(HIDDEN, batch, backbone()), scores)
    expected = -(scores.log_softmax(dim=1)[0, 1] + scores.log_softmax(dim=1)[1, 0]) / 2
    assert torch.allclose(head.loss(HIDDEN, batch, backbone()), expected)
    assert head.decode(torch.tensor([[0.0, 2.0], [3.0, 0.0]]), batch) == (
        ["b", "a"], pytest.approx([torch.sigmoid(torch.tensor(x)).item() for x in (2.0, 3.0)])
    )  # fmt: skip


def test_the_second_text_of_a_pair_has_a_type_of_its_own_and_the_backbone_sees_it():
    on, data = backbone(), task("pair_classification")
    head = head_for(data, on, 0)
    (example,) = head.encode(data.train[:1], on, 64)
    first, second = data.train[0]["text"].split(), data.train[0]["text_b"].split()
    assert example.types == (0,) * (len(first) + 2) + (1,) * (len(second) + 1)
    words = on.processor.convert_ids_to_tokens(list(example.ids))
    assert words == ["[CLS]", *first, "[SEP]", *second, "[SEP]"]
    batch = collate([example], on)
    assert batch.inputs["token_type_ids"].tolist() == [list(example.types)]
    without = collate([dataclasses.replace(example, types=(0,) * len(example.ids))], on)
    scores = [head.scores(on.trunk(**b.inputs).last_hidden_state, b, on) for b in (batch, without)]
    assert not torch.allclose(*scores, atol=1e-3)
    turned = head.encode([{**data.train[0], "text": data.train[0]["text_b"], "text_b": data.train[0]["text"]}], on, 64)
    assert turned[0].ids != example.ids


def test_a_pair_that_is_too_long_keeps_both_texts():
    on, data = backbone(), task("pair_classification")
    head = head_for(data, on, 0)
    row = {"text": " ".join(WORDS[:50]), "text_b": " ".join(WORDS[50:60]), "label": "good"}
    (example,) = head.encode([row], on, 20)
    assert len(example.ids) == 20 and example.types.count(1) > 3
    assert example.ids.count(on.processor.convert_tokens_to_ids("[SEP]")) == 2


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_long_text_is_cut_to_the_limit(family):
    on = backbone(family)
    (example,) = head_for(task(), on, 0).encode([{"text": " ".join(WORDS), "label": "good"}], on, 12)
    assert len(example.ids) == 12 and example.target == task().labels.index("good")


def test_rows_to_predict_need_no_label():
    on = backbone()
    assert [e.target for e in head_for(task(), on, 0).encode([{"text": "w1"}], on, 64)] == [-100]
    tokens = head_for(task("token_classification"), on, 0)
    (example,) = tokens.encode([{"tokens": ["w1", "w2"]}], on, 64)
    assert set(example.target) == {-100} and example.words == (1, 2)


def test_tags_come_back_from_the_positions_they_were_put_at():
    on, data = backbone(), task("token_classification")
    head = head_for(data, on, 0)
    batch = collate(head.encode(data.train, on, 64), on, 30)
    scores = torch.zeros(len(data.train), 30, len(head.labels))
    for row, example in enumerate(batch.examples):
        for at, target in enumerate(example.target):
            if target != -100:
                scores[row, at, target] = 9.0
    values, sure = head.decode(scores, batch)
    assert values == references("token_classification", data.train)
    expected = float(torch.tensor([9.0, 0.0, 0.0]).softmax(dim=0)[0])
    # The published confidence is the best score as it comes, or its share: between 0 and 1 it has to be a share.
    assert sure == pytest.approx([expected] * len(values), abs=1e-4)


def test_a_word_of_several_tokens_is_counted_once_at_its_first():
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    on = backbone("llama")
    made = Tokenizer(WordPiece({"[UNK]": 0, "un": 1, "##do": 2, "##ing": 3, "it": 4}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    on.processor = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[UNK]")
    head = TokenClassification(on.width, ["B", "O"])
    (example,) = head.encode([{"tokens": ["undoing", "it"], "tags": ["B", "O"]}], on, 64)
    assert example.ids == (1, 2, 3, 4) and example.target == [0, -100, -100, 1] and example.words == (0, 3)


def test_words_beyond_the_limit_are_outside_and_not_trained_on():
    on, data = backbone(), task("token_classification")
    head = head_for(data, on, 0)
    row = {"tokens": list(WORDS[:30]), "tags": ["B-low"] * 20 + ["O"] * 10}
    (example,) = head.encode([row], on, 10)
    assert len(example.ids) == 10 and example.words == (*range(1, 9), *([-1] * 22))
    assert sum(target != -100 for target in example.target) == 8
    scores = torch.zeros(1, 10, 3)
    scores[:, :, data.labels.index("B-low")] = 5.0
    values, sure = head.decode(scores, Batch({}, [example]))
    assert values == [["B-low"] * 8 + ["O"] * 22] and 0.9 < sure[0] <= 1
    none = TokenClassification(4, ["X", "Y"])
    assert none.decode(torch.zeros(1, 1, 2), Batch({}, [Example((1,), None, [-100], (-1, -1))])) == (
        [["X", "X"]],
        [0.0],
    )


def test_a_batch_without_a_word_to_learn_from_has_no_loss_and_harms_nothing():
    data = task("token_classification")
    (trained,) = fit_plans(backbone(), [plan("lora", data, max_length=2, steps=3)])
    assert trained.state == "done" and [point.loss for point in trained.curve] == [0.0] * len(trained.curve)
    assert trained.test.values == [["O"] * len(row["tokens"]) for row in data.test]


def test_a_backbone_without_a_tokenizer_is_told_so():
    on = backbone()
    on.processor = None
    for kind in ("classification", "token_classification"):
        with pytest.raises(
            TaskError, match="tiny-bert was given without a tokenizer; load it by name, or set `processor`"
        ):
            fit_plans(on, [plan("lora", task(kind))])
