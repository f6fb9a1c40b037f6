"""Every metric against values worked out by hand, with ties, empties and 0/0."""

from __future__ import annotations

import math
from typing import Any

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import f1_score as seqeval_f1

from deltatune.data import METRICS, Task, check_metric, constant, default_metric, majority, references, score
from deltatune.data.metrics import NUMBER_METRICS, TAG_METRICS
from deltatune.errors import TaskError, UnknownName

GOLD = ["a", "a", "a", "b", "b", "c"]
SAID = ["a", "a", "b", "b", "c", "a"]


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("accuracy", 3 / 6),
        ("micro_f1", 3 / 6),
        # F1 of a: 2·2/(3+3), of b: 2·1/(2+2), of c: 0
        ("macro_f1", (2 / 3 + 1 / 2 + 0) / 3),
        ("macro_recall", (2 / 3 + 1 / 2 + 0) / 3),
        ("f1_a", 2 / 3),
        ("f1_b", 1 / 2),
        ("f1_c", 0.0),
        # (c·s − Σ p·t) / sqrt((s² − Σ p²)(s² − Σ t²)) with c = 3 right of s = 6, p = t = (3, 2, 1)
        ("matthews", (3 * 6 - 14) / (36 - 14)),
        ("mcc", (3 * 6 - 14) / (36 - 14)),
    ],
)
def test_class_metrics_by_hand(metric, value):
    assert score(metric, SAID, GOLD, ("a", "b", "c")) == pytest.approx(value)


def test_zero_over_zero_counts_as_zero():
    assert score("f1_b", ["a", "a"], ["a", "a"], ("a", "b")) == 0.0
    assert score("matthews", ["a", "a"], ["a", "b"]) == 0.0
    # A label that is neither present nor predicted has no part; one that is only predicted counts as 0.
    assert score("macro_f1", ["a", "b"], ["a", "b"], ("a", "b", "c")) == 1.0
    assert score("macro_f1", ["a", "c"], ["a", "a"], ("a", "b", "c")) == pytest.approx((2 / 3 + 0) / 2)
    assert score("macro_recall", ["a", "c"], ["a", "a"], ("a", "b", "c")) == 0.5
    assert score("entity_f1", [["O"]], [["O"]]) == 0.0


def test_entity_f1_by_hand():
    gold = [["B-P", "I-P", "O", "B-L"], ["O", "B-P"]]
    # The first span is cut short, the second has the other type, the third is right: 1 of 3 found, 1 of 3 right.
    said = [["B-P", "O", "O", "B-P"], ["O", "B-P"]]
    assert score("entity_f1", said, gold) == pytest.approx(1 / 3)
    assert score("token_accuracy", said, gold) == pytest.approx(4 / 6)
    # Lenient: an I- that continues nothing begins a span.
    assert score("entity_f1", [["I-P", "I-P", "O", "I-L"], ["O", "I-P"]], gold) == 1.0


ROWS = st.lists(
    st.lists(st.sampled_from(["O", "B-X", "I-X", "B-Y"]), min_size=1, max_size=6).flatmap(
        lambda row: st.tuples(st.just(row), st.permutations(row))
    ),
    min_size=1,
    max_size=5,
)


@settings(deadline=None)
@given(ROWS)
def test_entity_f1_is_seqevals(pairs):
    gold, said = [list(p[0]) for p in pairs], [list(p[1]) for p in pairs]
    assert score("entity_f1", said, gold) == pytest.approx(seqeval_f1(gold, said, zero_division=0))


@pytest.mark.parametrize(
    ("metric", "prediction", "reference", "value"),
    [
        ("exact_match", "forty  two ", "forty two", 1.0),
        ("exact_match", "Forty two", "forty two", 0.0),
        ("exact_match", "b", ["a", "b"], 1.0),
        ("exact_match", "", "a", 0.0),
        ("token_f1", "the cat sat", "The cat sat down.", 2 * 3 / (3 + 4)),
        ("token_f1", "a a b", "a b b", 2 * 2 / 6),
        ("token_f1", "x", ["y", "x z"], 2 / 3),
        ("token_f1", "", "a", 0.0),
        ("token_f1", "", "...", 1.0),
        # The longest common subsequence of "a b c d" and "a c b d" has 3 words.
        ("rouge_l", "a b c d", "a c b d", 2 * 3 / 8),
        ("rouge_l", "police killed the gunman", "the gunman killed police", 2 * 2 / 8),
        ("rouge_l", "b a", ["a c b", "b c a"], 2 * 2 / 5),
        ("rouge_l", "", "a", 0.0),
        ("rouge", "नमस्ते दुनिया", "नमस्ते, दुनिया!", 1.0),
    ],
)
def test_text_metrics_by_hand(metric, prediction, reference, value):
    assert score(metric, [prediction], [reference]) == pytest.approx(value)


