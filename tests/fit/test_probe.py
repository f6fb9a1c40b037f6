"""The start of a head: a logistic regression on the frozen features, as scikit-learn finds it on the same features."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tests.fit.tiny import backbone, jobs_of, plan, same_bits, task

from deltatune.heads.choose import head_for
from deltatune.training import states as module
from deltatune.training.probe import features, probe
from deltatune.training.states import STRENGTHS


def pieces(on, data):
    head = head_for(data, on, 0)
    return head, *(head.encode(rows, on, 64) for rows in (data.train, data.dev))


def by_hand(on, data):
    """Mean-pooled features of each row by itself, without padding, and the classes."""
    made = []
    for rows in (data.train, data.dev):
        x = []
        for row in rows:
            texts = [row["text"], *([row["text_b"]] if "text_b" in row else [])]
            with torch.no_grad():
                inputs = on.processor(*texts, return_tensors="pt")
                x.append(on.trunk(**inputs).last_hidden_state.mean(dim=1)[0].numpy())
        made.append((np.stack(x), np.array([data.labels.index(row["label"]) for row in rows])))
    return made


@pytest.mark.parametrize("kind", ["classification", "pair_classification"])
def test_it_equals_scikit_learn_on_the_features(kind):
    on, data = backbone(), task(kind)
    head, train, dev = pieces(on, data)
    found = probe(head, train, dev, on)
    head.load_state_dict(found)
    (x, y), (x_dev, y_dev) = by_hand(on, data)
    centre, spread = x.mean(axis=0), x.std(ddof=1)  # one spread for all features
    models = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for strength in STRENGTHS:
            models.append(LogisticRegression(C=strength, max_iter=60).fit((x - centre) / spread, y))
    guesses = [model.predict_proba((x_dev - centre) / spread) for model in models]
    losses = [-np.log(guess[range(len(y_dev)), y_dev]).mean() for guess in guesses]
    assert max(losses) - min(losses) > 0.01
    ours = head.linear(torch.tensor(x_dev)).softmax(dim=-1).detach().numpy()
    assert ours == pytest.approx(guesses[losses.index(min(losses))], abs=1e-4)


def test_features_are_in_the_order_of_the_rows_and_do_not_depend_on_how_they_are_batched(monkeypatch):
    on, data = backbone(), task()
    head, train, _ = pieces(on, data)
    seen = features(head, train, on)
    x, y = seen.x, seen.y
    expected = by_hand(on, data)[0]
    assert x.numpy() == pytest.approx(expected[0], abs=1e-5) and y.tolist() == expected[1].tolist()
    monkeypatch.setattr(module, "TOKENS", 1)
    assert torch.allclose(features(head, train, on).x, x, atol=1e-5)


def test_tokens_give_a_vector_for_each_word_that_is_counted():
    on, data = backbone(), task("token_classification")
    head, train, dev = pieces(on, data)
    seen = features(head, train, on)
    x, y = seen.x, seen.y
    assert len(x) == len(y) == sum(len(row["tokens"]) for row in data.train)
    assert [data.labels[i] for i in y.tolist()] == [tag for row in data.train for tag in row["tags"]]
    with torch.no_grad():
        one = on.trunk(**on.processor(" ".join(data.train[0]["tokens"]), return_tensors="pt")).last_hidden_state[
            0, 1:-1
        ]
    assert torch.allclose(x[: len(one)], one, atol=1e-5)
    before = float((head.linear(x).argmax(dim=1) == y).float().mean())
    head.load_state_dict(probe(head, train, dev, on))
    assert float((head.linear(x).argmax(dim=1) == y).float().mean()) > max(before, 0.7)


def test_a_label_that_train_lacks_is_the_least_likely_and_does_no_harm():
    on, data = backbone(), task(rows=60)
    kept = dataclasses.replace(data, train=[row for row in data.train if row["label"] != "fine"])
    head, train, dev = pieces(on, kept)
    found = probe(head, train, dev, on)
    unseen = kept.labels.index("fine")
    assert found["linear.weight"][unseen].abs().max() == 0
    assert found["linear.bias"][unseen] < found["linear.bias"].min() + 1e-6
    assert torch.isfinite(found["linear.weight"]).all()
    (job,) = jobs_of([plan("lora", kept)], on)  # it trains from there
    assert torch.equal(job.head.linear.weight, found["linear.weight"])


def test_where_no_row_of_dev_has_a_label_of_train_there_is_nothing_to_choose_by():
    on, data = backbone(), task(rows=60)
    kept = dataclasses.replace(
        data,
        train=[row for row in data.train if row["label"] != "fine"],
        dev=[row for row in data.dev if row["label"] == "fine"],
    )
    assert kept.dev and probe(*pieces(on, kept), on) is None


def test_one_class_alone_starts_at_random():
    on, data = backbone(), task()
    one = dataclasses.replace(data, train=[row for row in data.train if row["label"] == "good"])
    assert probe(*pieces(on, one), on) is None
    (job,) = jobs_of([plan("lora", one)], on)
    assert float(job.head.linear.weight.detach().std()) == pytest.approx(0.02, rel=0.4)


def test_it_is_deterministic_and_the_same_for_every_seed_and_method():
    on, data = backbone(), task()
    jobs = jobs_of([plan("lora", data, 0), plan("adapter", data, 1)], on)
    (again,) = jobs_of([plan("bitfit", data, 5)], backbone())
    assert same_bits(jobs[0].head.state_dict(), jobs[1].head.state_dict())
    assert same_bits(jobs[0].head.state_dict(), again.head.state_dict())


def test_without_it_a_head_starts_at_random_by_its_seed():
    jobs = jobs_of([plan("lora", task(), seed, probe=False) for seed in (0, 1)], backbone())
    (again,) = jobs_of([plan("adapter", task(), 0, probe=False)], backbone())
    assert not torch.equal(jobs[0].head.linear.weight, jobs[1].head.linear.weight)
    assert torch.equal(jobs[0].head.linear.weight, again.head.linear.weight)
    assert jobs[0].head.linear.bias.abs().max() == 0


def test_a_head_without_parameters_has_none():
    on, data = backbone("llama"), task("generation")
    head = head_for(data, on, 0)
    assert probe(head, head.encode(data.train, on, 64), head.encode(data.dev, on, 64), on) is None
