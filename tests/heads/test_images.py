"""Deltas for images: every family by one path, from a folder to predictions, alone or many together."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.heads.picture_models import FAMILIES, network, saved, saved_pair

import deltatune as dt
from deltatune.backbone.load import Backbone
from deltatune.data.images import inline, opened
from deltatune.data.task import Task
from deltatune.delta.adapted import Adapted
from deltatune.errors import TaskError, UserError
from deltatune.heads import pixels as reading
from deltatune.heads.base import collate
from deltatune.heads.choose import head_for
from deltatune.heads.images import ImageClassification
from deltatune.heads.pixels import noise, pixels
from deltatune.heads.whole import whole
from deltatune.studies.failures import confusion
from deltatune.training.evaluate import predict
from deltatune.training.fit import fit_plans
from deltatune.training.job import Plan
from deltatune.training.settings import Settings

QUICK = Settings(steps=16, batch=8, evaluations=2, precision="float32", lr=1e-2, probe=False)


def lit(count: int, seed: int) -> list[dict[str, str]]:
    """Noise, dark in one half of the rows and light in the other."""
    draw = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        image = np.clip((170 if i % 2 else 85) + draw.normal(0, 40, (8, 8)), 0, 255).astype(np.uint8)
        rows.append({"image": inline(Image.fromarray(image)), "label": "light" if i % 2 else "dark"})
    return rows


def task(name: str = "lights", seed: int = 0) -> Task:
    train, dev, test = (lit(count, seed + n) for n, count in enumerate((32, 10, 20)))
    return Task(name, "image_classification", "accuracy", train, dev, test, ("dark", "light"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_each_family_is_loaded_fitted_saved_and_predicts(family: str, tmp_path: Path) -> None:
    backbone = dt.load(saved(tmp_path / "network", family))
    assert (backbone.reads, backbone.kind) == ("images", "encoder")
    plan = Plan(dt.LoRA(r=4), task(), 0, QUICK)
    made = fit_plans(backbone, [plan])[0]
    head = made.delta.head
    assert isinstance(head, ImageClassification)
    assert head.pooling == ("mean" if family in ("swin", "siglip") else "first")
    assert made.test is not None and made.metrics["test"]["accuracy"] >= 0.9
    made.delta.save(tmp_path / "out")
    again = dt.load(tmp_path / "network")
    delta = dt.Delta.load(tmp_path / "out", again)
    with Adapted(again, [delta]) as adapted:
        found = predict(adapted, delta, delta.head, plan.task.test, 64)
    assert found.values == made.test.values
    assert found.confidence == pytest.approx(made.test.confidence, abs=1e-5)


def test_of_a_pair_of_networks_the_one_for_images_is_loaded(tmp_path: Path) -> None:
    from transformers import CLIPModel

    backbone = dt.load(saved_pair(tmp_path))
    whole_model = CLIPModel.from_pretrained(tmp_path).eval()
    given = noise(2, backbone)
    with torch.no_grad():
        wanted = whole_model.vision_model(pixel_values=given).last_hidden_state
        found = backbone.module(pixel_values=given).last_hidden_state
    assert backbone.reads == "images" and torch.equal(found, wanted)


def test_methods_of_every_kind_fit_together_as_alone(tmp_path: Path) -> None:
    backbone = dt.load(saved(tmp_path, "vit"))
    specs = [
        dt.LoRA(r=2), dt.Adapter(m=4), dt.BitFit(), dt.Prefix(n=2), dt.Prompt(n=3),
        dt.Prompt(n=2) | dt.LoRA(r=2, dropout=0.3),
    ]  # fmt: skip
    plans = [Plan(spec, task("b" if n % 2 else "a", 10 * (n % 2)), 0, QUICK) for n, spec in enumerate(specs)]
    together = fit_plans(backbone, plans)
    for plan, made in zip(plans, together, strict=True):
        alone = fit_plans(backbone, [plan])[0]
        ours, theirs = made.delta.state_dict(), alone.delta.state_dict()
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 2e-3
        assert made.curve[-1].loss == pytest.approx(alone.curve[-1].loss, abs=1e-4)
        start = dt.Delta.build(plan.spec, backbone, seed=0, name="start").state_dict()
        assert any(not torch.equal(ours[name], value) for name, value in start.items())


def test_rows_and_classes_weigh_as_those_of_texts_do(tmp_path: Path) -> None:
    backbone = dt.load(saved(tmp_path, "vit"))
    data = task()
    rows = [{**row, "weight": 3.0 if row["label"] == "light" else 1.0} for row in data.train]
    head = head_for(data, backbone, 0)
    plain, weighted = (collate(head.encode(given, backbone, 64), backbone) for given in (data.train, rows))
    hidden = backbone.trunk(**plain.inputs).last_hidden_state
    with torch.no_grad():
        bare, by_row = (float(head.loss(hidden, batch, backbone)) for batch in (plain, weighted))
        head.class_weights = (1.0, 3.0)
        assert abs(by_row - bare) > 1e-4
        assert float(head.loss(hidden, plain, backbone)) == pytest.approx(by_row, rel=1e-6)
    probed = dataclasses.replace(QUICK, steps=1, probe=True)
    chances = []
    for weights in ({"dark": 50.0}, {"light": 50.0}):
        settings = dataclasses.replace(probed, class_weights=weights)
        found = fit_plans(backbone, [Plan(dt.Head(), data, 0, settings)])[0].test
        assert found is not None
        answers = zip(found.values, found.confidence, strict=True)
        chances.append(sum(sure if label == "light" else 1 - sure for label, sure in answers) / len(data.test))
    assert chances[0] + 0.02 < chances[1]


def test_labels_may_be_added_to_a_head_of_images(tmp_path: Path) -> None:
    backbone = dt.load(saved(tmp_path / "network", "vit"))
    delta = fit_plans(backbone, [Plan(dt.LoRA(r=2), task(), 0, QUICK)])[0].delta
    assert isinstance(delta.head, ImageClassification)
    batch = collate(delta.head.encode(task().test, backbone, 64), backbone)
    hidden = backbone.trunk(**batch.inputs).last_hidden_state
    before = delta.head.scores(hidden, batch, backbone)
    delta.add_labels(["grey"])
    delta.save(tmp_path / "out")
    head = dt.Delta.load(tmp_path / "out", backbone).head
    assert isinstance(head, ImageClassification) and head.labels == ("dark", "light", "grey")
    after = head.scores(hidden, batch, backbone)
    assert after.shape == (20, 3) and torch.equal(after[:, :2], before)


def test_a_result_names_images_shortly_and_has_their_confusion(tmp_path: Path) -> None:
    backbone = dt.load(saved(tmp_path, "vit"))
    made = dt.fit(backbone, dt.LoRA(r=2), task(), **dataclasses.asdict(QUICK)).results[0]
    assert {len(row["input"]) for row in made["examples"]} == {len("image ") + 12}
    confused = confusion(made, made["chosen"])
    assert confused is not None and sum(map(sum, confused.counts)) == 20


def test_pixels_are_what_the_processor_gives_whatever_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = dt.load(saved(tmp_path, "vit"))
    images = [row["image"] for row in lit(6, 0)]
    first = pixels(images, backbone)
    assert first.shape == (6, 3, 8, 8) and float(first.min()) < -0.5 < 0.5 < float(first.max())
    assert torch.equal(pixels(images[::-1], backbone), first.flip(0))
    monkeypatch.setattr(reading, "KEPT", 2 * first[0].nbytes)
    assert torch.equal(pixels(images, backbone), first)
    assert len(reading._kept[backbone.module]) == 2
    assert torch.equal(pixels(images, backbone), first)


def test_text_and_images_are_not_mistaken_for_each_other(tmp_path: Path) -> None:
    from tests.fit.tiny import backbone as text_backbone

    words = Task("words", "classification", "accuracy", [], [], [], ("a", "b"))
    with pytest.raises(TaskError, match="task words has text, .* reads images"):
        head_for(words, dt.load(saved(tmp_path, "vit")), 0)
    with pytest.raises(TaskError, match="task lights has images, tiny-bert reads text"):
        head_for(task(), text_backbone("bert"), 0)
    with pytest.raises(TaskError, match="was given without an image processor"):
        pixels([task().train[0]["image"]], Backbone(network("vit")))


@pytest.mark.parametrize("family", ["vit", "deit"])
def test_a_network_with_its_head_is_a_class_of_transformers(family: str, tmp_path: Path) -> None:
    from transformers import pipeline

    backbone = dt.load(saved(tmp_path / "network", family))
    made = fit_plans(backbone, [Plan(dt.Head(), task(), 0, QUICK)])[0]
    whole(backbone, made.delta.head).save_pretrained(tmp_path / "whole")
    backbone.processor.save_pretrained(tmp_path / "whole")
    pictures = [opened(row["image"]) for row in task().test]
    answers = pipeline("image-classification", model=str(tmp_path / "whole"))(pictures)
    assert made.test is not None
    assert [answer[0]["label"] for answer in answers] == made.test.values
    assert [answer[0]["score"] for answer in answers] == pytest.approx(made.test.confidence, abs=1e-4)


@pytest.mark.parametrize("family", ["beit", "dinov2", "clip", "swin"])
def test_a_class_that_pools_otherwise_is_refused(family: str, tmp_path: Path) -> None:
    backbone = dt.load(saved(tmp_path, family))
    with pytest.raises(UserError, match="merge it without its head"):
        whole(backbone, head_for(task(), backbone, 0))
