"""The table for the console, the numbers in it and what it compares."""

from __future__ import annotations

import io
import json
import math
import re
from typing import Any

import pytest
from rich.console import Console
from tests.studies.sample_result import make_result

from deltatune.data.intervals import paired_interval
from deltatune.studies import formatting
from deltatune.studies.comparison import gain, ordered, shown_split
from deltatune.studies.formatting import Scale, scale_of
from deltatune.studies.schema import check_result
from deltatune.studies.table import summary_table


def printed(result: dict[str, Any], width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(summary_table(result))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_row_a_delta_the_chosen_first_the_baselines_last() -> None:
    result = make_result()
    _, body = re.split("─ *\n", printed(result))
    rows = [re.split(r" {2,}", line.strip()) for line in body.splitlines()[:-1] if line.strip()]
    names = [row[0] for row in rows]
    assert names[0] == "▸ lora(r=8, at=attn.{q,v})"
    assert names[-3:] == ["full", "head-only", "majority"] and len(names) == 10
    dev, test = result["summary"][0]["dev"], result["summary"][0]["test"]
    cells = rows[0]
    assert cells[1] == "74.5 k"
    assert cells[2] == f"{100 * dev['mean']:.1f} ± {100 * (dev['high'] - dev['mean']):.1f}"
    assert cells[3] == f"{100 * test['mean']:.1f} ± {100 * (test['high'] - test['mean']):.1f}"
    assert cells[4] == f"+{100 * (dev['mean'] - result['summary'][7]['dev']['mean']):.1f}"
    assert cells[5:] == ["42 s", "300 kB"]
    assert rows[-1] == ["majority", "0", "50.9", "50.9", "–", "–", "–"]


def test_brackets_are_not_markup_and_divergence_is_said() -> None:
    result = make_result()
    for item in (result["summary"][0], *result["runs"][:3]):
        item["delta"] = "[bold]x[/bold]"
    result["runs"][1].update(state="nan", metrics={"dev": {"accuracy": math.nan}})
    text = printed(result)
    assert "[bold]x[/bold]" in text
    assert "Diverged: [bold]x[/bold] (seed 1)." in " ".join(text.split())


def test_one_seed_is_said() -> None:
    assert "One seed" in printed(make_result(seeds=1))
    assert "Means over 3 seeds" in printed(make_result())


def test_gain_is_paired_by_seed_and_follows_the_metric() -> None:
    raw = make_result(seeds=4)
    result = check_result(raw)
    a, b = (
        [run["metrics"]["dev"]["accuracy"] or 0.0 for run in result["runs"] if run["delta"] == name]
        for name in ("bitfit", "head-only")
    )
    assert gain(result, "bitfit") == paired_interval(a, b)
    lower = check_result(json.loads(json.dumps(raw).replace('"accuracy"', '"perplexity"')))
    found = gain(lower, "bitfit")
    assert found and found.mean == pytest.approx(-paired_interval(a, b).mean)
    assert ordered(lower)[0]["delta"] == "lora(r=8, at=attn.{q,v})", "the chosen stays first"
    others = [row["dev"]["mean"] or 0.0 for row in ordered(lower)[1:7]]
    assert others == sorted(others)


def test_gain_without_common_seeds_has_no_interval() -> None:
    result = check_result(make_result())
    for run in result["runs"]:
        run["seed"] += 10 if run["delta"] == "head-only" else 0
    found = gain(result, "bitfit")
    assert found and found.low is None
    means = {row["delta"]: row["dev"]["mean"] or 0.0 for row in result["summary"]}
    assert found.mean == pytest.approx(means["bitfit"] - means["head-only"])
    assert gain(result, "bitfit", over="nothing") is None


def test_everything_is_compared_on_dev_unless_all_was_tested() -> None:
    raw = make_result()
    assert shown_split(check_result(raw)) == "dev"
    for row in raw["summary"]:
        row["test"] = row["dev"]
    assert shown_split(check_result(raw)) == "test"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (770, "770"), (1000, "1 k"), (8450, "8.45 k"), (999_499, "999 k"), (999_600, "1 M"),
     (22_713_216, "22.7 M"), (3_200_000_000_000, "3200 G")],
)  # fmt: skip
def test_counts(number: int, text: str) -> None:
    assert formatting.count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10.0 s"), (59.4, "59 s"), (59.6, "1 min"), (200, "3 min 20 s"), (3599.7, "1 h"),
     (7500, "2 h 5 min")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert formatting.duration(seconds) == text


def test_shares_sizes_and_norms() -> None:
    assert formatting.size(295_000) == "295 kB"
    assert [formatting.share(part, 22_713_216) for part in (0, 770, 74_498, 22_713_216)] == [
        "0 %", "0.0034 %", "0.33 %", "100 %",
    ]  # fmt: skip
    assert formatting.share(1, 0) == "–"
    assert [formatting.magnitude(value) for value in (None, 0.0, 0.004213, 0.57, 12.34, 1234.5)] == [
        "–", "0.00", "0.0042", "0.57", "12.3", "1234",
    ]  # fmt: skip


def test_scores_are_percent_only_where_they_are_fractions() -> None:
    fraction, perplexity = Scale("accuracy", percent=True), Scale("perplexity", percent=False)
    assert fraction.interval(0.931, 0.925, 0.937) == "93.1 ± 0.6"
    assert fraction.interval(0.931, None, None) == "93.1"
    assert [fraction.difference(value) for value in (0.042, -0.042, 0.0, -0.0001)] == ["+4.2", "−4.2", "0.0", "0.0"]
    assert Scale("macro_f1", percent=True).label == "macro f1, %"
    assert perplexity.score(12.3456) == "12.346" and not perplexity.descending
    raw = make_result()
    assert scale_of(check_result(raw)).percent
    raw["runs"][0]["metrics"]["dev"]["accuracy"] = 93.0
    assert not scale_of(check_result(raw)).percent
