"""Embeddings: from a file to rankings and vectors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.fit.running import alone, run
from tests.fit.tiny import QUICK, backbone, furthest, plan, task
from tests.heads.paired import write

from deltatune.compose.expression import parse
from deltatune.data.load import load_task
from deltatune.data.metrics import majority, score
from deltatune.delta.delta import Delta
from deltatune.errors import TaskError
from deltatune.heads.base import collate
from deltatune.heads.embedding import Embedding
from deltatune.studies.verbs import run_plans
from deltatune.training.job import Plan


def test_a_file_of_anchors_and_positives_is_fitted_beside_the_bare_backbone(tmp_path: Path) -> None:
    made = load_task(write(tmp_path, "embedding"))
    assert (made.kind, made.metric, made.labels) == ("embedding", "mrr_at_10", ())
    assert any("negative" in row for row in made.train) and not all("negative" in row for row in made.train)
    on = backbone()
    runs = run_plans(on, [Plan(parse("lora"), made, 0, QUICK, "lora")], out=tmp_path / "out")
    result = runs.results[0]
    assert {row["delta"] for row in result["summary"]} == {"lora", "head-only"}
    assert result["examples"][0]["gold"] == made.test[0]["positive"]
    assert result["examples"][0]["predictions"]["lora"] in {row["positive"] for row in made.test}
    again = Delta.load(str(tmp_path / "out"), on)
    assert isinstance(again.head, Embedding) and not list(again.head.parameters())


def test_rankings_are_those_of_the_cosines(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(30, 2, 8, generator=draw), dim=2)
    rows = [{"anchor": f"a{i}", "positive": f"p{i % 28}"} for i in range(30)]  # two positives occur twice
    vectors[28:, 1] = vectors[:2, 1]
    ranked = Embedding().conclude(list(vectors), rows)
    cosines = vectors[:, 0] @ vectors[:28, 1].T
    for i, row in enumerate(ranked):
        assert len(row) == 10 == len(set(row))
        found = [float(cosines[i, int(text[1:])]) for text in row]
        assert found == sorted(found, reverse=True) and found[-1] >= float(cosines[i].sort(descending=True).values[10])
    ranks = [1 + int((cosines[i] > cosines[i, i % 28]).sum()) for i in range(30)]
    gold = [row["positive"] for row in rows]
    assert score("mrr_at_10", ranked, gold) == pytest.approx(sum(1 / r for r in ranks if r <= 10) / 30)
    assert score("accuracy_at_1", ranked, gold) == pytest.approx(sum(r == 1 for r in ranks) / 30)
    vector = Embedding().conclude(list(vectors), [{"anchor": "a"}] * 30)
    assert vector[3] == pytest.approx(vectors[3, 0].tolist())


def test_a_vector_has_norm_one_and_does_not_depend_on_padding() -> None:
    on, head = backbone(), Embedding()
    examples = head.encode([{"anchor": "w1 w2 w3"}, {"anchor": "w4"}], on, 64)
    made = []
    with torch.no_grad():
        for length in (5, 9):
            batch = collate(examples, on, length)
            made.append(head.scores(on.trunk(**batch.inputs).last_hidden_state, batch, on))
    assert torch.allclose(made[0], made[1], atol=1e-6)
    assert made[0].norm(dim=1).tolist() == pytest.approx([1.0, 1.0])


def test_together_is_alone_beside_other_kinds(tmp_path: Path) -> None:
    pairs = load_task(write(tmp_path, "embedding"))
    some = [plan("lora(dropout=0.2)", pairs), plan("prompt(n=2)", pairs, 1), plan("adapter", task(longest=14))]
    together, groups = run(some, steps=12)
    assert groups[0] < 3
    for one in some:
        lonely = alone(one, steps=12)
        # Vectors are float32 whatever the backbone is.
        assert together[one.name].losses == pytest.approx(lonely.losses, rel=0, abs=1e-6)
        assert furthest(together[one.name].tensors, lonely.tensors) <= 1e-6


def test_always_the_same_ranking_is_the_most_frequent_positives(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"anchor": f"a{i}", "positive": f"p{i // 20}"}) + "\n" for i in range(60)))
    made = load_task(file)
    assert sorted(majority(made)) == ["p0", "p1", "p2"]


def test_columns_are_proposed(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"query": f"what is {i} of it", "passage": f"it is {i} in all of it"} for i in range(30)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TaskError, match="give --columns anchor=query,positive=passage"):
        load_task(file, kind="embedding")
    made = load_task(file, columns={"anchor": "query", "positive": "passage"})
    assert made.kind == "embedding" and set(made.train[0]) == {"anchor", "positive"}
