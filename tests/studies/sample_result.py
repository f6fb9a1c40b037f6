"""Realistic results of `deltatune tune` for the tests of the report: invented texts, invented scores, seeded."""

from __future__ import annotations

import math
import random
import statistics
from typing import Any

from deltatune.data.intervals import interval

BACKBONE = 22_713_216
# delta, trained parameters, level it reaches on dev, seconds of one training, learning rate, baseline
DELTAS: list[tuple[str, int, float, float, float, bool]] = [
    ("lora(r=8, at=attn.{q,v})", 74_498, 0.921, 41.2, 2e-3, False),
    ("adapter(d=64)", 602_114, 0.918, 47.9, 1e-3, False),
    ("parallel(d=64)", 301_442, 0.915, 44.0, 1e-3, False),
    ("prefix(n=16)", 148_226, 0.897, 52.3, 5e-3, False),
    ("bitfit", 51_842, 0.904, 33.8, 3e-3, False),
    ("ia3", 16_130, 0.893, 30.1, 1e-2, False),
    ("prompt(n=20)", 8_450, 0.861, 49.5, 3e-2, False),
    ("head-only", 770, 0.842, 11.4, 1e-2, True),
    ("full", BACKBONE + 770, 0.923, 128.0, 5e-5, True),
]
SITES = {
    "lora": ("attn.q", "attn.v"),
    "adapter": ("attn.o", "ffn.down"),
    "parallel": ("ffn",),
    "prefix": ("attn",),
    "bitfit": ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.up", "ffn.down", "norm.attn", "norm.ffn"),
    "ia3": ("attn.k", "attn.v", "ffn.down"),
    "prompt": (),
}
OPENINGS = [
    "The film", "Her second novel", "This little kettle", "The staff", "Their new record", "The update",
    "My third pair", "The ending", "What the trailer promised", "The soup of the day",
]  # fmt: skip
VERDICTS = {
    "positive": ["held me to the last minute", "is kinder and funnier than it needs to be", "does exactly what it says",
                 "surprised even my father, who likes nothing", "is worth every bit of the wait"],
    "negative": ["falls apart after twenty minutes", "was cold, late and somehow still expensive",
                 "asks for patience and gives nothing back", "broke on the second morning",
                 "left us looking at the clock"],
}  # fmt: skip
TURNS = ["", ", which nobody expected", ", though not for the reasons one would think", ", or so it seemed to me",
         ", and I would have said the opposite an hour before", " in spite of a slow start"]  # fmt: skip
TOPICS = [
    "card",
    "transfer",
    "refund",
    "password",
    "address",
    "limit",
    "statement",
    "exchange",
    "loan",
    "cash",
    "device",
    "fee",
]
ASKS = [
    "change",
    "cancel",
    "check",
    "explain",
    "block",
    "raise",
    "report",
    "find",
    "split",
    "confirm",
    "delay",
    "renew",
    "send",
]


def labels_of(kind: str, many: int) -> list[str]:
    """Labels of a task: two verdicts, `many` intents, or BIO tags."""
    if kind == "generation":
        return []
    if kind == "token_classification":
        return ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]
    if kind == "pair_classification":
        return ["equivalent", "not_equivalent"]
    if many == 2:
        return ["negative", "positive"]
    return [f"{ask}_{topic}" for topic in TOPICS for ask in ASKS][:many]


