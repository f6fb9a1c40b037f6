"""Visual prompts: among the patches, out again before anything reads them, row by row."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.heads.picture_models import FAMILIES, network
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.compose.expression import parse
from deltatune.delta.adapted import Adapted
from deltatune.delta.delta import Delta
from deltatune.errors import SiteError
from deltatune.laws.subject import moved

PROMPTED = ("vit", "deit", "beit", "dinov2", "clip")
ROWS = ["long", None, "short", "thin"]


def pictures(rows: int = 4) -> Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def deltas(backbone: Backbone) -> list[Delta]:
    specs = {"short": "prompt(n=2)", "long": "prompt(n=3)", "thin": "lora(r=2)"}
    return [
        moved(Delta.build(parse(text), backbone, seed=seed, name=name), seed + 1, 0.5)
        for seed, (name, text) in enumerate(specs.items())
    ]


def hooks(backbone: Backbone) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in backbone.module.modules())


def by_hand(backbone: Backbone, prompt: Tensor) -> Tensor:
    """The last hidden states with a prompt after the first position, by a plain hook on a copy of the network."""
    module = copy.deepcopy(backbone.module)

    def put(_: Any, __: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        h = torch.cat([h[:, :1], prompt.expand(len(h), *prompt.shape), h[:, 1:]], dim=1)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    module.embeddings.register_forward_hook(put)
    found = module(pixel_values=pictures()).last_hidden_state
    return torch.cat([found[:, :1], found[:, 1 + len(prompt) :]], dim=1)


@pytest.mark.parametrize("family", PROMPTED)
@torch.no_grad()
def test_a_visual_prompt_is_what_it_is_by_hand(family: str) -> None:
    backbone = Backbone(network(family))
    _, long, _ = made = deltas(backbone)
    prompt = next(layer for _, layer in long.at_sites()).get_parameter("prompt").detach()
    with Adapted(backbone, made) as adapted:
        found = adapted(pixel_values=pictures(), deltas="long").last_hidden_state
    bare = backbone.module(pixel_values=pictures()).last_hidden_state
    torch.testing.assert_close(found, by_hand(backbone, prompt), rtol=1e-4, atol=1e-4)
    assert (found - bare).abs().max() > 1e-3


@pytest.mark.parametrize("family", PROMPTED)
@torch.no_grad()
def test_rows_with_other_prompts_and_none_share_a_batch(family: str) -> None:
    backbone = Backbone(network(family))
    bare = backbone.module(pixel_values=pictures(), output_hidden_states=True)
    held = hooks(backbone)
    with Adapted(backbone, deltas(backbone)) as adapted:
        mixed = adapted(pixel_values=pictures(), deltas=ROWS, output_hidden_states=True)
        for row, name in enumerate(ROWS):
            alone = adapted(pixel_values=pictures(), deltas=name)
            for part in ("last_hidden_state", "pooler_output"):
                torch.testing.assert_close(mixed[part][row], alone[part][row], rtol=1e-4, atol=1e-4)
        assert [h.shape for h in mixed.hidden_states] == [h.shape for h in bare.hidden_states]
    assert hooks(backbone) == held  # those by which transformers records hidden states
    after = backbone.module(pixel_values=pictures()).last_hidden_state
    assert torch.equal(after, bare.last_hidden_state)


def test_a_visual_prompt_has_gradients_and_starts_from_its_seed() -> None:
    backbone = Backbone(network("vit"))
    delta, again = (Delta.build(parse("prompt(n=2)"), backbone, seed=3, name=name) for name in ("a", "b"))
    one, two = (next(layer for _, layer in d.at_sites()).get_parameter("prompt") for d in (delta, again))
    assert torch.equal(one, two) and 0.1 < float(one.detach().abs().max()) < (6 / (3 * 2 * 2 + 32)) ** 0.5
    with Adapted(backbone, [delta]) as adapted:
        adapted(pixel_values=pictures()).last_hidden_state[:, 0].square().sum().backward()
    assert one.grad is not None and float(one.grad.abs().min()) > 0


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(PROMPTED)))
def test_a_network_that_takes_no_prompt_says_so(family: str) -> None:
    backbone = Backbone(network(family))
    wanted = "takes no prompt: one stands among embeddings of text, or in one stack of blocks after a token for the"
    with pytest.raises(SiteError, match=wanted):
        Delta.build(parse("prompt(n=2)"), backbone, name="a")
    made_elsewhere = Delta(parse("prompt(n=2)"), [(0, backbone.anatomy.by_key["encoder.embed"])], name="a")
    with pytest.raises(SiteError, match=wanted):
        Adapted(backbone, [made_elsewhere])
    assert not backbone.module._forward_hooks


@torch.no_grad()
def test_a_classifier_of_texts_keeps_its_logits_under_a_prompt() -> None:
    """Logits [rows, labels] have no positions to take out."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    torch.manual_seed(0)
    backbone = Backbone(BertForSequenceClassification(BertConfig(**sizes, num_labels=5)).eval())
    delta = Delta.build(parse("prompt(n=2)"), backbone, name="a")
    with Adapted(backbone, [delta]) as adapted:
        assert adapted(input_ids=torch.arange(5, 12)[None]).logits.shape == (1, 5)
