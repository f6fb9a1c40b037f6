"""A network with its head as a class of transformers has it: what a merged delta is saved as, for others to load."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from deltatune.backbone.load import Backbone
from deltatune.errors import UserError
from deltatune.heads.base import Batch
from deltatune.heads.images import ImageClassification
from deltatune.heads.language import Verbalized, Writer
from deltatune.heads.pixels import noise
from deltatune.heads.tokens import TokenClassification

WITHOUT = "merge it without its head (--no-head): the folder then gives hidden states"


def whole(backbone: Backbone, head: nn.Module | None) -> nn.Module:
    """Return the network with the head on it. UserError if no class of transformers scores as this head does."""
    if head is None or isinstance(head, Writer | Verbalized):  # they ask the language model itself
        return backbone.module
    if isinstance(head, TokenClassification):
        return _classifier("AutoModelForTokenClassification", backbone, head)
    if isinstance(head, ImageClassification) and head.pooling == "first":
        return _classifier("AutoModelForImageClassification", backbone, head)
    raise UserError(
        f"no class of transformers scores as {type(head).__name__} does (its classifiers pool otherwise, or have "
        f"layers of their own between); {WITHOUT}"
    )


def _classifier(auto: str, backbone: Backbone, head: TokenClassification | ImageClassification) -> nn.Module:
    import transformers

    config: Any = copy.deepcopy(backbone.module.config)
    config.num_labels = len(head.labels)
    config.id2label = dict(enumerate(head.labels))
    config.label2id = {label: i for i, label in enumerate(head.labels)}
    try:
        model = getattr(transformers, auto).from_config(config).to(backbone.dtype)
    except ValueError as error:
        what = auto.removeprefix("AutoModelFor")
        raise UserError(f"transformers has no {what} for {config.model_type!r}; {WITHOUT}") from error
    trunk = getattr(backbone.module, "base_model", backbone.module)
    lacking = model.base_model.load_state_dict(trunk.state_dict(), strict=False).missing_keys
    inside = {id(module) for module in model.base_model.modules()}
    own = [module for module in model.modules() if isinstance(module, nn.Linear) and id(module) not in inside]
    if lacking or len(own) != 1 or own[0].weight.shape != head.linear.weight.shape or own[0].bias is None:
        raise UserError(
            f"{type(model).__name__} of transformers has other layers after the network than one linear; {WITHOUT}"
        )
    with torch.no_grad():
        own[0].weight.copy_(head.linear.weight)
        own[0].bias.copy_(head.linear.bias)
    made: nn.Module = model.eval()
    if isinstance(head, ImageClassification) and not _scores_alike(backbone, head, made):
        raise UserError(f"{type(model).__name__} of transformers pools otherwise than the head does; {WITHOUT}")
    return made


@torch.no_grad()
def _scores_alike(backbone: Backbone, head: ImageClassification, made: nn.Module) -> bool:
    """Whether both give the same on images of noise: classifiers of images pool in many ways, with equal shapes."""
    batch = Batch({"pixel_values": noise(2, backbone)}, ())
    wanted = head.scores(backbone.trunk(**batch.inputs).last_hidden_state, batch, backbone)
    found = made(**batch.inputs).logits
    return bool((found - wanted).abs().max() <= 1e-3 * wanted.abs().max())
