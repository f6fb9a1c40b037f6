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


SHORT, LONG = task(name="short", longest=4), task(name="long", longest=20)
MIXED = [
    plan(delta, on, batch=2, tokens=100)
    for delta in ("lora", "adapter", "prompt(n=2)")
    for on in (SHORT, LONG, task(name="middle", longest=9))
]


def groups(family, plans=MIXED):
    on = backbone(family)
    jobs = jobs_of(plans, on)
    engine = Engine(jobs, on)
    found = [[job.plan for job in group] for group in engine.groups(jobs)]
    engine.close()
    assert sorted(p.name for group in found for p in group) == sorted(p.name for p in plans)
    return found


def test_where_padding_is_left_out_texts_of_all_lengths_share_a_physical_batch():
    found = groups("bert")
    prompted = ["prompt" in p.label for group in found for p in group]
    assert prompted == sorted(prompted)  # these need rows, so they stand apart
    first = found[0]
    assert {p.task.name for p in first} == {"short", "long", "middle"} and {p.label for p in first} == {
        "lora",
        "adapter",
    }
    assert [p.label for p in first] == sorted((p.label for p in first), reverse=True)  # like beside like


def test_elsewhere_texts_of_like_length_share_one():
    found = groups("t5", [p for p in MIXED if "prompt" not in p.label])
    order = [[{"short": 0, "middle": 1, "long": 2}[p.task.name] for p in group] for group in found]
    assert [max(one) for one in order] == sorted(max(one) for one in order)
    assert order[0].count(0) == 2  # both short ones before any long one


def test_a_physical_batch_keeps_to_its_tokens():
    for family in ("bert", "t5"):
        assert (
            len(groups(family))
            < len(MIXED)
            < 1 + len(groups(family, [plan(p.label, p.task, batch=2, tokens=1) for p in MIXED]))
        )
