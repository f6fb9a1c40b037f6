"""Which delta to take: chosen on dev within a budget, test opened once, the same for the same seed."""

from __future__ import annotations

import dataclasses
import math
import time

import pytest
from tests.fit.tiny import QUICK, backbone, jobs_of, plan, same_bits, task

from deltatune.data.task import Task
from deltatune.errors import TaskError, UserError
from deltatune.studies.result import build_result
from deltatune.studies.schema import check_result
from deltatune.training import evaluate as evaluating
from deltatune.training import fit as fitting
from deltatune.training import tune as tuning
from deltatune.training.budget import Budget, Effort, Means, Shape
from deltatune.training.engine import Engine, train
from deltatune.training.tune import Tuned, _stretched, candidates, tune

SETTINGS = dataclasses.replace(QUICK, steps=None, lr=None)


def search(on_task: Task | None = None, steps: int = 300, seeds: int = 2, **options) -> Tuned:
    family = options.pop("family", "bert")
    return tune(backbone(family), on_task or task(), Budget(steps=steps), settings=SETTINGS, seeds=seeds, **options)


def facts(tuned: Tuned):
    rows = [[c.label, c.lr, c.trainable, c.rung, c.steps, c.dev, c.state] for c in tuned.candidates]
    runs = [
        [t.plan.name, t.metrics, [dataclasses.asdict(p) for p in t.curve], t.steps, t.best_step] for t in tuned.trained
    ]
    return rows, runs, tuned.chosen, tuned.second, tuned.left_out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10m", Budget(seconds=600)), ("90s", Budget(seconds=90)), ("1.5h", Budget(seconds=5400)),
        ("2 min", Budget(seconds=120)), ("2000steps", Budget(steps=2000)), (" 1 step ", Budget(steps=1)),
    ],
)  # fmt: skip
def test_a_budget_is_a_time_or_steps(text, expected):
    assert Budget.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "10", "m", "-5m", "0s", "0steps", "1.5steps", "1e3s", "10 parsecs", "infs", "5m5s"]
)
def test_what_is_no_budget_is_refused_in_one_line(text):
    with pytest.raises(
        UserError, match=r"^budget .*: expected a time such as 10m, 90s or 1h, or steps such as 2000steps$"
    ):
        Budget.parse(text)


def test_the_same_seed_gives_the_same_search_and_another_seed_another():
    one, two, other = search(), search(), search(seed=5)
    assert facts(one) == facts(two)
    assert all(same_bits(a.delta.tensors(), b.delta.tensors()) for a, b in zip(one.trained, two.trained, strict=True))
    assert [run[2] for run in facts(one)[1]] != [run[2] for run in facts(other)[1]]
    assert sorted({t.plan.seed for t in one.trained}) == [0, 1]
    assert sorted({t.plan.seed for t in other.trained}) == [5, 6]


@pytest.mark.parametrize(("steps", "seeds"), [(300, 1), (400, 3), (600, 2)])
def test_steps_over_all_trainings_stay_within_the_budget(steps, seeds, monkeypatch):
    done, own = [], Engine._update
    monkeypatch.setattr(Engine, "_update", lambda self, job: (done.append(job.name), own(self, job)))
    search(steps=steps, seeds=seeds)
    assert 0.7 * steps < len(done) <= steps


@pytest.mark.parametrize(("steps", "rates", "seeds"), [(450, 3, 3), (370, 2, 3), (330, 1, 3), (250, 1, 2), (150, 1, 1)])
def test_a_small_budget_costs_rates_and_then_seeds_before_it_costs_steps(steps, rates, seeds):
    tuned = search(steps=steps, seeds=3)
    assert len(tuned.candidates) == 7 * rates and len({t.plan.seed for t in tuned.trained}) == seeds
    # 40 rows in batches of four, six times over, are worth the time: half of that at least.
    assert all(t.steps >= 30 for t in tuned.trained)