def make_result(
    kind: str = "classification", labels: int = 2, seeds: int = 3, rows: int = 400, seed: int = 0
) -> dict[str, Any]:
    """A whole result: nine deltas of which two are baselines, candidates of a search, curves, norms, test examples."""
    random_ = random.Random(seed)
    metric = "f1" if kind == "token_classification" else "rougeL" if kind == "generation" else "accuracy"
    names = labels_of(kind, labels)
    runs = [run for delta in DELTAS for run in _runs(random_, delta, seeds, metric)]
    summary = [_summary(runs, delta, seeds, metric) for delta in DELTAS]
    chosen, second = DELTAS[0][0], DELTAS[1][0]
    majority = {metric: 0.509 if len(names) == 2 else 0.012}
    gain = 100 * (summary[0]["dev"]["mean"] - summary[7]["dev"]["mean"])
    return {
        "schema": "deltatune.result/1",
        "sentence": f"Take {chosen}: {100 * summary[0]['test']['mean']:.1f} % on test, {gain:.1f} points over "
        f"head-only, 0.3 % of the parameters trained; {second} could not be told apart from it.",
        "command": "deltatune tune reviews.csv --columns text=review,label=stars --backbone minilm --budget 10m "
        "--seeds 3 --out best/",
        "created": "2026-02-11T09:41:00+00:00",
        "versions": {"deltatune": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.7"},
        "threads": 2,
        "task": {"name": "reviews", "kind": kind, "metric": metric, "labels": names,
                 "rows": {"train": 1600, "dev": 400, "test": rows}, "source": "reviews.csv"},
        "backbone": {"name": "minilm", "parameters": BACKBONE, "dtype": "bfloat16", "fingerprint": "53aa51172d142c89"},
        "runs": runs,
        "baselines": [{"name": "majority", "metrics": {"dev": majority, "test": majority}}],
        "summary": summary,
        "candidates": _candidates(random_),
        "chosen": chosen,
        "examples": [_example(random_, row, kind, names, (chosen, second)) for row in range(rows)],
    }  # fmt: skip


def _runs(random_: random.Random, delta: tuple[Any, ...], seeds: int, metric: str) -> list[dict[str, Any]]:
    name, trainable, level, seconds, rate, _ = delta
    steps, runs = 300, []
    for seed in range(seeds):
        reached = level + random_.gauss(0, 0.005)
        speed = 40 + 30 * random_.random()
        curve = []
        for step in range(0, steps + 1, 10):
            loss = 0.69 * math.exp(-step / speed) + (1 - reached) * 1.6 + random_.gauss(0, 0.02)
            dev = 0.5 + (reached - 0.5) * (1 - math.exp(-step / speed)) + random_.gauss(0, 0.003)
            curve.append({"step": step, "loss": max(loss, 0.01), "dev": dev if step % 50 == 0 else None,
                          "lr": rate * (1 - step / steps)})  # fmt: skip
        curve[-1]["dev"] = reached
        sites = SITES.get(name.split("(")[0], ())
        norms = {
            f"encoder.{block}.{site}": 0.3 + 0.12 * block + 0.2 * site.endswith("v") + random_.gauss(0, 0.05)
            for block in range(6)
            for site in sites
        }
        if name.startswith("prompt"):
            norms = {"embed": 1.83}
        metrics: dict[str, Any] = {"dev": {metric: reached}}
        if name in (DELTAS[0][0], DELTAS[1][0]):
            metrics["test"] = {metric: reached - 0.008 + random_.gauss(0, 0.003)}
        runs.append({
            "task": "reviews", "delta": name, "seed": seed, "settings": {"lr": rate, "batch": 32, "steps": steps},
            "trainable": trainable, "backbone": "minilm", "metrics": metrics,
            "baseline": {"majority": 0.509, "head-only": 0.842}, "seconds": seconds + random_.gauss(0, 1),
            "saved": None if seed else f"best/{name}", "curve": curve, "norms": norms, "bytes": 4 * trainable + 2100,
            "state": "done",
        })  # fmt: skip
    return runs


def _summary(runs: list[dict[str, Any]], delta: tuple[Any, ...], seeds: int, metric: str) -> dict[str, Any]:
    mine = [run for run in runs if run["delta"] == delta[0]]
    test = [run["metrics"]["test"][metric] for run in mine if "test" in run["metrics"]]
    return {
        "delta": delta[0], "trainable": delta[1], "seeds": seeds,
        "dev": interval([run["metrics"]["dev"][metric] for run in mine])._asdict(),
        "test": interval(test)._asdict() if test else None,
        "seconds": statistics.mean(run["seconds"] for run in mine), "bytes": mine[0]["bytes"], "baseline": delta[5],
    }  # fmt: skip


def _candidates(random_: random.Random) -> list[dict[str, Any]]:
    candidates = []
    for place, (name, trainable, level, _, rate, baseline) in enumerate(DELTAS):
        for factor in () if baseline else (0.3, 1, 3):
            best = factor == 1
            rung = 3 if best and place < 3 else 2 if best else random_.choice([0, 1])
            candidates.append({
                "delta": name, "settings": {"lr": rate * factor, "batch": 32}, "trainable": trainable, "rung": rung,
                "steps": (20, 60, 150, 300)[rung], "dev": level - 0.03 * (3 - rung) + random_.gauss(0, 0.004),
                "state": "chosen" if best and not place else "finished" if rung == 3 else "stopped",
            })  # fmt: skip
    candidates.append({"delta": "ia3", "settings": {"lr": 1.0, "batch": 32}, "trainable": 16_130, "rung": 0, "steps": 7,
                       "dev": None, "state": "failed"})  # fmt: skip
    return candidates


def _example(random_: random.Random, row: int, kind: str, labels: list[str], deltas: tuple[str, str]) -> dict[str, Any]:
    text, gold = _text(random_, kind, labels)
    hard = random_.random() < 0.12
    predictions, confidence = {}, {}
    for delta in deltas:
        wrong = random_.random() < (0.55 if hard else 0.025)
        predictions[delta] = _wrong(random_, kind, labels, gold) if wrong else gold
        confidence[delta] = round(random_.uniform(0.5, 0.97 if wrong else 1.0), 4)
    return {"row": row, "input": text, "gold": gold, "predictions": predictions, "confidence": confidence}


def _text(random_: random.Random, kind: str, labels: list[str]) -> tuple[str, str]:
    if kind == "token_classification":
        person, place = (
            random_.choice(["Ada Moreau", "Tom Lindqvist", "Yun Park"]),
            random_.choice(["Ghent", "Oslo", "Lima"]),
        )
        text = f"{person} of Northwind Freight moved its depot from {place} to Turin in spring ."
        return text, "B-PER I-PER O B-ORG I-ORG O O O O B-LOC O B-LOC O O O"
    if kind == "generation":
        noun = random_.choice(["path", "date", "matrix", "header"])
        return f"Return the {noun} of the given object, or None when it has no {noun}.", f"get {noun}"
    if len(labels) > 2:
        gold = random_.choice(labels)
        ask, topic = gold.split("_")
        return f"Hello, could you please {ask} my {topic}{random_.choice(TURNS)}?", gold
    sentiment = random_.choice(["negative", "positive"])
    text = f"{random_.choice(OPENINGS)} {random_.choice(VERDICTS[sentiment])}{random_.choice(TURNS)}."
    if kind == "pair_classification":
        other = text if sentiment == "positive" else f"{random_.choice(OPENINGS)} was discussed at length."
        return f"{text} ‖ {other}", "equivalent" if sentiment == "positive" else "not_equivalent"
    return text, sentiment


def _wrong(random_: random.Random, kind: str, labels: list[str], gold: str) -> str:
    if kind == "generation":
        return gold.replace("get", random_.choice(["return", "find", "the"]))
    if kind == "token_classification":
        tags = gold.split()
        tags[random_.choice([3, 4, 9])] = random_.choice(["O", "B-LOC", "B-PER"])
        return " ".join(tags)
    near = [label for label in labels if label.split("_")[-1] == gold.split("_")[-1] and label != gold]
    return random_.choice(near or [label for label in labels if label != gold])