def test_text_metrics_are_means_over_rows():
    assert score("exact_match", ["a", "b"], ["a", "c"]) == 0.5
    assert score("rouge_l", ["a b", "c"], ["a b", "d"]) == 0.5


def test_bleu_and_chrf_are_sacrebleus():
    said = ["the cat sat on the mat", "there is a dog here today"]
    gold = [["the cat sat on a mat", "a cat sat on the mat"], ["there is one dog here today"]]
    columns = [["the cat sat on a mat", "there is one dog here today"], ["a cat sat on the mat", None]]
    bleu, chrf = sacrebleu.corpus_bleu(said, columns).score, sacrebleu.corpus_chrf(said, columns).score
    assert 0 < bleu < 100 and 0 < chrf < 100
    assert score("bleu", said, gold) == pytest.approx(bleu / 100)
    assert score("chrf", said, gold) == pytest.approx(chrf / 100)
    assert score("bleu", ["one two three four five"], ["one two three four five"]) == pytest.approx(1.0)


@pytest.mark.parametrize("metric", [*METRICS, "f1_a"])
def test_nothing_to_score_is_an_error(metric):
    with pytest.raises(TaskError, match=f"{metric}: nothing to score"):
        score(metric, [], [], ("a",))


@pytest.mark.parametrize("metric", METRICS)
def test_lengths_have_to_agree(metric):
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        score(metric, ["a"], ["a", "b"])


@pytest.mark.parametrize("metric", ["entity_f1", "token_accuracy"])
def test_tags_have_to_cover_each_token(metric):
    with pytest.raises(ValueError, match="row 2: 1 predicted tags for 2 tokens"):
        score(metric, [["O"], ["O"]], [["O"], ["O", "B-X"]])


@pytest.mark.parametrize("metric", METRICS)
def test_a_perfect_prediction_scores_one(metric):
    gold: list[Any] = ["a b c d", "e f g h"]
    if metric in TAG_METRICS:
        gold = [["O", "B-X", "I-X"]] * 3
    if metric in NUMBER_METRICS:
        gold = [1.0, 2.5, -3.0]
    assert score(metric, gold, gold) == pytest.approx(1.0)


def test_unknown_metrics_name_the_nearest():
    with pytest.raises(UnknownName, match="unknown metric 'acuracy'; nearest: accuracy"):
        score("acuracy", ["a"], ["a"])
    with pytest.raises(UnknownName, match="unknown metric 'f1_goood'; nearest: f1_good"):
        score("f1_goood", ["good"], ["good"], ("good", "bad"))


@pytest.mark.parametrize(
    ("kind", "labels", "metric"),
    [
        ("classification", ("a", "b"), "accuracy"),
        ("pair_classification", ("a", "b"), "accuracy"),
        ("token_classification", ("B-X", "O"), "entity_f1"),
        ("token_classification", ("NOUN", "VERB"), "token_accuracy"),
        ("generation", (), "exact_match"),
    ],
)
def test_default_metrics(kind, labels, metric):
    assert default_metric(kind, labels) == metric
    assert check_metric(metric, kind, labels) == metric


def made(kind, rows, metric="accuracy", labels=("a", "b")):
    return Task("t", kind, metric, rows, rows, rows, labels)


def test_majority_and_its_ties():
    rows = [{"text": str(i), "label": label} for i, label in enumerate("bcbcaa")]
    assert majority(made("classification", rows)) == "a"  # all equally frequent: first in sorted order
    assert majority(made("classification", [*rows, {"text": "x", "label": "c"}])) == "c"
    assert majority(made("classification", rows, metric="f1_b")) == "b"
    tagged = made("token_classification", [{"tokens": ["x", "y", "z"], "tags": ["O", "B-X", "O"]}])
    assert majority(tagged) == "O"
    assert constant("O", tagged, tagged.test) == [["O", "O", "O"]]
    texts = made("generation", [{"source": "1", "target": "x"}, {"source": "2", "target": "y", "targets": ["x", "z"]}])
    assert majority(texts) == "x"
    assert score("exact_match", constant("x", texts, texts.test), references("generation", texts.test)) == 1.0


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.sampled_from("abc"), min_size=2, max_size=30).filter(lambda labels: len(set(labels)) > 1),
    st.sampled_from(["accuracy", "macro_f1", "micro_f1", "macro_recall", "matthews", "f1_a"]),
)
def test_no_constant_scores_higher_than_the_majority(labels, metric):
    rows = [{"text": str(i), "label": label} for i, label in enumerate(labels)]
    task = made("classification", rows, metric, ("a", "b", "c"))

    def scored(label):
        return score(metric, constant(label, task, rows), labels, task.labels)

    best = max(scored(label) for label in "abc")
    assert math.isclose(scored(majority(task)), best, abs_tol=1e-12)