@pytest.mark.parametrize(("steps", "specs", "finalists"), [(150, 7, 2), (130, 4, 2), (100, 2, 1), (40, 2, 1)])
def test_a_very_small_budget_costs_candidates_and_says_which(steps, specs, finalists):
    on, data = backbone(), task()
    tuned = tune(on, data, Budget(steps=steps), settings=SETTINGS, seeds=3)
    assert len(tuned.candidates) == specs and len(tuned.left_out) == 7 - specs
    assert all(reason.endswith(": the budget does not pay for it") for reason in tuned.left_out)
    assert len({t.plan.label for t in tuned.trained}) == finalists + 1 and (tuned.second is None) == (finalists == 1)
    assert all(t.steps >= 30 for t in tuned.trained)
    result = build_result(on, data, tuned.trained, command="", tuned=tuned)
    check_result(result)
    apart = result["sentence"].partition("told apart")[2]
    named = [c.label for c in tuned.candidates if c.label in apart]
    assert finalists == 2 or not named, "a candidate without a finalist's seeds was compared"


def test_looks_at_dev_take_a_tenth_of_the_time_and_never_too_few_rows():
    shape = Shape(2, 1, 1, 1 / 3)
    means = Means(120.0, 90.0, 0.2, 2.0, 5.0, 1 / 3)
    assert shape.looks == 7 and means.rows(shape, 500) == int(500 * 9 / 14)
    assert dataclasses.replace(means, look=0.1).rows(shape, 500) == 500
    assert dataclasses.replace(means, look=90.0).rows(shape, 500) == 100
    assert dataclasses.replace(means, look=90.0).rows(shape, 60) == 60
    assert Means(300, 300).rows(shape, 500) == 500
    spent = means.horizon(shape, 500) * shape.trainings * means.step
    assert spent + means.last(shape) + shape.looks * means.look * means.rows(shape, 500) / 500 == pytest.approx(90)


@pytest.mark.parametrize(
    ("left", "whole", "steps"), [(70.0, 500, 62), (1000.0, 50, 50), (0.0, 500, 11), (-5.0, 500, 11)]
)
def test_the_last_rung_is_as_long_as_there_is_time_for(left, whole, steps):
    on = backbone()
    jobs = jobs_of([plan("lora"), plan("adapter"), plan("head")], on)
    for job, step, state in zip(jobs, (10, 5, 10), ("running", "stopped", "running"), strict=True):
        job.step, job.state, job.steps = step, state, 30
    # One candidate and the baseline at a third of the cost: (70 + 10 + 10 / 3) / (1 + 1 / 3) = 62.5.
    assert _stretched(jobs, Shape(2, 1, 1, 1 / 3), left, whole) == steps


def test_what_is_announced_is_the_search_and_not_all_candidates_to_their_end(monkeypatch):
    said, done, own = [], [], Engine._update
    monkeypatch.setattr(Engine, "_update", lambda self, job: (done.append(job.name), own(self, job)))
    search(steps=300, announce=said.append)
    # A batch is four rows of three to nine words and two marks, padded to the longest.
    assert 4 * 5 < said[0].tokens / len(done) <= 4 * 11
    tune(backbone(), task(), Budget(seconds=3), settings=SETTINGS, seeds=1, announce=said.append)
    assert said[1].seconds <= 3


