"""Every format gives the same task, and every malformed file is refused with its place."""

from __future__ import annotations

import gzip
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.data.writing import FORMATS, reviews, write

from deltatune.data import load_task
from deltatune.data.formats import read_table
from deltatune.errors import TaskError

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(lambda text: text.strip())
AWKWARD = [
    'say "no"',
    "a,b;c\td",
    "two\nlines",
    "\u2028 odd \u0085",
    "[1, 2]",
    " spaces ",
    "'",
    '"',
    "\ufeffx",
    "a\r\nb",
]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXTS, min_size=4, max_size=12))
def test_every_format_gives_the_same_rows(texts, tmp_path_factory):
    rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(texts + AWKWARD)]
    folder = tmp_path_factory.mktemp("formats")
    for suffix in FORMATS:
        assert read_table(write(folder, "rows", rows, suffix)).rows == rows, suffix


@pytest.mark.parametrize(
    "fields",
    [
        {"text": "w{i} x", "label": "{p}"},
        {"text": "w{i}", "text_b": "v{i} y", "label": "{p}"},
        {"tokens": ["w{i}", "of", "x"], "tags": ["B-{p}", "O", "O"]},
        {"source": "w{i}", "target": "t{i}", "targets": ["t{i}", "u"]},
    ],
    ids=["classification", "pair", "tokens", "generation"],
)
def test_fingerprint_and_kind_do_not_depend_on_the_format(fields, tmp_path):
    def fill(value, i):
        if isinstance(value, list):
            return [fill(one, i) for one in value]
        return value.format(i=i, p="PQ"[i % 2])

    rows = [{field: fill(value, i) for field, value in fields.items()} for i in range(40)]
    tasks = [load_task(write(tmp_path, "same", rows, suffix)) for suffix in FORMATS]
    assert {task.fingerprint for task in tasks} == {tasks[0].fingerprint}
    assert {task.kind for task in tasks} == {tasks[0].kind}
    assert {task.name for task in tasks} == {"same"}
    found = [row for split in ("train", "dev", "test") for row in getattr(tasks[0], split)]
    assert sorted(map(str, found)) == sorted(map(str, rows))


def test_fingerprint_tells_rows_labels_and_splits_apart(tmp_path):
    rows = reviews()
    same = load_task(write(tmp_path, "a", rows)).fingerprint
    assert load_task(write(tmp_path, "b", rows)).fingerprint == same
    assert load_task(write(tmp_path, "c", [{**rows[0], "text": "another"}, *rows[1:]])).fingerprint != same
    assert load_task(write(tmp_path, "d", [{**rows[0], "label": "good"}, *rows[1:]])).fingerprint != same
    assert load_task(write(tmp_path, "a", rows), seed=1).fingerprint != same


def test_numbers_are_labels_as_their_text(tmp_path):
    rows = [{"text": f"text {i}", "label": i % 3} for i in range(60)]
    for suffix in FORMATS:
        assert load_task(write(tmp_path, "numbers", rows, suffix)).labels == ("0", "1", "2"), suffix


def test_csv_of_a_spreadsheet(tmp_path):
    body = "".join(f'"a text; with\r\nline {i}";{"yn"[i % 2]}\r\n' for i in range(20))
    path = tmp_path / "sheet.csv"
    path.write_bytes(b"\xef\xbb\xbf" + f"text;label\r\n{body}\r\n".encode())
    table = read_table(path)
    assert table.columns == ("text", "label")
    assert len(table.rows) == 20
    assert table.rows[0] == {"text": "a text; with\r\nline 0", "label": "y"}
    assert table.places[:2] == ["line 2", "line 4"]


def test_tsv_without_quoting_keeps_quotes(tmp_path):
    path = tmp_path / "glue.tsv"
    path.write_text('text\tlabel\n"Hello" he said\tpos\n"Open\tneg\n')
    assert [row["text"] for row in read_table(path).rows] == ['"Hello" he said', '"Open']


def test_a_field_may_be_longer_than_the_csv_modules_limit(tmp_path):
    path = write(tmp_path, "long", [{"text": "x" * 200_000, "label": "a"}], ".csv")
    assert len(read_table(path).rows[0]["text"]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: the file is empty; expected one row"),
        ("a.csv", b" \n\n", "a.csv: the file is empty"),
        ("a.csv", b"text,label\n", "a.csv: no rows"),
        ("a.json", b"[]", "a.json: no rows"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl: line 2 is not JSON (Expecting value at character 10)"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', 'a.jsonl: line 2 is a list; expected an object: {"text": ...'),
        ("a.jsonl", b"3\n", "a.jsonl: line 1 is a number; expected an object"),
        ("a.json", b'[{"text": "a"}, {"text": "b" "label"}, {}]', "a.json: row 2 is not JSON"),
        ("a.json", b'[{"text": "a"}, {"text": "b"}', "a.json: row 2 is not JSON"),
        ("a.json", b'{"text": "a"}', "a.json: got an object; expected a list of objects"),
        ("a.json", b'[{"text": "a"}, "b"]', "a.json: row 2 is a text; expected an object"),
        ("a.csv", b"text,label\na,b\nc\n", "a.csv: line 3 has 1 columns; expected 2 (text, label)"),
        (
            "a.csv",
            b'text,label\n"a\nb",x\nc,d,e\n',
            "a.csv: line 4 has 3 columns; expected 2 (text, label); put quotes round",
        ),
        ("a.csv", b'text,label\n"a"b,x\n', "a.csv: line 2 has misplaced quotes"),
        ("a.csv", b'text,label\na,x\n"b,x\n', "a.csv: line 3 has misplaced quotes"),
        ("a.csv", b"text,text\na,b\n", "a.csv: line 1 names column 'text' twice"),
        ("a.csv", b"text,label\nol\xe9,b\n", "a.csv: line 2 is not UTF-8 (byte 0xe9); save it so"),
        ("a.csv", "text,label\na,b\n".encode("utf-16"), "a.csv: the text is UTF-16; save it as UTF-8"),
        ("a.parquet", b"PAR1 and nothing else", "a.parquet: not a parquet file, or damaged"),
        ("a.jsonl.gz", b"not compressed", "a.jsonl.gz: cannot be read: Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-12],
            "the compressed file is damaged or cut short",
        ),
        ("a.xlsx", b"PK", "a.xlsx: unknown format '.xlsx'; valid: .jsonl, .json, .csv, .tsv, .parquet (each also .gz)"),
    ],
)
def test_malformed_files_are_refused_in_one_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError, match=re.escape(message)) as caught:
        load_task(tmp_path / name)
    assert "\n" not in str(caught.value)
