"""`digits-vit`: a small image backbone, trained here from scratch on scikit-learn's digits and kept in the cache.

Run as: python -m deltatune.backbone.digits (`make digits`), a minute. It learns to tell 0 from 1, 2, 3 and 4 and
never sees the other five, so that a delta for those has something to adapt. A fifth of the rows is held out to say how
well it does. The weights depend on the seed and, in their last bits, on the machine.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.backbone.embedded import cache_folder
from deltatune.errors import BackboneError

NAME = "digits-vit"
COMMAND = f"{Path(sys.executable).name} -m deltatune.backbone.digits"
RECIPE = {"seed": 0, "epochs": 100, "batch": 32, "lr": 1e-3, "decay": 0.05, "seen": 5, "held_out": 0.2, "least": 0.95}
CONFIG = dict(
    image_size=8, patch_size=2, num_channels=3, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
    intermediate_size=128,
)  # fmt: skip
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 8, "width": 8}, "resample": 2,
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip
KEPT = "training.json"


def folder() -> Path:
    """Return the folder of the trained backbone. BackboneError, with the command that makes it, if there is none."""
    place = _place()
    if not (place / KEPT).is_file():
        raise BackboneError(f"{NAME} is trained on this machine and not made yet; make it, in a minute: {COMMAND}")
    return place


def _place() -> Path:
    return cache_folder() / f"{NAME}-1"  # the number rises when the recipe changes


def make() -> dict[str, Any]:
    """Train the backbone unless it is there, and return what is kept of its training: recipe, rows, accuracy.

    RuntimeError if it is right on too few of the held-out rows.
    """
    target = _place()
    if (target / KEPT).is_file():
        told: dict[str, Any] = json.loads((target / KEPT).read_text(encoding="utf-8"))
        return told
    model, told = _trained()
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=target.parent))
    try:
        model.save_pretrained(work)
        (work / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2), encoding="utf-8")
        (work / KEPT).write_text(json.dumps(told, indent=2), encoding="utf-8")
        try:
            os.rename(work, target)
        except OSError:  # another process was first
            if not (target / KEPT).is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return told


def _trained() -> tuple[Any, dict[str, Any]]:
    from transformers import ViTConfig, ViTModel
    from transformers.utils import logging

    logging.disable_progress_bar()

    train, train_y, held, held_y = _rows()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(RECIPE["seed"]))
        model = ViTModel(ViTConfig(**CONFIG))
        head = nn.Linear(model.config.hidden_size, int(RECIPE["seen"]))
        steps = int(RECIPE["epochs"]) * (len(train) // int(RECIPE["batch"]))
        optimiser = torch.optim.AdamW(
            [*model.parameters(), *head.parameters()], lr=RECIPE["lr"], weight_decay=RECIPE["decay"]
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RECIPE["lr"], total_steps=steps)
        model.train()
        for _ in range(int(RECIPE["epochs"])):
            for rows in torch.randperm(len(train)).split(int(RECIPE["batch"])):
                if len(rows) < RECIPE["batch"]:
                    continue
                scores = head(model(_shifted(train[rows])).last_hidden_state[:, 0])
                loss = nn.functional.cross_entropy(scores, train_y[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    model.eval()
    with torch.no_grad():
        found = head(model(held).last_hidden_state[:, 0]).argmax(dim=-1)
        accuracy = float((found == held_y).float().mean())
    if accuracy < RECIPE["least"]:
        raise RuntimeError(f"{NAME} is right on {accuracy:.1%} of its held-out rows, expected {RECIPE['least']:.0%}")
    return model, {"recipe": RECIPE, "rows": len(train), "held_out": len(held), "accuracy": accuracy}


def _rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels [rows, 3, 8, 8] from -1 to 1 and digits [rows], of the rows to train on and of those held out."""
    from sklearn.datasets import load_digits

    held = load_digits()
    seen = torch.tensor(held.target) < RECIPE["seen"]
    pixels = (torch.tensor(held.images).float() / 8 - 1)[seen].unsqueeze(1).repeat(1, 3, 1, 1)  # there 0 to 16
    digits = torch.tensor(held.target)[seen]
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(int(RECIPE["seed"])))
    out, rest = order.split([int(len(order) * RECIPE["held_out"]), len(order) - int(len(order) * RECIPE["held_out"])])
    return pixels[rest], digits[rest], pixels[out], digits[out]


def _shifted(pixels: Tensor) -> Tensor:
    """Pixels of each image moved by up to one in each direction."""
    padded = nn.functional.pad(pixels, (1, 1, 1, 1), value=-1.0)
    moves = torch.randint(0, 3, (len(pixels), 2)).tolist()
    return torch.stack([own[:, y : y + 8, x : x + 8] for own, (y, x) in zip(padded, moves, strict=True)])


if __name__ == "__main__":
    made = make()
    sys.stdout.write(f"{NAME}: right on {made['accuracy']:.1%} of {made['held_out']} held-out rows; {_place()}\n")
