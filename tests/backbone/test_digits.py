"""The image backbone that is trained here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import deltatune as dt
from deltatune.backbone import digits
from deltatune.errors import BackboneError


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_before_it_is_made_the_command_is_named(empty_cache: Path) -> None:
    with pytest.raises(BackboneError, match="digits-vit is trained on this machine .* -m deltatune.backbone.digits"):
        dt.load("digits-vit")
    with pytest.raises(BackboneError, match="nearest: digits-vit"):
        dt.load("digit-vit")


def test_it_is_made_once_and_the_same_from_its_seed(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "RECIPE", {**digits.RECIPE, "epochs": 2, "least": 0.0})
    before = torch.random.get_rng_state()
    told = digits.make()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (told["rows"], told["held_out"]) == (721, 180)
    first = dt.load("digits-vit")
    assert digits.make() == told  # read, not trained again
    assert first.fingerprint() == dt.load("digits-vit").fingerprint()
    model, again = digits._trained()
    assert again == told
    for name, value in model.state_dict().items():
        assert torch.equal(first.module.state_dict()[name], value)
    assert [path.name for path in (empty_cache / "deltatune").iterdir()] == ["digits-vit-1"]


def test_one_that_has_not_learnt_is_not_kept(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "RECIPE", {**digits.RECIPE, "epochs": 1, "least": 1.01})
    with pytest.raises(RuntimeError, match="expected 101%"):
        digits.make()
    assert not (empty_cache / "deltatune").exists()


def test_pixels_of_its_training_are_what_its_processor_gives(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sklearn.datasets import load_digits

    monkeypatch.setattr(digits, "RECIPE", {**digits.RECIPE, "epochs": 1, "least": 0.0})
    digits.make()
    from deltatune.heads.pixels import pixels

    task = dt.task("digits_5_9")
    given = pixels([row["image"] for row in task.train[:8]], dt.load("digits-vit"))
    known = {tuple((image / 8 - 1).flatten().round(2)) for image in load_digits().images}
    for image in given:
        near = min(float(abs(torch.tensor(one) - image[0].flatten()).max()) for one in known)
        assert near < 0.02


@pytest.mark.slow
def test_it_knows_its_digits_and_a_delta_learns_the_others(empty_cache: Path) -> None:
    assert digits.make()["accuracy"] > 0.95
    run = dt.fit("digits-vit", dt.LoRA(), "digits_5_9", epochs=12)
    scores = {trained.plan.label: trained.metrics["test"]["accuracy"] for trained in run.trained}
    head = scores.pop("head")
    assert [score > max(0.88, head) for score in scores.values()] == [True]