def test_a_rung_keeps_the_best_third_on_dev_and_they_go_on_from_where_they_stand(monkeypatch):
    rivals, seen = [], {}

    def listen(jobs, event):
        rivals[:] = rivals or jobs[:-1]
        for job in jobs:
            if event == "evaluated" and job.curve:
                seen.setdefault(job.name, {})[job.step] = job.curve[-1].dev

    tuned = search(steps=700, seeds=1, listener=listen)
    number = len(tuned.candidates)
    assert number == 21 == len(rivals)
    horizon = rivals[0].steps
    first, second = math.ceil(horizon / 9), math.ceil(horizon / 3)
    at_first = {job.name: seen[job.name][first] for job in rivals}
    on = [job.name for job in rivals if second in seen[job.name]]
    finalists = {t.plan.name for t in tuned.trained}
    # A finalist of another spec is trained to its end after the rungs.
    on = [name for name in on if name not in finalists or at_first[name] >= sorted(at_first.values())[-7]]
    assert len(on) == 7
    assert min(at_first[name] for name in on) >= max(v for name, v in at_first.items() if name not in on)
    for job in rivals:
        assert [point.step for point in job.curve] == sorted({point.step for point in job.curve})
        assert job.curve[0].step == first  # never begun again


def test_the_choice_is_the_best_mean_on_dev_over_the_seeds_and_the_finalists_are_of_two_specs():
    tuned = search(steps=600, seeds=3)
    labels = [label for label in dict.fromkeys(t.plan.label for t in tuned.trained) if label != "head"]
    assert {tuned.chosen, tuned.second} == set(labels) and len(labels) == 2
    means = {one: sum(t.dev_score for t in tuned.trained if t.plan.label == one) / 3 for one in labels}
    assert means[tuned.chosen] >= means[tuned.second]
    specs = {c.label: c.spec for c in tuned.candidates}
    assert specs[tuned.chosen] != specs[tuned.second]
    assert [c.label for c in tuned.candidates if c.state == "chosen"] == [tuned.chosen]
    assert [t.plan.label for t in tuned.trained].count("head") == 3  # beside it, from the same seeds


def test_labels_of_the_test_split_have_no_part_in_the_choice():
    data = task()
    turned = dataclasses.replace(data, test=[{**row, "label": other["label"]} for row, other in
                                             zip(data.test, [*data.test[5:], *data.test[:5]], strict=True)])  # fmt: skip
    turned.__dict__["fingerprint"] = data.fingerprint  # or else the rows would come in another order
    one, other = search(data), search(turned)
    assert [t.metrics["test"] for t in one.trained] != [t.metrics["test"] for t in other.trained]
    assert facts(one)[0] == facts(other)[0] and (one.chosen, one.second) == (other.chosen, other.second)
    assert all(same_bits(a.delta.tensors(), b.delta.tensors()) for a, b in zip(one.trained, other.trained, strict=True))


class Watched(list):
    """Rows that say when they are read."""

    def __init__(self, rows, heard):
        super().__init__(rows)
        self.heard = heard

    def __iter__(self):
        self.heard.append("read")
        return super().__iter__()

    def __getitem__(self, index):
        self.heard.append("read")
        return super().__getitem__(index)


def test_the_test_split_is_opened_once_when_all_training_is_done(monkeypatch):
    heard, own_update, own_predict = [], Engine._update, evaluating.predict_many
    data = dataclasses.replace(task(), test=Watched(task().test, heard))
    data.__dict__["fingerprint"] = task().fingerprint
    monkeypatch.setattr(Engine, "_update", lambda self, job: (heard.append("step"), own_update(self, job)))

    def predict(adapted, members, rows, *more):
        heard.append(("predict", len(members)) if rows is data.test else "dev")
        return own_predict(adapted, members, rows, *more)

    for module in (evaluating, fitting):
        monkeypatch.setattr(module, "predict_many", predict)
    tuned = search(data)
    last_step = len(heard) - heard[::-1].index("step")
    assert "read" in heard and heard.index("read") >= last_step
    assert [event for event in heard if isinstance(event, tuple)] == [("predict", len(tuned.trained))]
    assert len(tuned.trained) == 6  # two finalists and the baseline, two seeds: no other candidate saw it


