"""The verbs of the public face: fit, fit_many, tune."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from torch import nn

from deltatune.backbone.html import grid
from deltatune.backbone.load import Backbone, load
from deltatune.compose.expression import parse
from deltatune.data.load import Source, load_task
from deltatune.data.task import Task
from deltatune.delta.delta import Delta
from deltatune.delta.files import is_saved
from deltatune.delta.method import Spec
from deltatune.errors import OutputError, UserError
from deltatune.studies.report import write_report
from deltatune.studies.result import build_result, label_of, planned_label
from deltatune.studies.schema import SCHEMA
from deltatune.studies.table import summary_table
from deltatune.studies.trackers import Tracker, tracking
from deltatune.training.budget import Budget
from deltatune.training.engine import Listener
from deltatune.training.estimate import Estimate
from deltatune.training.fit import Trained, fit_plans
from deltatune.training.job import Plan
from deltatune.training.settings import Settings
from deltatune.training.tune import tune as run_tune

Announce = Callable[[Estimate], None]
NO_BASELINE = ("generation", "preference")  # the bare backbone writes slowly, and prefers nothing to itself


@dataclass
class Runs:
    """Finished trainings and their results, one result per task.

    `best` is the training to take: of the chosen delta, the seed that is best on dev.
    """

    trained: list[Trained]
    results: list[dict[str, Any]]
    out: Path | None = None
    tables: list[Any] = field(default_factory=list)

    @property
    def best(self) -> Trained:
        """The best training of the first task's chosen delta."""
        if not self.trained:
            raise UserError("nothing was trained: this was a dry run")
        return best_of(self.trained, self.results[0])

    @property
    def delta(self) -> Delta:
        """The best training's delta."""
        return self.best.delta

    def json(self) -> dict[str, Any]:
        """Return the fixed keys of `--json`."""
        asked = {label_of(t) for t in self.trained}
        runs = [run for result in self.results for run in result["runs"] if run["delta"] in asked]
        made: dict[str, Any] = {"schema": SCHEMA, "runs": runs}
        if self.results and "candidates" in self.results[0]:
            made |= {"candidates": self.results[0]["candidates"], "chosen": self.results[0]["chosen"]}
        return made

    def __repr__(self) -> str:
        return "\n".join(result["sentence"] for result in self.results) or "a dry run"

    def _repr_html_(self) -> str:
        rows = [
            (row["delta"], f"{row['trainable']:,}", _percent(row["dev"]), _percent(row.get("test")))
            for result in self.results
            for row in result["summary"]
        ]
        return f"<p>{escape(repr(self))}</p>{grid(['delta', 'parameters', 'dev', 'test'], rows)}"


def _percent(interval: dict[str, float | None] | None) -> str:
    if not interval or interval["mean"] is None:
        return "–"
    half = "" if interval["low"] is None else f" ± {100 * (interval['mean'] - interval['low']):.1f}"
    return f"{100 * interval['mean']:.1f}{half}"


def best_of(trained: Sequence[Trained], result: dict[str, Any]) -> Trained:
    """Return the training of a result's chosen delta that is best on dev; any other if all are baselines."""
    mine = [t for t in trained if t.plan.task.name == result["task"]["name"]]
    of_chosen = [t for t in mine if label_of(t) == result["chosen"] and t.dev_score == t.dev_score]
    return max(of_chosen or mine, key=lambda t: t.dev_score if t.dev_score == t.dev_score else -1.0)


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    return list(range(seeds)) if isinstance(seeds, int) else list(seeds)


def fit(
    model: Backbone | nn.Module | str,
    delta: Spec | Delta | str,
    task: Source,
    *,
    seeds: int | Sequence[int] = 1,
    out: str | Path | None = None,
    track: Tracker | None = None,
    **settings: Any,
) -> Runs:
    """Fit one delta to one task from some seeds and print mean ± interval.

    `delta` is a spec, or a saved delta (or its folder) that is trained on from where it is. `track` logs every training
    as a run of its own: "tensorboard", "mlflow" or "wandb". `settings` are the fields of `Settings`. UserError for a
    setting, task or delta that does not fit.
    """
    return fit_many(model, [(delta, task)], seeds=seeds, out=out, track=track, **settings)


