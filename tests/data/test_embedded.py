"""The embedded tasks: well formed, deterministic, balanced, without leaks, and not trivial."""

from __future__ import annotations

import ast
import gzip
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict

import pytest

from deltatune.data import FIELDS, INPUTS, SPLITS, embedded_tasks, load_task
from deltatune.data.cache import cache_folder, cached
from deltatune.data.check import check_words
from deltatune.data.metrics import check_metric
from deltatune.data.stdlib import entries
from deltatune.data.stdlib_tasks import PACKAGES, _sentence, _signature
from deltatune.data.tags import is_bio, strict

NAMES = sorted(embedded_tasks())
PROCEDURAL = [name for name in NAMES if name.startswith("proc_")]


def inputs(task, split):
    return [str([row[field] for field in INPUTS[task.kind]]) for row in getattr(task, split)]


def test_there_are_over_100_procedural_tasks_of_four_kinds():
    assert len(PROCEDURAL) > 100
    assert Counter(load_task(name).kind for name in PROCEDURAL).keys() == {
        "classification", "pair_classification", "token_classification", "generation"
    }  # fmt: skip
    assert all(line and "\n" not in line and "<" not in line for line in embedded_tasks().values())


@pytest.mark.parametrize("name", NAMES)
def test_an_embedded_task_is_well_formed(name):
    task = load_task(name)
    assert task.name == name and task.source
    found = {split: inputs(task, split) for split in SPLITS}
    for split, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not set(found[split]) & set(found[other]), (split, other)
    for split in SPLITS:
        for row in getattr(task, split):
            assert row.keys() == {*FIELDS[task.kind]}
            assert all(value and (not isinstance(value, str) or value.strip()) for value in row.values())
            if task.kind == "token_classification":
                assert len(row["tokens"]) == len(row["tags"]) and strict(row["tags"], name) == row["tags"]
    labels = {
        label for split in SPLITS for row in getattr(task, split) for label in row.get("tags", [row.get("label")])
    }
    assert task.labels == (() if task.kind == "generation" else tuple(sorted(labels)))
    assert is_bio(task.labels) == (task.kind == "token_classification")
    assert check_metric(task.metric, task.kind, task.labels) == task.metric
    check_words(task.kind, task.labels, task.template, task.verbalizer)


@pytest.mark.parametrize("name", PROCEDURAL)
def test_a_procedural_task_has_its_sizes_and_balance(name):
    task = load_task(name)
    assert [len(getattr(task, split)) for split in SPLITS] == [400, 100, 200]
    if task.kind.endswith("classification") and task.kind != "token_classification":
        for split in SPLITS:
            counts = Counter(row["label"] for row in getattr(task, split))
            assert counts.keys() == {*task.labels} and max(counts.values()) - min(counts.values()) <= 1


def test_no_slot_is_left_in_a_sentence():
    for name in PROCEDURAL:
        for row in load_task(name).test:
            for text in row.values():
                assert not re.search(r"[{}<>|\[\]]", " ".join(text)), (name, text)


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("proc_write_reverse_three", lambda s: " ".join(reversed(s.split()))),
        ("proc_write_sort_words", lambda s: " ".join(sorted(s.split()))),
        ("proc_write_sort_years", lambda s: " ".join(sorted(s.split(), key=int))),
        ("proc_write_initials", lambda s: " ".join(word[0] for word in s.split())),
        ("proc_write_last_word", lambda s: s.split()[-1]),
        ("proc_write_drop_first", lambda s: s.split(" ", 1)[1]),
    ],
)
def test_what_is_written_is_right(name, pairs):
    assert all(row["target"] == pairs(row["source"]) for row in load_task(name).test)


def test_counts_are_right():
    numbers = {"two": 2, "three": 3, "four": 4, "five": 5}
    for row in load_task("proc_count_all_animal").test:
        listed = re.split(r", | and ", row["text"].split(" saw ")[1])
        assert len(listed) == numbers[row["label"]]
    vehicle = {"bus", "car", "van", "tram", "lorry", "bicycle", "boat", "taxi", "train", "scooter"}
    for row in load_task("proc_count_vehicle").test:
        assert len(vehicle & set(re.findall(r"\w+", row["text"]))) == {"one": 1, **numbers}[row["label"]]


def test_orders_are_right():
    months = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ]
    for row in load_task("proc_order_month").test:
        first, second = (months.index(word) for word in re.findall(r"\w+", row["text"]) if word in months)
        assert row["label"] == ("first" if first < second else "second")


def test_comparisons_are_right():
    for row in load_task("proc_compare_height").test:
        a, relation, b = re.match(r"(\w+) is (taller|shorter) than (\w+)", row["text"]).groups()
        c, question, d = re.match(r"Is (\w+) (taller|shorter) than (\w+)", row["text_b"]).groups()
        assert {a, b} == {c, d} and a != b
        assert row["label"] == ("yes" if ((a, b) == (c, d)) == (relation == question) else "no")


def test_places_are_right():
    for name in ("two", "three", "four"):
        for row in load_task(f"proc_where_after_{name}").test:
            moves = dict(re.findall(r"(\w+) went to the (\w+)\.", row["text"]))
            assert moves[row["text_b"]] == row["label"]


