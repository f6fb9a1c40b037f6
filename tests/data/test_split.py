"""Splits are decided by the seed alone, stratified, and share no input."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.data.writing import reviews, write

from deltatune.data import SPLITS, load_task
from deltatune.errors import TaskError


def splits(task):
    return [getattr(task, split) for split in SPLITS]


def test_one_file_is_cut_80_10_10_stratified(tmp_path):
    found = load_task(write(tmp_path, "rows", reviews(200, ("a", "b", "c", "d"))))
    assert [len(rows) for rows in splits(found)] == [160, 20, 20]
    for rows in splits(found):
        assert set(Counter(row["label"] for row in rows).values()) == {len(rows) // 4}
    assert "cut into train, dev and test 80/10/10 by seed 0" in found.source


def test_each_label_keeps_its_share(tmp_path):
    found = load_task(write(tmp_path, "rows", reviews(200, ("a", "a", "a", "b"))))
    assert (
        Counter(row["label"] for row in found.test) == Counter(row["label"] for row in found.dev) == {"a": 15, "b": 5}
    )


def test_the_seed_decides(tmp_path):
    path = write(tmp_path, "rows", reviews(100))
    assert splits(load_task(path, seed=4)) == splits(load_task(path, seed=4))
    assert splits(load_task(path, seed=4)) != splits(load_task(path, seed=5))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 80), st.sampled_from("aaaaabbbc"), st.sampled_from(["", " ", "\n"])), max_size=120
    ),
    seed=st.integers(0, 3),
)
def test_no_input_stands_in_two_splits(rows, seed, tmp_path_factory):
    made = [{"text": f"text{space} {number}", "label": label} for number, label, space in rows]
    distinct = {" ".join(row["text"].split()) for row in made}
    path = write(tmp_path_factory.mktemp("leak"), "rows", made + reviews(40, ("a", "b", "c")))
    found = load_task(path, seed=seed)
    inputs = [{" ".join(row["text"].split()) for row in part} for part in splits(found)]
    assert sum(map(len, inputs)) == len(set.union(*inputs)) == sum(map(len, splits(found))) == len(distinct) + 40
    assert {row["label"] for part in splits(found)[1:] for row in part} <= {row["label"] for row in found.train}
    repeats = len(made) - len(distinct)
    assert (f"{repeats} row" in found.source) == bool(repeats)


def test_rare_labels_stay_in_train(tmp_path):
    rows = reviews(97) + [{"text": f"rare {i}", "label": f"rare {i}"} for i in range(3)]
    for seed in range(5):
        found = load_task(write(tmp_path, "rows", rows), seed=seed)
        assert {f"rare {i}" for i in range(3)} <= {row["label"] for row in found.train}


def test_the_only_row_of_a_label_stays_in_train_of_a_tiny_file(tmp_path):
    rows = [*reviews(7, ("a",)), {"text": "one", "label": "b"}, {"text": "two", "label": "c"}]
    found = load_task(write(tmp_path, "rows", rows))
    assert {row["label"] for row in found.train} == {"a", "b", "c"}


def test_too_few_rows_to_cut(tmp_path):
    with pytest.raises(
        TaskError, match=r"8 rows of distinct inputs with 2 labels are too few to cut dev and test from"
    ):
        load_task(write(tmp_path, "rows", reviews(8)))
    assert [len(rows) for rows in splits(load_task(write(tmp_path, "nine", reviews(9))))] == [3, 3, 3]


def test_a_folder_keeps_its_splits_and_says_what_overlaps(tmp_path):
    rows = reviews(60)
    for name, part in {"train": rows[:40], "validation": rows[40:50], "test": [*rows[50:], rows[0]]}.items():
        write(tmp_path / "mine", name, part, ".csv")
    found = load_task(tmp_path / "mine")
    assert splits(found) == [rows[:40], rows[40:50], [*rows[50:], rows[0]]]
    assert found.name == "mine"
    assert found.source.endswith("mine; 1 row of test with an input of train")


@pytest.mark.parametrize(("given_splits", "cut"), [(["test"], "dev"), (["dev"], "test")])
def test_a_split_that_a_folder_lacks_is_cut_from_train(given_splits, cut, tmp_path):
    write(tmp_path, "train", [*reviews(100), *reviews(100)[:7]])
    write(tmp_path, given_splits[0], [{"text": f"other {i}", "label": "good"} for i in range(5)])
    found = load_task(tmp_path)
    assert len(getattr(found, cut)) == 10 and len(found.train) == 90
    assert not {row["text"] for row in getattr(found, cut)} & {row["text"] for row in found.train}
    assert f"{cut} from train, a tenth of it, cut by seed 0; 7 rows that repeat" in found.source
    assert [row["text"] for row in getattr(found, given_splits[0])] == [f"other {i}" for i in range(5)]


def test_limited_is_the_head_of_one_shuffle(tmp_path):
    whole = load_task(write(tmp_path, "rows", reviews(200, ("a", "b", "c"))))
    small, larger = whole.limited(20, None, 5), whole.limited(50, None, 7)
    assert (len(small.train), len(small.dev), len(small.test)) == (20, 20, 5)
    assert larger.train[:20] == small.train and larger.test[:5] == small.test
    assert small.train != whole.train[:20]
    assert small.labels == whole.labels == ("a", "b", "c")
    assert small.fingerprint == whole.limited(20, None, 5).fingerprint != whole.fingerprint
    assert small.source.endswith("; limited to train 20, test 5")
    assert whole.limited(1000, None, 20) is whole
    with pytest.raises(TaskError, match="limit of dev is 0; expected 1 or more"):
        whole.limited(dev=0)
    assert load_task(whole, limit=5).fingerprint == whole.limited(5, 5, 5).fingerprint
