"""Extractive answers: windows of long texts, where answers stand in them, and the best span that there may be."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from tests.fit.tiny import QUICK, WORDS, backbone, plan, task

from deltatune.data.task import Row
from deltatune.delta.adapted import Adapted
from deltatune.errors import TaskError
from deltatune.heads.base import Batch, collate
from deltatune.heads.choose import head_for
from deltatune.heads.span import ExtractiveSpan, Window
from deltatune.training.evaluate import predict
from deltatune.training.fit import fit_plans

LIMIT = 32


def row(number: int, at: int, answer: int = 2) -> Row:
    """A text of so many different words, and a span of it."""
    context = "  ".join(WORDS[:number])
    text = "  ".join(WORDS[at : at + answer])
    return {"context": context, "question": "w80 w81", "answers": [{"text": text, "start": context.index(text)}]}


def head_of(family: str = "bert") -> ExtractiveSpan:
    head = head_for(task("extractive_span"), backbone(family), 0)
    assert isinstance(head, ExtractiveSpan)
    return head


def windows(one: Row, family: str = "bert", limit: int = LIMIT) -> list[Window]:
    (example,) = head_of(family).encode([one], backbone(family), limit)
    return [w for w in example.sequences if isinstance(w, Window)]


@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "gpt2"])
def test_windows_cover_a_long_text_and_overlap(family: str) -> None:
    found = windows(row(70, 40), family)
    assert len(found) > 2 and all(len(w.ids) <= LIMIT for w in found)
    seen = [[w.context[slice(*w.offsets[at])] for at in w.inside] for w in found]
    assert list(dict.fromkeys(word for words in seen for word in words)) == list(WORDS[:70])
    assert all(len({*a} & {*b}) == LIMIT // 4 for a, b in itertools.pairwise(seen))
    tokens = backbone(family).processor
    assert [tokens.convert_ids_to_tokens(w.ids[w.inside[0]]) for w in found] == [words[0] for words in seen]
    assert len(windows(row(9, 3), family)) == 1


def test_an_answer_is_learnt_in_every_window_that_holds_it_whole() -> None:
    held = []
    for at in range(69):
        found = windows(row(70, at))
        said = []
        for w in found:
            firsts, lasts = w.target
            assert len(firsts) == len(lasts) <= 1
            if firsts:
                span = w.context[w.offsets[min(firsts)][0] : w.offsets[min(lasts)][1]]
                assert span.split() == [WORDS[at], WORDS[at + 1]]
            said.append(bool(firsts))
        held.append(sum(said))
    assert set(held) == {1, 2}


def test_an_answer_longer_than_what_windows_share_may_teach_nothing_and_harms_nothing() -> None:
    on, head = backbone(), head_of()
    examples = head.encode([row(70, 5, 30), row(70, 40)], on, LIMIT)
    assert all(w.target == (set(), set()) for w in examples[0].sequences)
    losses = []
    for some in (examples, examples[1:], examples[:1]):
        batch = collate(some, on)
        losses.append(float(head.loss(on.trunk(**batch.inputs).last_hidden_state, batch, on).detach()))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[1] > 0 and losses[2] == 0.0


def test_a_long_question_is_cut_and_leaves_room_for_the_text() -> None:
    long = {**row(40, 20), "question": " ".join(WORDS[40:80])}
    found = windows(long)
    assert all(len(w.ids) <= LIMIT and len(w.inside) >= LIMIT // 2 for w in found)
    assert any(w.target[0] for w in found)


def by_hand(scores: torch.Tensor, example: Window, longest: int) -> tuple[str, float]:
    """The best span by trying all of them, its share among starts times that among ends of all windows."""
    starts, ends, spans = [], [], []
    for n, w in enumerate(example.sequences):
        assert isinstance(w, Window)
        starts += [scores[n, at, 0].exp() for at in w.inside]
        ends += [scores[n, at, 1].exp() for at in w.inside]
        for i, first in enumerate(w.inside):
            for last in w.inside[i : i + longest]:
                text = w.context[w.offsets[first][0] : w.offsets[last][1]]
                spans.append((float(scores[n, first, 0] + scores[n, last, 1]), text))
    best, text = max(spans)
    return text, float(torch.tensor(best).exp() / sum(starts) / sum(ends))


@pytest.mark.parametrize("longest", [1, 3, 40])
def test_the_prediction_is_the_best_of_all_spans_that_there_may_be(longest: int) -> None:
    on = backbone()
    head = ExtractiveSpan(on.width, longest)
    examples = head.encode([row(70, 5), row(10, 3), row(33, 5)], on, LIMIT)
    batch = collate(examples, on)
    for seed in range(5):
        scores = 3 * torch.randn(len(batch.sequences), batch.length, 2, generator=torch.Generator().manual_seed(seed))
        texts, sure = head.decode(scores, batch)
        at = 0
        for example, text, certain in zip(examples, texts, sure, strict=True):
            assert isinstance(example, Window)
            expected, share = by_hand(scores[at : at + len(example.sequences)], example, longest)
            at += len(example.sequences)
            assert text == expected and certain == pytest.approx(share, rel=1e-4)
            assert len(text.split()) <= longest


def test_the_loss_is_the_share_of_the_gold_ends_among_all_windows() -> None:
    on, head = backbone(), head_of()
    (example,) = head.encode([row(70, 21)], on, LIMIT)
    batch = Batch(collate([example], on).inputs, [example])
    hidden = on.trunk(**batch.inputs).last_hidden_state.detach()
    scores = head.scores(hidden, batch, on).detach()
    expected = 0.0
    for end in (0, 1):
        inside = [(n, at) for n, w in enumerate(windows(row(70, 21))) for at in w.inside]
        gold = [(n, at) for n, w in enumerate(windows(row(70, 21))) for at in w.target[end]]
        assert len(gold) == 2
        total = sum(float(scores[n, at, end].exp()) for n, at in inside)
        expected -= torch.tensor(sum(float(scores[n, at, end].exp()) for n, at in gold) / total).log().item() / 2
    assert float(head.loss(hidden, batch, on).detach()) == pytest.approx(expected, rel=1e-4)


def test_it_learns_from_long_texts_by_windows() -> None:
    rows = [row(70, at) | {"question": f"w{at}"} for at in (2, 20, 35, 60)]
    few = dataclasses.replace(task("extractive_span"), train=rows, dev=rows, test=rows)
    settings = dataclasses.replace(
        QUICK, steps=60, batch=4, evaluations=2, lr=3e-3, head_lr=2e-2, probe=False, max_length=LIMIT
    )
    (trained,) = fit_plans(on := backbone(), [plan("full", few, 0, settings)])
    assert trained.metrics["test"] == {"squad_f1": 1.0}
    again = predict(Adapted(on, [trained.delta], verify=False), trained.delta, trained.delta.head, rows[:1], LIMIT)  # type: ignore[arg-type]
    assert again.values == trained.test.values[:1]  # type: ignore[union-attr]


def test_what_cannot_be_windowed_is_refused() -> None:
    with pytest.raises(TaskError, match="max_length is 20: expected 32 or more"):
        windows(row(9, 3), limit=20)
