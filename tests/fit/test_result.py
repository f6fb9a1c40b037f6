"""From trained deltas to a result: baselines beside it, the schema, the sentence, what lands in a folder."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import pytest
from tests.fit.tiny import backbone, plan, task

from deltatune.data.intervals import bootstrap_paired, interval
from deltatune.data.metrics import references, score
from deltatune.delta.delta import Delta
from deltatune.errors import OutputError, UserError
from deltatune.studies.result import build_result
from deltatune.studies.schema import check_result
from deltatune.studies.table import summary_table
from deltatune.studies.verbs import run_plans
from deltatune.training.evaluate import Predictions, predict
from deltatune.training.fit import Trained, fit_plans, majority_scores

KINDS = ("classification", "pair_classification", "token_classification", "generation")


def strict(data):
    """Through JSON that knows no NaN, and back."""
    return json.loads(json.dumps(data, allow_nan=False))


@pytest.mark.parametrize(
    ("family", "kind"), [*(("bert", kind) for kind in KINDS[:3]), *(("llama", kind) for kind in KINDS)]
)
def test_a_result_of_every_kind_fits_the_schema_and_has_its_baselines(family, kind):
    on, data = backbone(family), task(kind)
    runs = run_plans(on, [plan("lora", data, seed) for seed in (0, 1)], command="fit --it")
    (result,) = runs.results
    check_result(strict(result))
    summary_table(result)
    assert (result["task"]["kind"], result["command"], result["chosen"]) == (kind, "fit --it", "lora")
    assert result["backbone"]["fingerprint"] == on.fingerprint()["exact"] and result["backbone"]["dtype"] == "float32"
    (majority,) = result["baselines"]
    assert majority["name"] == "majority" and set(majority["metrics"]) == {"dev", "test"}
    rows = {row["delta"]: row for row in result["summary"]}
    if kind == "generation":
        assert set(rows) == {"lora"}
    else:
        assert set(rows) == {"lora", "head-only"} and rows["head-only"]["baseline"] and rows["head-only"]["seeds"] == 2
        assert f"beside it, head-only {100 * rows['head-only']['test']['mean']:.1f}, always" in result["sentence"]
    for run in result["runs"]:
        head = rows["head-only"]["test"]["mean"] if "head-only" in rows else None
        assert run["baseline"] == {"majority": majority["metrics"]["test"][data.metric], "head-only": head}
    assert [run["delta"] for run in runs.json()["runs"]] == ["lora", "lora"]  # what was asked for


def test_the_majority_scores_what_the_most_frequent_label_of_train_scores():
    data = task()
    ((label, _),) = Counter(row["label"] for row in data.train).most_common(1)
    said = majority_scores(data)
    for split in ("dev", "test"):
        rows = getattr(data, split)
        assert said[split] == {"accuracy": sum(row["label"] == label for row in rows) / len(rows)}
    assert set(majority_scores(data, open_test=False)) == {"dev"}


def test_a_summary_row_is_the_mean_with_its_t_interval_over_seeds():
    runs = run_plans(backbone(), [plan("adapter", task(), seed) for seed in (0, 1, 2)])
    row = runs.results[0]["summary"][0]
    for split in ("dev", "test"):
        values = [t.metrics[split]["accuracy"] for t in runs.trained]
        assert row[split] == pytest.approx(interval(values)._asdict())
        for t, value in zip(runs.trained, values, strict=True):
            predictions = getattr(t, split).values
            assert value == score("accuracy", predictions, references("classification", getattr(task(), split)))
    assert row["trainable"] == runs.trained[0].delta.trainable()
    assert runs.best.dev_score == max(t.dev_score for t in runs.trained) and runs.delta is runs.best.delta


def test_test_stays_shut_unless_it_is_opened():
    trained = fit_plans(backbone(), [plan("lora")], open_test=False)
    result = build_result(backbone(), task(), trained, command="")
    check_result(strict(result))
    assert set(trained[0].metrics) == {"dev"} and result["summary"][0]["test"] is None and result["examples"] == []
    assert set(result["baselines"][0]["metrics"]) == {"dev"} and "over 12 dev rows; one seed)" in result["sentence"]


def planted(label: str, right: list[bool], seed: int = 0) -> Trained:
    """A training that is right on the dev and test rows it is told to be, and wrong on the others."""
    data = task(name="planted")
    (made,) = fit_plans(backbone(), [plan(label, data, seed, steps=1, lr=1e-4)], open_test=True)

    def told(rows):
        return [row["label"] if hit else "no" for row, hit in zip(rows, right, strict=True)]

    for split in ("dev", "test"):
        values = told(getattr(data, split))
        setattr(made, split, Predictions(values, [1.0] * 12))
        made.metrics[split] = {"accuracy": sum(right) / 12}
    return made


NINE, EIGHT, NONE, ALL = [True] * 9 + [False] * 3, [True] * 8 + [False] * 4, [False] * 12, [True] * 12


def said(*trained: Trained) -> str:
    return build_result(backbone(), task(name="planted"), trained, command="")["sentence"]


def test_the_sentence_says_what_could_not_be_told_apart_and_which_baseline_is_better():
    assert not bootstrap_paired([float(x) for x in NINE], [float(x) for x in EIGHT]).excludes_zero
    lora, adapter, far = planted("lora", NINE), planted("adapter", EIGHT), planted("ia3", NONE)
    assert said(lora, adapter, far) == (
        "Take lora: 75.0 % accuracy on test (95 % interval 50.0 to 100.0 over 12 test rows; one seed), with 2,048 trained parameters (9.57% of tiny-bert) in "
        "0.0086 MB; beside it, always the same answer 8.3. On dev it could not be told apart from adapter."
    )
    assert said(lora, far).endswith("On dev it is told apart from all.")
    assert said(lora).endswith("beside it, always the same answer 8.3.")  # nothing else was trained
    full, head = planted("full", ALL), planted("head", EIGHT)
    assert said(lora, full, head).endswith(
        "beside it, full tuning 100.0, head-only 66.7, always the same answer 8.3. On dev it could not be told apart from "
        "full tuning, head-only."
    )
    weak, strong = planted("lora", [*NONE[:10], True, True]), planted("head", ALL)
    assert said(weak, strong).endswith(
        "On dev it is told apart from all. Better on dev, and no candidate of the choice: head-only."
    )


def test_over_seeds_the_sentence_has_the_interval():
    trained = [planted("lora", right, seed) for seed, right in enumerate((NINE, EIGHT, ALL))]
    low, high = (interval([9 / 12, 8 / 12, 1.0])[i] for i in (1, 2))
    assert f"(95 % interval {100 * low:.1f} to {100 * high:.1f} over 3 seeds)" in said(*trained)


def test_a_candidate_is_never_called_no_candidate_where_rows_and_metric_disagree():
    """Entity F1 puts the one first, whole rows the other."""
    data = dataclasses.replace(task(name="planted"), metric="macro_f1")
    lora, adapter = planted("lora", NONE), planted("adapter", ALL)
    for one, value in ((lora, 0.9), (adapter, 0.8)):
        one.plan = dataclasses.replace(one.plan, task=data)
        one.metrics = {split: {"macro_f1": value} for split in ("dev", "test")}
    sentence = build_result(backbone(), data, [lora, adapter], command="")["sentence"]
    assert sentence.endswith("On dev it could not be told apart from adapter.")


def test_fewer_parameters_win_where_dev_is_equal():
    result = build_result(
        backbone(), task(name="planted"), [planted("adapter", NINE), planted("ia3", NINE)], command=""
    )
    assert result["chosen"] == "ia3"


def test_two_tasks_of_the_same_rows_are_predicted_and_scored_each_in_its_own_way():
    on = backbone("llama")
    words = dataclasses.replace(task(), name="words", template="{text} Label:")
    answer = dataclasses.replace(task(), name="answer", template="Answer: {text}", metric="macro_f1")
    plans = [plan("lora", words), plan("lora", answer), plan("adapter", words, dev_rows=3, max_length=20)]
    together = fit_plans(on, plans)
    for one, t in zip(plans, together, strict=True):
        (alone,) = fit_plans(backbone("llama"), [one])
        assert t.metrics == alone.metrics and t.test.values == alone.test.values
        assert t.test.confidence == pytest.approx(alone.test.confidence, abs=1e-5)
        assert [p.dev for p in t.curve] == [p.dev for p in alone.curve]
    assert set(together[1].metrics["dev"]) == {"macro_f1"}


def test_several_runs_land_in_folders_of_their_own_and_predict_as_they_did(tmp_path):
    on, out = backbone(), tmp_path / "out"
    pair = task("pair_classification")
    plans = [plan("lora(r=2)", task(), 0), plan("adapter | bitfit", pair, 0), plan("adapter | bitfit", pair, 1)]
    runs = run_plans(on, plans, out=out)
    saved = [run["saved"] for run in runs.json()["runs"]]
    assert saved == [str(out / place) for place in (
        "classification/lora-r=2/0", "pair_classification/adapter-bitfit/0", "pair_classification/adapter-bitfit/1")]  # fmt: skip
    assert json.loads((out / "runs.json").read_text()) == strict(runs.json())
    for name in ("classification", "pair_classification"):
        result = check_result(json.loads((out / name / "result.json").read_text()))
        assert result["task"]["name"] == name and (out / name / "report.html").stat().st_size > 1000
    assert not (out / ".checkpoint").exists()
    from deltatune.delta.adapted import Adapted

    for place, t in zip(saved, runs.trained, strict=True):
        delta = Delta.load(place, on)
        made = predict(Adapted(on, [delta]), delta, delta.head, t.plan.task.test, 64)
        assert made.values == t.test.values and made.confidence == pytest.approx(t.test.confidence, abs=1e-6)
    with pytest.raises(OutputError, match="exists already and is not empty"):
        run_plans(on, plans, out=out)


def test_one_run_lands_in_the_folder_itself(tmp_path):
    runs = run_plans(backbone(), [plan("lora")], out=tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "delta.json", "delta.safetensors", "report.html", "result.json", "runs.json"
    ]  # fmt: skip
    assert runs.json()["runs"][0]["saved"] == str(tmp_path / "out")


def test_two_deltas_that_would_share_a_folder_are_refused_before_training(tmp_path):
    plans = [plan('lora(r=8, at="attn.q")'), plan('lora(r=8,at="attn.q")')]
    with pytest.raises(UserError, match="would both be saved in .*; leave one out"):
        run_plans(backbone(), plans, out=tmp_path / "out", listener=lambda *_: pytest.fail("trained"))
    with pytest.raises(UserError, match="is asked for twice; leave one out"):
        run_plans(backbone(), plans[:1] * 2, out=tmp_path / "out")
    with pytest.raises(UserError, match="nothing to fit"):
        run_plans(backbone(), [])
