"""Embedded tasks made of the standard library's docstrings: text that people wrote, nothing downloaded."""

from __future__ import annotations

import builtins
import random
import re
import sys
from collections.abc import Iterable, Sequence

from deltatune.data.stdlib import Entry, entries
from deltatune.data.task import Kind, Row, Task

PACKAGES = (
    "asyncio", "decimal", "email", "http", "importlib", "inspect", "ipaddress", "logging", "mailbox",
    "multiprocessing", "pathlib", "tarfile", "typing", "unittest", "urllib", "xml",
)  # fmt: skip
"""The packages with most docstrings that every Python from 3.11 on has, whoever packed it."""

SIZES = (1500, 300, 500)
MASK = "___"
LONGEST = 48
ARTICLE = "a"  # also the name of many a parameter; as a word of a docstring it nearly never is one


def stdlib_package() -> Task:
    """Docstring -> the package that it documents; the package's name and its own identifiers are masked."""
    found = [entry for entry in entries() if entry.package in PACKAGES]
    own = {package: {e.name for e in found if e.package == package} for package in PACKAGES}
    rows = [{"text": _masked(e, own[e.package]), "label": e.package} for e in found]
    return _task(
        "stdlib_package", "classification", "accuracy",
        _cut(_distinct(rows, "text", fewest=6), SIZES),
        labels=PACKAGES, template="Documentation: {text}\nPackage:", what="docstring -> package, own names masked",
    )  # fmt: skip


def stdlib_kind() -> Task:
    """A docstring's first sentence -> what it documents: function, method, class or module; balanced."""
    rows = _distinct(({"text": _sentence(e.doc), "label": e.what} for e in entries()), "text", fewest=3)
    groups = [[row for row in rows if row["label"] == label] for label in ("class", "function", "method", "module")]
    for group in groups:
        random.Random(0).shuffle(group)
    balanced = [row for same in zip(*groups, strict=False) for row in same]
    test, dev = round(0.2 * len(balanced)), round(0.12 * len(balanced))
    return _task(
        "stdlib_kind", "classification", "accuracy",
        _cut(balanced, (len(balanced), dev, test)),
        labels=("class", "function", "method", "module"), template="Documentation: {text}\nIt documents a",
        what="first sentence -> function, method, class or module",
    )  # fmt: skip


def stdlib_summary() -> Task:
    """A short function's source without its docstring -> the docstring's first sentence."""
    pairs = ({"source": e.code, "target": _sentence(e.doc)} for e in entries() if 40 <= len(e.code) <= 800)
    rows = [row for row in _distinct(pairs, "source") if 3 < len(row["target"].split()) < 25]
    return _task(
        "stdlib_summary", "generation", "rouge_l", _cut(_distinct(rows, "target"), (1500, 200, 300)),
        template="{source}\n\nWhat it does: ", what="source of a function -> first sentence of its docstring",
    )  # fmt: skip


def stdlib_pair() -> Task:
    """A function's name and parameters, and a sentence: is it the function's docstring?"""
    functions = [e for e in entries() if e.what in ("function", "method") and len(e.name.strip("_")) > 2]
    rows = [{"text": _signature(e), "text_b": _sentence(e.doc), "label": "match", "of": e.package} for e in functions]
    rows = _distinct(_distinct(rows, "text"), "text_b", fewest=4)
    return _task(
        "stdlib_pair", "pair_classification", "accuracy",
        [_half_mismatched(split) for split in _cut(rows, SIZES)],
        labels=("match", "mismatch"), what="function and sentence -> whether the sentence documents it",
    )  # fmt: skip


def stdlib_tags() -> Task:
    """Words of a docstring -> parameters of its function, exceptions and modules that it names, as BIO tags.

    Weak labels: what the signature and lists of names give, not a person's reading.
    """
    functions = [e for e in entries() if e.what in ("function", "method")]
    rows = [{"text": " ".join(row["tokens"]), **row} for row in map(_tagged, functions)]
    rows = [row for row in _distinct(rows, "text", fewest=6) if any(tag != "O" for tag in row["tags"])]
    split = [[{"tokens": row["tokens"], "tags": row["tags"]} for row in part] for part in _cut(rows, SIZES)]
    return _task(
        "stdlib_tags", "token_classification", "entity_f1", split,
        labels=tuple(sorted({tag for part in split for row in part for tag in row["tags"]})),
        what="docstring -> parameters, exceptions and modules that it names",
    )  # fmt: skip