def fit_many(
    model: Backbone | nn.Module | str,
    pairs: Sequence[tuple[Spec | Delta | str, Source]],
    *,
    seeds: int | Sequence[int] = 1,
    out: str | Path | None = None,
    track: Tracker | None = None,
    **settings: Any,
) -> Runs:
    """Fit many (delta, task) pairs together, each from every seed, and print what came out. See `fit`."""
    place, made = Path(out) if out else None, make_settings(**settings)
    tasks = [load_task(task) for _, task in pairs]
    plans = [
        plan
        for (delta, _), task in zip(pairs, tasks, strict=True)
        for plan in plans_of(delta, task, _seeds(seeds), made)
    ]
    with tracking(track) as listener:
        runs = run_plans(load(model), plans, out=place, listener=listener, command="dt.fit_many(...)")
    print(runs)  # noqa: T201 (the notebook's and the script's answer)
    return runs


def plans_of(delta: Spec | Delta | str, task: Task, seeds: Sequence[int], settings: Settings) -> list[Plan]:
    """Return a plan for each seed of a spec, an expression, or a saved delta or its folder, to go on from there."""
    label, start = str(delta), delta if isinstance(delta, Delta) else None
    if isinstance(delta, str) and is_saved(delta):
        start = Delta.load(delta)
    elif isinstance(delta, Delta):
        label = f"{delta.spec} from {delta.name}"
    spec = start.spec if start is not None else parse(delta) if isinstance(delta, str) else delta
    assert not isinstance(spec, Delta)
    return [Plan(spec, task, seed, settings, label, start) for seed in seeds]


def make_settings(**fields: Any) -> Settings:
    """Make settings. UnknownName for a field that is none."""
    from deltatune.errors import UnknownName

    for name in fields:
        if name not in Settings.__dataclass_fields__:
            raise UnknownName("setting", name, Settings.__dataclass_fields__)
    return Settings(**fields)


def run_plans(
    backbone: Backbone,
    plans: Sequence[Plan],
    *,
    out: Path | None = None,
    listener: Listener | None = None,
    announce: Announce | None = None,
    dry_run: bool = False,
    command: str = "",
) -> Runs:
    """Train plans together and write what the command line promises.

    One run lands in `out`, several in `out/<task>/<delta>/<seed>` with `out/runs.json`, and a report for each task. The
    head-only baseline of each task is trained beside them and stands in the result, but is not saved. OutputError if
    `out` holds something else than this fit, unfinished.
    """
    if out is not None and not dry_run:
        check_out(out)
    saved = _places(out, plans) if out else {}
    beside = baselines_of(plans)
    everything = fit_plans(
        backbone,
        [*plans, *beside],
        folder=out if not dry_run else None,
        listener=listener,
        announce=announce,
        dry_run=dry_run,
    )
    trained = everything[: len(plans)]
    runs = Runs(trained, [], out)
    if dry_run:
        return runs
    for task in {t.plan.task.name: t.plan.task for t in trained}.values():
        mine = [t for t in everything if t.plan.task.name == task.name]
        runs.results.append(build_result(backbone, task, mine, command=command, saved=saved))
    runs.tables = [summary_table(result) for result in runs.results]
    if out:
        _write(runs, out, saved)
    return runs


def baselines_of(plans: Sequence[Plan]) -> list[Plan]:
    """Return a head-only plan for each task and seed of `plans` that has none, where one says something."""
    have = {(p.task.name, p.seed) for p in plans if p.spec == parse("head")}
    made: dict[tuple[str, int], Plan] = {}
    for plan in plans:
        key = (plan.task.name, plan.seed)
        if key not in have and plan.task.kind not in NO_BASELINE:
            settings = dataclasses.replace(plan.settings, lr=None)
            made.setdefault(key, Plan(parse("head"), plan.task, plan.seed, settings, "head"))
    return list(made.values())


