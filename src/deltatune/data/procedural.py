"""Over 100 small text tasks from a seeded grammar.

A template is text with slots. `{list}` takes a word that its sentence has not used yet, `{list.a}` the same word each
time, `{list<a}` and `{list<b}` two words in the list's order, `:1` a word's second form, `|first` a filter, `/PER` a
tag; `[x; y; z]` stands for its parts in a random order, as a list ("x, y and z"), `[x y z]` with spaces only.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache

from deltatune.data.procedural_families import FAMILIES, Family
from deltatune.data.procedural_words import WORDS
from deltatune.data.task import INPUTS, Row, Task

SIZES = (400, 100, 200)
SLOT = re.compile(r"\{(\w+)(?:([.<])(\w))?(?::(\d))?(?:\|(\w+))?(?:/([A-Z]+))?\}")
SHUFFLED = re.compile(r"\[([^\]]*)\]")
METRICS = {"token_classification": "entity_f1", "generation": "exact_match"}
FILTERS: Mapping[str, Callable[[str], str]] = {"first": lambda word: word[0], "upper": str.upper}

Segment = tuple[str, str]
"""Text and its tag ("" for none)."""


def procedural_tasks() -> dict[str, str]:
    """Return the name of every procedural task with one line on what it asks for."""
    return {name: f"{_filled(family.about, variant, family)} ({family.kind.replace('_', ' ')})"
            for name, (family, variant) in _variants().items()}  # fmt: skip


def procedural_task(name: str) -> Task:
    """Make a task: 400, 100 and 200 rows, labels balanced, no input twice in the whole task."""
    family, variant = _variants()[name]
    rng = random.Random(name)
    rows = _distinct_rows(family, variant, rng)
    train, dev, test = splits = [[next(rows) for _ in range(size)] for size in SIZES]
    for split in splits:
        rng.shuffle(split)
    labels = {label for split in splits for row in split for label in row.get("tags", [row.get("label")])}
    return Task(
        name, family.kind, METRICS.get(family.kind, "accuracy"), train, dev, test,
        labels=() if family.kind == "generation" else tuple(sorted(labels)),
        source=f"made from a grammar: {_filled(family.about, variant, family)}",
    )  # fmt: skip


@cache
def _variants() -> dict[str, tuple[Family, str]]:
    return {
        "proc_" + family.name.replace("<d>", variant): (family, variant)
        for family in FAMILIES
        for variant in family.over
    }


@cache
def _words(name: str) -> tuple[tuple[str, ...], ...]:
    """Return the words of a list, each with its forms."""
    return tuple(tuple(form.strip() for form in word.split("|")) for word in WORDS[name].split(", "))


def _filled(text: str, variant: str, family: Family) -> str:
    for name, value in {"d": variant, **family.over[variant]}.items():
        text = text.replace(f"<{name}>", value)
    return text


def _distinct_rows(family: Family, variant: str, rng: random.Random) -> Iterator[Row]:
    """Yield rows, the labels taking turns, without an input that was there before."""
    seen: set[str] = set()
    while True:
        for label, templates in family.rows.items():
            for _ in range(1000):
                row = _row(family, label, _filled(rng.choice(templates), variant, family), rng)
                key = "\n".join(str(row[field]) for field in INPUTS[family.kind])
                if key not in seen:
                    break
            else:
                raise AssertionError(f"{family.name}: too few different sentences for label {label!r}")
            seen.add(key)
            yield row


def _row(family: Family, label: str, template: str, rng: random.Random) -> Row:
    segments = _expand(template, rng)
    if family.lower:
        segments = [(text.lower(), tag) for text, tag in segments]
    if family.kind == "token_classification":
        return _tagged(segments, capital=not family.lower)
    texts = "".join(text for text, _ in segments).split(" || ")
    if family.kind == "generation":
        return {"source": texts[0], "target": texts[1]}
    if not family.lower:
        texts = [re.sub(r"(^|[.?!] )(\w)", lambda start: start[1] + start[2].upper(), text) for text in texts]
    return {**dict(zip(INPUTS[family.kind], texts, strict=True)), "label": label}


def _expand(template: str, rng: random.Random) -> list[Segment]:
    template = SHUFFLED.sub(lambda parts: _shuffled(parts[1], rng), template)
    fresh: dict[str, list[tuple[str, ...]]] = {}
    bound: dict[tuple[str, str], tuple[str, ...]] = {}
    slots = [slot.groups() for slot in SLOT.finditer(template)]
    for name in {name for name, how, *_ in slots if how == "<"}:
        marks = sorted({mark for other, how, mark, *_ in slots if other == name and how == "<"})
        places = sorted(rng.sample(range(len(_words(name))), len(marks)))
        bound |= {(name, mark): _words(name)[place] for mark, place in zip(marks, places, strict=True)}
    segments, end = [], 0
    for slot in SLOT.finditer(template):
        name, _, mark, form, filtered, tag = slot.groups()
        if name not in fresh:
            fresh[name] = [word for word in _words(name) if word not in bound.values()]
            rng.shuffle(fresh[name])
        word = bound.get((name, mark)) or fresh[name].pop()
        if mark:
            bound[name, mark] = word
        text = word[int(form or 0)]
        segments += [(template[end : slot.start()], ""), (FILTERS[filtered](text) if filtered else text, tag or "")]
        end = slot.end()
    return [*segments, (template[end:], "")]


def _shuffled(parts: str, rng: random.Random) -> str:
    separator = ";" if ";" in parts else " "
    found = [part.strip() for part in parts.split(separator)]
    rng.shuffle(found)
    return f"{', '.join(found[:-1])} and {found[-1]}" if separator == ";" else " ".join(found)


def _tagged(segments: list[Segment], capital: bool) -> Row:
    """Return tokens and BIO tags; slots of one tag with only a space between them are one span."""
    tokens: list[str] = []
    tags: list[str] = []
    inside = ""
    for text, tag in segments:
        for token in re.findall(r"\w+(?:[-':]\w+)*|[^\w\s]", text):
            tokens.append(token)
            tags.append(f"{'I' if inside == tag else 'B'}-{tag}" if tag else "O")
            inside = tag
    if capital:
        tokens[0] = tokens[0][0].upper() + tokens[0][1:]
    return {"tokens": tokens, "tags": tags}
