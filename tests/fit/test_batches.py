"""A logical batch is a function of task, seed and step alone."""

from __future__ import annotations

from collections import Counter

from tests.fit.tiny import backbone, jobs_of, plan, task

from deltatune.training.engine import Engine


def rows(job, step):
    """The numbers of the training rows in a step's batch."""
    number = {id(example): i for i, example in enumerate(job.train)}
    return [number[id(example)] for example in job.logical_batch(step)]


def epoch(job, first, steps):
    return [row for step in range(first, first + steps) for row in rows(job, step)]


def test_every_row_comes_once_an_epoch_and_every_epoch_has_its_own_order():
    (job,) = jobs_of([plan("lora", batch=4)], backbone())  # 40 rows: 10 batches
    epochs = [epoch(job, first, 10) for first in (0, 10, 20)]
    assert all(sorted(one) == list(range(40)) for one in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])


def test_an_epoch_that_batches_do_not_divide_flows_into_the_next():
    (job,) = jobs_of([plan("lora", batch=6)], backbone())  # 40 rows: 6 batches and 4 rows
    stream = epoch(job, 0, 20)
    assert sorted(stream[:40]) == sorted(stream[40:80]) == sorted(stream[80:]) == list(range(40))
    assert all(len(rows(job, step)) == 6 for step in range(20))


def test_a_batch_larger_than_the_task_takes_whole_epochs():
    (job,) = jobs_of([plan("lora", batch=100)], backbone())
    assert Counter(Counter(rows(job, 0)).values()) == Counter({2: 20, 3: 20})


def test_method_rate_and_neighbours_do_not_change_it_and_the_seed_and_the_task_do():
    on, other = task(), task(name="another", seed=1)
    plans = [plan("lora", on, 0), plan("adapter", on, 0, lr=1e-4), plan("head", on, 0, probe=False),
             plan("lora", on, 1), plan("lora", other, 0)]  # fmt: skip
    lora, adapter, head, second, elsewhere = jobs_of(plans, backbone())
    drawn = [epoch(job, 0, 10) for job in (lora, adapter, head, second, elsewhere)]
    assert drawn[0] == drawn[1] == drawn[2]
    assert drawn[0] != drawn[3] and drawn[0] != drawn[4] and drawn[3] != drawn[4]
    (lonely,) = jobs_of(plans[:1], backbone())
    assert epoch(lonely, 0, 10) == drawn[0]
    # It does not depend on what was asked for before, nor in which order.
    assert rows(lora, 7) == drawn[0][28:32]


def test_the_engine_trains_on_the_logical_batches_at_their_own_length(monkeypatch):
    on = backbone()
    short, long = jobs_of(
        [plan("lora", task(name="short", longest=4)), plan("lora", task(name="long", longest=20))], on
    )
    seen = []
    for job in (short, long):
        own = type(job.head).loss

        def loss(hidden, batch, backbone, job=job, own=own):
            seen.append((job.name, list(batch.examples), hidden.shape[1]))
            return own(job.head, hidden, batch, backbone)

        monkeypatch.setattr(job.head, "loss", loss)
    engine = Engine([short, long], on)
    try:
        for step in range(3):
            batches = {job.name: job.logical_batch(step) for job in (short, long)}
            seen.clear()
            engine.step([short, long])
            assert {name: examples for name, examples, _ in seen} == batches
            for _, examples, length in seen:
                assert length == max(len(example.ids) for example in examples)
    finally:
        engine.close()