def check_out(out: Path) -> None:
    """OutputError unless `out` is absent, empty, or an unfinished run of ours."""
    if out.is_file():
        raise OutputError(f"{out} is a file; expected a folder that does not exist yet")
    if out.is_dir() and any(out.iterdir()) and not (out / ".checkpoint").is_dir():
        raise OutputError(f"{out} exists already and is not empty; choose another --out or remove it")


def _places(out: Path, plans: Sequence[Plan]) -> dict[str, str]:
    """Return the folder of each plan by the plan's name. UserError if two would share one."""
    if len(plans) == 1:
        return {plans[0].name: str(out)}
    places: dict[str, str] = {}
    for plan in plans:
        label = re.sub(r"[^\w.=-]+", "-", planned_label(plan)).strip("-")
        place = str(out / plan.task.name / label / str(plan.seed))
        for other, taken in places.items():
            if taken == place and other != plan.name:  # a plan that is there twice is found by the fit
                raise UserError(f"{plan.name!r} and {other!r} would both be saved in {place}; leave one out")
        places[plan.name] = place
    return places


def _write(runs: Runs, out: Path, saved: dict[str, str]) -> None:
    from deltatune.delta.files import save_into

    for trained in runs.trained:
        save_into(trained.delta, Path(saved[trained.plan.name]))
    several = len(runs.results) > 1
    for result in runs.results:
        folder = out / result["task"]["name"] if several else out
        write_json(folder / "result.json", result)
        write_report(result, folder / "report.html")
    write_json(out / "runs.json", runs.json())
    clear_checkpoint(out)


def clear_checkpoint(out: Path) -> None:
    """Remove the state of a run that is finished."""
    import shutil

    shutil.rmtree(out / ".checkpoint", ignore_errors=True)


def write_json(file: Path, data: Any) -> None:
    """Write a JSON file whole or not at all. OutputError if it cannot be written."""
    from deltatune.training.checkpoint import whole_file

    with whole_file(file) as work, work.open("w", encoding="utf-8") as stream:
        json.dump(data, stream, indent=1, default=str)


def tune(
    model: Backbone | nn.Module | str,
    task: Source,
    *,
    budget: str = "10m",
    max_params: int | None = None,
    seeds: int = 3,
    seed: int = 0,
    out: str | Path | None = None,
    listener: Listener | None = None,
    announce: Announce | None = None,
    track: Tracker | None = None,
    command: str = "dt.tune(...)",
    **settings: Any,
) -> Runs:
    """Find the delta to take for a task within a budget (`"10m"`, or `"2000steps"`: then deterministic for a seed).

    Candidates train together and are halved on dev; test is looked at once. With `out`, the chosen delta is saved there
    with `result.json` and `report.html`, and a stopped search is resumed. `track` as in `fit`.
    """
    place = Path(out) if out else None
    if place:
        check_out(place)
    backbone, loaded = load(model), load_task(task)
    with tracking(track, listener) as heard:
        tuned = run_tune(
            backbone,
            loaded,
            Budget.parse(budget),
            settings=make_settings(**settings),
            max_params=max_params,
            seeds=seeds,
            seed=seed,
            folder=place,
            listener=heard,
            announce=announce,
        )
    draft = build_result(backbone, loaded, tuned.trained, command=command, tuned=tuned)
    best = best_of(tuned.trained, draft)
    saved = {best.plan.name: str(place)} if place else {}
    result = build_result(backbone, loaded, tuned.trained, command=command, tuned=tuned, saved=saved)
    runs = Runs(tuned.trained, [result], place, [summary_table(result)])
    if place:
        from deltatune.delta.files import save_into

        save_into(best.delta, place)
        write_json(place / "result.json", result)
        write_report(result, place / "report.html")
        clear_checkpoint(place)
    return runs