def test_classes_of_procedural_tasks_are_not_told_by_length():
    task = load_task("proc_agreement_attractor")
    lengths = defaultdict(list)
    for row in task.train:
        lengths[row["label"]].append(len(row["text"].split()))
    means = [sum(found) / len(found) for found in lengths.values()]
    assert max(means) - min(means) < 0.5


def test_stdlib_package_masks_what_gives_the_answer_away():
    task = load_task("stdlib_package")
    assert [len(getattr(task, split)) for split in SPLITS] == [1500, 300, 500]
    assert task.labels == tuple(sorted(PACKAGES)) and len(task.labels) == 16
    for split in SPLITS:
        assert {row["label"] for row in getattr(task, split)} == {*PACKAGES}
        assert not [row for row in getattr(task, split) if row["label"] in row["text"].lower()]
    # Its own class names too: TarInfo in tarfile.
    assert not [row for row in task.train if row["label"] == "tarfile" and "TarInfo" in row["text"]]
    assert re.search(r"Python \d\.\d+\.\d+ .*rows differ between Python versions", task.source)


def test_stdlib_kind_and_pair_are_balanced():
    counts = Counter(row["label"] for split in SPLITS for row in getattr(load_task("stdlib_kind"), split))
    assert len(counts) == 4 and len(set(counts.values())) == 1 and min(counts.values()) > 150
    for split in SPLITS:
        rows = getattr(load_task("stdlib_pair"), split)
        assert abs(Counter(row["label"] for row in rows)["match"] - len(rows) / 2) <= 1


def test_stdlib_pair_tells_the_truth():
    real = {(_signature(entry), _sentence(entry.doc)) for entry in entries()}
    for split in SPLITS:
        for row in getattr(load_task("stdlib_pair"), split):
            assert ((row["text"], row["text_b"]) in real) == (row["label"] == "match")


def test_stdlib_pair_has_no_sentence_in_two_splits():
    task = load_task("stdlib_pair")
    texts = [{row["text_b"] for row in getattr(task, split)} for split in SPLITS]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    assert len(texts[0]) == len(task.train)  # a mismatched sentence stands once, where its function does not


def test_stdlib_tags_mark_what_they_say():
    task = load_task("stdlib_tags")
    assert task.labels == ("B-EXCEPTION", "B-MODULE", "B-PARAMETER", "I-MODULE", "O")
    known = {name for entry in entries() for name in entry.parameters}
    for row in task.train:
        for token, tag in zip(row["tokens"], row["tags"], strict=True):
            if tag == "B-PARAMETER":
                assert token in known
            if tag == "B-MODULE":
                assert token in sys.stdlib_module_names


def test_stdlib_summary_has_a_whole_function_without_its_docstring():
    task = load_task("stdlib_summary")
    for row in [*task.train, *task.dev, *task.test]:
        [function] = ast.parse(row["source"]).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function) is None
        assert 4 <= len(row["target"].split()) <= 24


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, deltatune.data; print(sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name in ("numpy", "torch", "transformers", "pandas", "pyarrow", "sklearn", "scipy", "datasets", "seqeval"):
        assert f"'{name}'" not in loaded


def printed(tmp_path, **environment):
    code = "from deltatune.data import load_task; print(*(load_task(n).fingerprint for n in ('stdlib_package', "
    code += "'stdlib_kind', 'stdlib_pair', 'stdlib_tags', 'stdlib_summary', 'proc_order_year', 'proc_tags_sport')))"
    variables = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


def test_other_processes_make_the_same_tasks(tmp_path):
    fresh = printed(tmp_path, PYTHONHASHSEED="1")
    assert len(list((tmp_path / "cache" / "deltatune").iterdir())) == 1
    assert printed(tmp_path, PYTHONHASHSEED="2") == fresh
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert printed(tmp_path, XDG_CACHE_HOME=str(blocked)) == fresh


def test_procedural_tasks_are_the_same_everywhere():
    # Of no interpreter's library: pinned, so that a result names the same rows for everyone.
    assert (
        load_task("proc_order_year").fingerprint == "b6fc45373d8f41038f9099d877692033fc9806fa9ced16ceadf03f7cdb0054c2"
    )
    assert (
        load_task("proc_tags_sport").fingerprint == "d48241a58221c787c0ec737a7c1312cca2307ba84d4bf7838af98736a013137a"
    )
    assert (
        load_task("proc_write_sort_words").fingerprint
        == "a388c29040ab9f062bf3cf73d032bd83d7f192aa658d8e5fe38fbd2c0bf60cc7"
    )


def test_the_cache_respects_xdg_and_survives_damage(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "deltatune"
    assert cached("thing", "key", lambda: "made") == "made"
    assert cached("thing", "key", lambda: "again") == "made"
    assert cached("thing", "other key", lambda: "other") == "other"
    [path] = [path for path in cache_folder().iterdir() if gzip.decompress(path.read_bytes()) == b"made"]
    path.write_bytes(path.read_bytes()[:-9])
    assert cached("thing", "key", lambda: "mended") == "mended"
    assert cached("thing", "key", lambda: "again") == "mended"
    path.write_bytes(b"\x1f\x8b\x08\x00" + b"\xff" * 40)
    assert cached("thing", "key", lambda: "anew") == "anew"
    assert not list(cache_folder().glob("*.tmp"))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder().is_absolute()
