"""Images as a backbone reads them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.data.images import inline, opened
from deltatune.errors import TaskError

KEPT = 2**28  # most bytes of pixels that are kept of a backbone's images: a step and an epoch read them again
_kept: weakref.WeakKeyDictionary[Any, dict[str, Tensor]] = weakref.WeakKeyDictionary()


def pixels(images: Sequence[str], backbone: Backbone) -> Tensor:
    """Return images as the backbone's processor makes them [rows, channels, height, width], in the backbone's dtype.

    TaskError for an image that cannot be read, for a backbone without a processor, and for images of different sizes
    after it.
    """
    kept = _kept.setdefault(backbone.module, {})
    made = {image: kept.pop(image) for image in dict.fromkeys(images) if image in kept}
    for image in images:
        if image not in made:
            made[image] = _processed(image, backbone)
    if len({tuple(one.shape) for one in made.values()}) > 1:
        shapes = " and ".join(sorted({"x".join(map(str, one.shape)) for one in made.values()})[:2])
        raise TaskError(f"the image processor of {backbone.name} gives images of different sizes: {shapes}")
    kept.update(made)  # at the end: what was read last goes last
    size = next(iter(made.values())).nbytes
    for image in list(kept)[: max(0, len(kept) - KEPT // size)]:
        del kept[image]
    return torch.stack([made[image] for image in images]).to(backbone.device, backbone.dtype)


def noise(rows: int, backbone: Backbone) -> Tensor:
    """Return images of noise as the backbone reads them [rows, channels, height, width], the same at each call."""
    from PIL import Image

    draw = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 256, (rows, 32, 32), dtype=torch.uint8, generator=draw)
    return pixels([inline(Image.fromarray(one.numpy())) for one in drawn], backbone)


def _processed(image: str, backbone: Backbone) -> Tensor:
    if backbone.processor is None:
        raise TaskError(f"{backbone.name} was given without an image processor; load it by name, or set `processor`")
    channels = getattr(getattr(backbone.module, "config", None), "num_channels", 3)
    picture = opened(image).convert("L" if channels == 1 else "RGB")
    made: Tensor = backbone.processor(images=[picture], return_tensors="pt")["pixel_values"][0]
    return made


def positions(image: str, backbone: Backbone) -> int:
    """Return how many positions the backbone gives for an image: patches, and tokens of its own."""
    with torch.no_grad():
        return int(backbone.trunk(pixels([image], backbone)).last_hidden_state.shape[1])
