"""Without padding a batch gives what it gives with it, hidden states and gradients, for every family that allows it."""

from __future__ import annotations

import pytest
import torch
from tests.fit.tiny import backbone
from torch import Tensor

from deltatune.backbone.load import Backbone
from deltatune.compose.expression import parse
from deltatune.delta import packing
from deltatune.delta.adapted import Adapted
from deltatune.delta.delta import Delta
from deltatune.delta.packing import _grid, pack

DELTAS = (
    "lora",
    "adapter(m=4)",
    "bitfit",
    "ia3",
    "prefix(n=3)",
    "parallel_adapter(m=4)",
    "lora(r=4)",
    "lora | adapter(m=4)",
)
LENGTHS = (9, 2, 14, 5, 3, 7, 1, 11, 4, 6)
PACKS = ("bert", "roberta", "distilbert", "gpt2", "llama")
PADS = ("t5",)  # positions cannot be given


def inputs(on: Backbone, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 90, (len(lengths), max(lengths)), generator=draw)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    pad = getattr(on.module.config, "pad_token_id", None) or 0
    return {"input_ids": torch.where(mask == 1, ids, torch.tensor(pad)), "attention_mask": mask}


def moved(delta: Delta, seed: int) -> Delta:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    return delta


def attached(on: Backbone, texts: tuple[str, ...] = DELTAS) -> Adapted:
    return Adapted(on, [moved(Delta.build(parse(text), on, name=f"{n} {text}"), n) for n, text in enumerate(texts)])


def ran(adapted: Adapted, batch: dict[str, Tensor], route: list[str | None]) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states of real tokens, and gradients of a loss that weighs every value differently."""
    adapted.bank.zero_grad()
    hidden = adapted.encode(dict(batch), deltas=route)
    real = hidden[batch["attention_mask"].bool()]
    weights = torch.randn(real.shape, generator=torch.Generator().manual_seed(2), dtype=real.dtype)
    (real * weights).sum().backward()
    return real.detach(), {n: p.grad.clone() for n, p in adapted.bank.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("family", PACKS)
def test_packed_is_padded(family: str, batched: bool, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    on = backbone(family, torch.float64)
    adapted = attached(on)
    adapted.batched = batched
    adapted.bank.train(training).double()
    names = adapted.bank.names
    # Out of order, some rows bare, some deltas twice: two of one kind have different numbers of tokens.
    route = [names[i] if i is not None else None for i in (0, 6, 0, 1, None, 2, 4, 3, 7, 5)]
    seen: list[bool] = []
    own = packing.unpack
    monkeypatch.setattr("deltatune.delta.adapted.unpack", lambda *a: (seen.append(True), own(*a))[1])
    for texts in (route, [names[0], names[6]] * 5, [names[0]] * 10, [None] * 10, [*names, names[0], names[6]]):
        seen.clear()
        packed, gradients = ran(adapted, inputs(on), texts) if texts != [None] * 10 else (bare(adapted, inputs(on)), {})
        assert seen == [True]
        monkeypatch.setattr(packing, "WASTE", 2.0)
        padded, wanted = ran(adapted, inputs(on), texts) if texts != [None] * 10 else (bare(adapted, inputs(on)), {})
        assert seen == [True]
        monkeypatch.setattr(packing, "WASTE", 0.1)
        torch.testing.assert_close(packed, padded, rtol=1e-9, atol=1e-9)
        assert gradients.keys() == wanted.keys()
        for name, value in gradients.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-7, atol=1e-9)


def bare(adapted: Adapted, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return adapted.encode(dict(batch), deltas=None)[batch["attention_mask"].bool()]


@pytest.mark.parametrize("family", PACKS)
def test_padding_comes_back_as_zeros_in_its_place(family: str) -> None:
    on = backbone(family)
    with torch.no_grad(), attached(on, ("lora",)) as adapted:
        hidden = adapted.encode(inputs(on))
    assert hidden.shape == (len(LENGTHS), max(LENGTHS), on.width)
    assert not hidden[inputs(on)["attention_mask"] == 0].any()


@pytest.mark.parametrize("family", PADS)
def test_a_backbone_that_cannot_is_found_out_and_runs_padded(family: str) -> None:
    on = backbone(family)
    with torch.no_grad(), attached(on, ("lora",)) as adapted:
        assert not adapted.packs
        hidden = adapted.encode(inputs(on))
    assert hidden[inputs(on)["attention_mask"] == 0].any()


@pytest.mark.parametrize("family", PACKS)
def test_a_backbone_whose_rows_leak_is_found_out(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if its attention looked at its neighbours: nothing in its signature tells."""
    on = backbone(family)
    adapted = attached(on, ("lora",))
    own = packing.Packed.buckets.func  # type: ignore[attr-defined]

    def one_row(self: packing.Packed) -> packing.Grid:
        return _grid([[(0, self.tokens)]], self.device)

    monkeypatch.setattr(packing.Packed, "buckets", property(one_row))
    assert not adapted.packs
    monkeypatch.setattr(packing.Packed, "buckets", property(own))
    packing._offsets.clear()
    assert adapted.packs


def test_roberta_begins_after_its_padding_and_bert_at_zero() -> None:
    for family, offset in (("bert", 0), ("gpt2", 0), ("roberta", backbone("roberta").module.config.pad_token_id + 1)):
        adapted = attached(backbone(family), ("lora",))
        assert packing.offset_of(adapted.source, adapted._bare) == offset


@pytest.mark.parametrize(
    "delta", ["prompt(n=2)", "lora(dropout=0.1)"]
)  # fmt: skip
def test_deltas_that_need_rows_run_padded(delta: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = attached(backbone(), (delta,))
    monkeypatch.setattr("deltatune.delta.adapted.pack", lambda *_: pytest.fail("packed"))
    adapted.bank.train()
    assert adapted.encode(inputs(adapted.source)).requires_grad


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda mask: torch.ones_like(mask), "no padding"),
        (lambda mask: mask.flip(1), "padding on the left"),
        (lambda mask: mask.index_fill(0, torch.tensor([3]), 0), "a row of nothing"),
        (lambda mask: torch.cat([mask[:, :1], 0 * mask[:, 1:2], mask[:, 2:]], dim=1), "a hole"),
    ],
)
def test_other_batches_are_left_as_they_are(change, why) -> None:
    adapted = attached(backbone(), ("lora",))
    made = inputs(adapted.source)
    made["attention_mask"] = change(made["attention_mask"])
    assert pack(adapted.source, adapted._bare, made, None) is None, why
    assert pack(adapted.source, adapted._bare, inputs(adapted.source), None) is not None


def test_a_pairs_types_go_with_its_tokens() -> None:
    on = backbone()
    made = inputs(on)
    made["token_type_ids"] = (torch.arange(max(LENGTHS)) > 2).long().expand(len(LENGTHS), -1) * made["attention_mask"]
    with torch.no_grad(), attached(on, ("lora",)) as adapted:
        got = adapted.encode(dict(made))
        plain = adapted.backbone  # rows one by one have no padding
        for row, length in enumerate(LENGTHS):
            alone = adapted.encode({name: value[row : row + 1, :length] for name, value in made.items()})
            torch.testing.assert_close(got[row, :length], alone[0], rtol=1e-4, atol=1e-5)
        assert plain is on.module