def _task(
    name: str,
    kind: Kind,
    metric: str,
    splits: Sequence[list[Row]],
    what: str,
    labels: tuple[str, ...] = (),
    template: str | None = None,
) -> Task:
    train, dev, test = splits
    version = ".".join(map(str, sys.version_info[:3]))
    source = f"docstrings of the Python {version} standard library ({what}); the rows differ between Python versions"
    return Task(name, kind, metric, train, dev, test, labels, template, source=source)


def _distinct(rows: Iterable[Row], field: str, fewest: int = 1) -> list[Row]:
    """Return the first row of each text of at least so many words, so that no text stands in two splits."""
    kept: dict[str, Row] = {}
    for row in rows:
        if len(row[field].split()) >= fewest:
            kept.setdefault(row[field], row)
    return list(kept.values())


def _cut(rows: list[Row], sizes: tuple[int, int, int]) -> list[list[Row]]:
    """Shuffle with seed 0 and cut test, dev and train in this order, so that a shortage meets train alone."""
    train, dev, test = sizes
    rows = random.Random(0).sample(rows, len(rows))
    return [rows[test + dev : test + dev + train], rows[test : test + dev], rows[:test]]


def _masked(entry: Entry, own: set[str]) -> str:
    text = " ".join(entry.doc.split()[:LONGEST])
    text = re.sub(rf"[\w.]*{re.escape(entry.package)}[\w.]*", MASK, text, flags=re.IGNORECASE)
    return re.sub(r"\w+", lambda word: MASK if word[0] in own and _is_code(word[0]) else word[0], text)


def _is_code(word: str) -> bool:
    """Return whether a word could not be plain English: it has an underscore, or a capital after its first letter."""
    return "_" in word or word[1:].lower() != word[1:]


def _sentence(doc: str) -> str:
    """Return the first sentence of a docstring."""
    paragraph = " ".join(doc.split("\n\n", 1)[0].split())
    return re.split(r"(?<=[a-z0-9)\]'\"`][.!?])\s", paragraph, maxsplit=1)[0]


def _signature(entry: Entry) -> str:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_+", " ", entry.name).lower().split()
    return f"{' '.join(words)} ({', '.join(entry.parameters)})"


def _half_mismatched(rows: list[Row]) -> list[Row]:
    """Give every second row another row's sentence, of the same package where it has one."""
    rows = sorted(rows, key=lambda row: row["of"])
    half = random.Random(0).sample(range(len(rows)), len(rows) // 2)
    chosen = sorted(half)  # in the order of packages, so that the next chosen row is a near neighbour
    given = dict(zip(chosen, chosen[1:] + chosen[:1], strict=True))
    made = [
        {"text": row["text"], "text_b": rows[given.get(i, i)]["text_b"], "label": "mismatch" if i in given else "match"}
        for i, row in enumerate(rows)
    ]
    random.Random(1).shuffle(made)
    return made


def _tagged(entry: Entry) -> Row:
    words = list(re.finditer(r"\w+|[^\w\s]", entry.doc))[:LONGEST]
    tokens, tags = [word[0] for word in words], ["O"] * len(words)
    for i, token in enumerate(tokens):
        if tags[i] != "O":
            continue
        if token in entry.parameters and token != ARTICLE:
            tags[i] = "B-PARAMETER"
        elif _is_exception(token):
            tags[i] = "B-EXCEPTION"
        elif token in sys.stdlib_module_names:
            _tag_module(words, tags, i)
    return {"tokens": tokens, "tags": tags}


def _is_exception(token: str) -> bool:
    known = getattr(builtins, token, None)
    return (isinstance(known, type) and issubclass(known, BaseException)) or bool(
        re.fullmatch(r"[A-Z]\w*[a-z](Error|Exception|Warning)", token)
    )


def _tag_module(words: list[re.Match[str]], tags: list[str], start: int) -> None:
    """Tag a module's name with what follows it after dots, unless it may be a common word ("time", "string")."""
    end = start + 1
    while end + 1 < len(words) and words[end][0] == "." and words[end].end() == words[end + 1].start():
        end += 2
    if end > start + 1 or any(word[0] in ("module", "package") for word in words[end : end + 1]):
        tags[start:end] = ["B-MODULE", *["I-MODULE"] * (end - start - 1)]
