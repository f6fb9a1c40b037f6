"""Every training is a run of its own in each tracker, with its plan and its curve."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fit.tiny import QUICK, backbone, plan, task

from deltatune.errors import UnknownName, UserError
from deltatune.studies.trackers import tracking
from deltatune.training import tune as tuning
from deltatune.training.budget import Budget, Effort
from deltatune.training.fit import Trained, fit_plans

PLANS = [plan("lora(r=2)", task(), 0), plan("adapter(m=3)", task(), 1), plan("bitfit", task(), 2, lr=1e30, clip=1e30)]
Curve = dict[str, list[tuple[int, float]]]


def tracked(tracker: str) -> list[Trained]:
    heard: list[str] = []
    with tracking(tracker, lambda jobs, event: heard.append(event)) as listener:  # type: ignore[arg-type]
        made = fit_plans(backbone(), PLANS, listener=listener)
    assert "evaluated" in heard
    return made


def curve(trained: Trained) -> Curve:
    """What a run should have logged."""
    metric = f"dev/{trained.plan.task.metric}"
    points = trained.curve
    found = {
        "loss": [(p.step, p.loss) for p in points if math.isfinite(p.loss)],
        metric: [(p.step, p.dev) for p in points if p.dev is not None],
        "lr": [(p.step, p.lr) for p in points],
    }
    return {name: values for name, values in found.items() if values}


def agree(logged: Curve, trained: Trained) -> None:
    wanted = curve(trained)
    assert logged.keys() == wanted.keys()
    for name, values in wanted.items():
        assert [step for step, _ in logged[name]] == [step for step, _ in values]
        assert [value for _, value in logged[name]] == pytest.approx([value for _, value in values], rel=1e-5)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    made = tracked("tensorboard")
    folders = sorted((tmp_path / "tb").iterdir())
    assert len(folders) == len(PLANS)
    for trained in made:
        (folder,) = [f for f in folders if f"-{trained.plan.seed}-" in f.name]
        events = EventAccumulator(str(folder)).Reload()
        agree({tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}, trained)
        assert events.Tags()["tensors"] == ["plan/text_summary"]


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file://{tmp_path}/ml")
    made = tracked("mlflow")
    client = mlflow.MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("deltatune").experiment_id])
    assert len(runs) == len(PLANS)
    for trained in made:
        (run,) = [r for r in runs if r.info.run_name == trained.plan.name]
        assert run.data.params["delta"] == str(trained.plan.spec)
        assert run.info.status == ("FAILED" if trained.state == "nan" else "FINISHED")
        logged = {
            n: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, n)] for n in run.data.metrics
        }
        agree({name: sorted(values) for name, values in logged.items()}, trained)
    assert {t.state for t in made} == {"done", "nan"}


def test_a_broken_off_training_is_no_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file://{tmp_path}/ml")

    def stop(jobs: object, event: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), tracking("mlflow", stop) as listener:
        fit_plans(backbone(), PLANS[:1], listener=listener)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("deltatune").experiment_id])
    assert run.info.status == "FAILED"


def test_a_candidate_that_a_search_gives_up_has_not_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was trained as far as it was worth; what diverged is a failed run."""
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file://{tmp_path}/ml")
    monkeypatch.setattr(tuning, "SPACE", ("lora(r=2)", "bitfit", "ia3"))
    monkeypatch.setattr(tuning, "LADDER", (Effort(3, (1.0, 1e32), 1.0),))
    settings = dataclasses.replace(QUICK, steps=None, lr=None)
    with tracking("mlflow") as listener:
        tuned = tuning.tune(backbone(), task(), Budget(steps=80), settings=settings, seeds=1, listener=listener)
    client = mlflow.MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("deltatune").experiment_id])
    found = {(run.info.run_name.split("/")[1], run.info.status) for run in runs}
    wanted = {(c.label, "FAILED" if c.state == "failed" else "FINISHED") for c in tuned.candidates}
    assert {c.state for c in tuned.candidates} >= {"stopped", "failed", "chosen"}
    assert found == wanted | {("head", "FINISHED")}


def chunks(log: bytes) -> Iterator[bytes]:
    """Records of a log of LevelDB's form: blocks of 32 KiB; a chunk is crc [4], size [2], type [1], bytes."""
    whole, at, block = b"", 7, 32768  # after a header of 7 bytes
    while at + 7 <= len(log):
        if block - at % block < 7:
            at += block - at % block
            continue
        size, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        whole += log[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    made = tracked("wandb")
    wandb.teardown()
    names = {}
    for file in (tmp_path / "wandb").glob("offline-run-*/*.wandb"):
        steps, name = set(), ""
        for data in chunks(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            name = record.run.display_name or name
            if record.HasField("history"):
                steps.add(record.history.step.num)
        names[name] = steps
    assert names == {t.plan.name: {p.step for p in t.curve} for t in made}


def test_what_is_no_tracker_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownName, match="tensorboard"), tracking("tensorbored"):  # type: ignore[arg-type]
        pass
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match=r"pip install 'deltatune\[track\]'"), tracking("mlflow"):
        pass