def test_no_candidate_is_larger_than_the_limit_and_it_is_said_which_were():
    whole, none_out = candidates(backbone())
    assert len(whole) == 21 and none_out == []
    sizes = sorted({c.trainable for c in whole})
    kept, out = candidates(backbone(), sizes[2])
    assert {c.trainable for c in kept} == set(sizes[:3])
    assert len(out) == 7 - len({c.label.rsplit(" lr=")[0] for c in kept})
    assert all(f"parameters, more than {sizes[2]:,}" in one for one in out)
    tuned = search(max_params=sizes[2])
    assert all(t.delta.trainable() <= sizes[2] for t in tuned.trained) and tuned.left_out == out
    with pytest.raises(
        UserError, match=r"no candidate fits tiny-bert within --max-params 5: adapter: 6,368 parameters, more"
    ):
        search(max_params=5)


def test_a_candidate_that_the_backbone_has_no_site_for_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(tuning, "SPACE", ("lora", 'prefix(at="cross")', "bitfit"))
    tuned = search()
    assert {c.label.rsplit(" lr=")[0] for c in tuned.candidates} == {"lora", "bitfit"}
    assert len(tuned.left_out) == 1 and tuned.left_out[0].startswith('prefix(at="cross"): ')
    monkeypatch.setattr(tuning, "SPACE", ('prefix(at="cross")',))
    with pytest.raises(UserError, match="^no candidate fits tiny-bert: prefix"):
        search()


def test_candidates_that_diverge_fail_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(tuning, "LADDER", (Effort(7, (1.0, 1e32), 1.0),))
    tuned = search()
    wild = [c for c in tuned.candidates if c.lr > 1e20]
    assert wild and all(c.state == "failed" and c.rung == 0 for c in wild)
    assert "e+" not in tuned.chosen and all(t.state != "nan" for t in tuned.trained)
    monkeypatch.setattr(tuning, "LADDER", (Effort(7, (1e32,), 1.0),))
    with pytest.raises(UserError, match="every candidate diverged"):
        search()


def test_rates_are_multiples_of_each_methods_own():
    found, _ = candidates(backbone())
    for spec in {c.spec for c in found}:
        assert [c.lr / spec.lr for c in found if c.spec == spec] == pytest.approx([0.3, 1.0, 3.0])


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_a_split_without_rows_is_said_before_any_work(split, monkeypatch):
    monkeypatch.setattr(Engine, "step", lambda *_: pytest.fail("trained"))
    with pytest.raises(TaskError, match=f"has no {split} rows"):
        search(dataclasses.replace(task(), **{split: []}))
    with pytest.raises(TaskError, match=f"has no {split} rows"):
        fitting.fit_plans(backbone(), [plan("lora", dataclasses.replace(task(), **{split: []}))])


@pytest.mark.parametrize("kind", ["generation", "classification"])
def test_a_language_model_that_answers_in_words_is_the_baseline_as_it_is(kind):
    data = task(kind) if kind == "generation" else dataclasses.replace(task(kind), template="{text} Label:")
    tuned = search(data, family="llama", seeds=2)
    baseline = [t for t in tuned.trained if t.plan.label == "head"]
    assert len(baseline) == 2 and all(t.steps == 1 and t.delta.tensors() == {} for t in baseline)
    on = backbone("llama")
    check_result(build_result(on, data, tuned.trained, command="", tuned=tuned))


def test_a_budget_of_time_ends_a_search_that_would_take_far_longer():
    started = time.monotonic()
    settings = dataclasses.replace(SETTINGS, steps=100_000)
    tuned = tune(backbone(), task(), Budget(seconds=4), settings=settings, seeds=2)
    # Seconds are a machine's own affair; without the deadline this takes an hour.
    assert time.monotonic() - started < 60
    assert tuned.chosen in {t.plan.label for t in tuned.trained} and max(c.steps for c in tuned.candidates) < 50_000


def test_past_the_deadline_nothing_is_trained():
    on = backbone()
    (job,) = jobs_of([plan("lora")], on)
    engine = Engine([job], on)
    train(engine, deadline=time.monotonic() - 1)
    engine.close()
    assert job.step == 0 and job.curve == []
