"""Tags are repaired exactly as seqeval's lenient mode reads them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities
from tests.data.writing import write

from deltatune.data import load_task
from deltatune.data.tags import is_bio, strict
from deltatune.errors import TaskError

TAGS = st.lists(st.sampled_from(["O", "B-X", "I-X", "B-Y-Z", "I-Y-Z"]), min_size=1, max_size=12)


@settings(deadline=None)
@given(TAGS)
def test_repair_changes_no_entity_and_makes_strict_bio(tags):
    made = strict(tags, "here")
    assert get_entities(made) == get_entities(tags)
    assert all(before[2:] == tag[2:] for before, tag in zip(["O", *made], made, strict=False) if tag[0] == "I")
    assert strict(made, "here") == made


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("I-X I-X O I-Y", "B-X I-X O B-Y"),
        ("B-X I-Y", "B-X B-Y"),
        ("B-X E-X S-X S-X", "B-X I-X B-X B-X"),
        ("B-X L-X U-X I-X", "B-X I-X B-X B-X"),
        ("S-X E-X", "B-X B-X"),
    ],
)
def test_other_schemes_are_read_as_bio(tags, expected):
    assert strict(tags.split(), "here") == expected.split()


def test_repair_is_reported_and_a_malformed_tag_named(tmp_path):
    rows = [{"tokens": ["a", f"b{i}"], "tags": ["O", "B-X"]} for i in range(30)]
    found = load_task(write(tmp_path, "rows", [*rows[:29], {"tokens": ["c", "d"], "tags": ["I-X", "I-X"]}]))
    assert "1 row with tags that were not strict BIO repaired" in found.source
    with pytest.raises(TaskError, match=r"rows.jsonl: line 30: tag 2 is 'X'; expected O, B-TYPE or I-TYPE"):
        load_task(write(tmp_path, "rows", [*rows[:29], {"tokens": ["c", "d"], "tags": ["O", "X"]}]))


def test_what_is_bio():
    assert is_bio(["O", "B-X"]) and is_bio(["I-X"])
    assert not is_bio(["O", "NOUN", "BUT"])
