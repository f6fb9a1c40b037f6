"""Tiny random networks for images, and folders of them with their image processors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn

IMAGE = dict(image_size=8, patch_size=2, num_channels=3)
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, **IMAGE)
FAMILIES: dict[str, Callable[[], Any]] = {
    "vit": lambda: hf.ViTConfig(**SMALL),
    "deit": lambda: hf.DeiTConfig(**SMALL),
    "beit": lambda: hf.BeitConfig(**SMALL),
    "swin": lambda: hf.SwinConfig(embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2, **IMAGE),
    "dinov2": lambda: hf.Dinov2Config(**SMALL),
    "clip": lambda: hf.CLIPVisionConfig(**SMALL),
    "siglip": lambda: hf.SiglipVisionConfig(**SMALL),
}
PROCESSORS = {
    "vit": "ViTImageProcessor", "deit": "DeiTImageProcessor", "beit": "BeitImageProcessor", "swin": "ViTImageProcessor",
    "dinov2": "BitImageProcessor", "clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor",
}  # fmt: skip


def stirred(module: nn.Module) -> nn.Module:
    """Wider weights: at the default 0.02 the blocks do next to nothing."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    return module.eval()


def network(family: str) -> nn.Module:
    """A tiny random network, the same each time."""
    torch.manual_seed(0)
    return stirred(hf.AutoModel.from_config(FAMILIES[family]()))


def with_processor(folder: Path, family: str) -> Path:
    """Write the family's image processor into a folder, for 8 x 8 pixels."""
    size = {"shortest_edge": 8} if family in ("clip", "dinov2") else {"height": 8, "width": 8}
    config = {"image_processor_type": PROCESSORS[family], "do_resize": True, "size": size}
    if family in ("clip", "dinov2", "deit"):
        config |= {"do_center_crop": True, "crop_size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


def saved(folder: Path, family: str) -> Path:
    """A folder as the hub has it: weights, config, image processor."""
    network(family).save_pretrained(folder)
    return with_processor(folder, family)


def saved_pair(folder: Path) -> Path:
    """A whole CLIP: an image network and a text network."""
    text = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    torch.manual_seed(0)
    config = hf.CLIPConfig(text_config=text, vision_config=SMALL, projection_dim=16)
    stirred(hf.CLIPModel(config)).save_pretrained(folder)
    return with_processor(folder, "clip")
