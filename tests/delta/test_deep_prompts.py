"""Prompts before every block: against loops written by hand, and against what the shallow form carries through."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.backbone.families import build, inputs
from torch import Tensor, nn

import deltatune as dt
from deltatune.backbone.load import Backbone
from deltatune.delta.delta import Delta
from deltatune.delta.exchange.peft import export
from deltatune.errors import RoutingError, SiteError, UserError

N, WIDTH = 3, 32
DEEP = dt.Prompt(n=N, at="embed block")


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def made(family: str, spec: Any = DEEP) -> tuple[Backbone, Delta]:
    backbone = Backbone(build(family).double().eval(), name=family)
    return backbone, drawn(Delta.build(spec, backbone, name="deep"))


def drawn(delta: Delta, seed: int = 0) -> Delta:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return delta


def prompts(delta: Delta) -> list[Tensor]:
    """The prompt of the input and of each block after the first, in order."""
    found = {site.block or 0: layer.get_parameter("prompt").detach() for site, layer in delta.at_sites()}
    return [found[number] for number in sorted(found)]


def behind_first(h: Tensor, prompt: Tensor, *, instead: bool = False) -> Tensor:
    rest = h[:, 1 + N :] if instead else h[:, 1:]
    return torch.cat([h[:, :1], prompt.expand(len(h), -1, -1), rest], dim=1)


@pytest.mark.parametrize("beside", [0, 2])
def test_vit_is_the_loop_of_the_paper(beside: int) -> None:
    backbone, delta = made("vit", DEEP | dt.Prompt(n=beside) if beside else DEEP)
    network: Any = backbone.trunk
    pixels = inputs("vit")["pixel_values"].double()
    shallow = delta.layers["1/encoder:embed"].get_parameter("prompt").detach() if beside else torch.zeros(0, WIDTH)
    own = [layer.get_parameter("prompt").detach() for site, layer in delta.at_sites() if len(layer.prompt) == N]
    h = behind_first(network.embeddings(pixels), torch.cat([own[0], shallow]))
    for number, block in enumerate(network.layers):
        h = block(behind_first(h, own[number], instead=True) if number else h)
    expected = network.layernorm(torch.cat([h[:, :1], h[:, 1 + N + beside :]], dim=1))
    with dt.adapt(backbone, delta) as adapted, torch.no_grad():
        torch.testing.assert_close(adapted(pixel_values=pixels).last_hidden_state, expected)


def test_bert_is_the_loop_of_the_paper_on_padded_rows() -> None:
    backbone, delta = made("bert")
    network: Any = backbone.trunk
    ids = torch.randint(5, 60, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    own = prompts(delta)
    h = network.embeddings(inputs_embeds=behind_first(network.embeddings.word_embeddings(ids), own[0]))
    long = torch.cat([mask[:, :1], mask.new_ones(2, N), mask[:, 1:]], dim=1)
    bias = torch.where(long[:, None, None, :].bool(), 0.0, torch.finfo(h.dtype).min)
    for number, block in enumerate(network.encoder.layer):
        h = block(behind_first(h, own[number], instead=True) if number else h, bias)
    expected = torch.cat([h[:, :1], h[:, 1 + N :]], dim=1)
    with dt.adapt(backbone, delta) as adapted, torch.no_grad():
        got = adapted(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("family", ["llama", "gpt2", "albert", "t5", "dinov2", "bart"])
def test_what_the_shallow_form_carries_through_gives_its_own_output(family: str) -> None:
    backbone, delta = made(family, dt.Prompt(n=N))
    rows = inputs(family, rows=1)
    deep = Delta.build(DEEP, backbone, name="deep")
    first = 0 if backbone.kind in ("decoder", "encoder-decoder") else 1
    carried: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        h = args[0] if args else kwargs["hidden_states"]
        carried.append(h[0, first : first + N].detach())

    blocks = [site for site in backbone.anatomy.sites if site.name == "block" and site.stack == stack_of(backbone)]
    with dt.adapt(backbone, delta) as adapted, torch.no_grad():
        hooks = [
            backbone.module.get_submodule(path).register_forward_pre_hook(keep, with_kwargs=True)
            for path in dict.fromkeys(site.exit for site in blocks)
        ]
        expected = adapted(**rows, use_cache=False)[0] if family == "gpt2" else adapted(**rows)[0]
        for hook in hooks:
            hook.remove()
    assert len(carried) == len(blocks)
    with torch.no_grad():
        for site, layer in deep.at_sites():
            value = prompts(delta)[0] if site.block is None else carried[site.block]
            layer.get_parameter("prompt").copy_(value)
    with dt.adapt(backbone, deep) as adapted, torch.no_grad():
        torch.testing.assert_close(adapted(**rows)[0], expected)


def stack_of(backbone: Backbone) -> str:
    return "encoder" if backbone.kind == "encoder-decoder" else next(iter(backbone.anatomy.depth))


def test_what_a_block_makes_of_its_prompt_is_dropped_in_the_deep_form_alone() -> None:
    for spec, same in ((DEEP, True), (dt.Prompt(n=N), False)):
        backbone, delta = made("bert", spec)
        rows = inputs("bert")
        block: nn.Module = backbone.trunk.encoder.layer[0]  # type: ignore[union-attr, index, assignment]

        def disturb(module: nn.Module, args: Any, output: Any) -> Any:
            h = output if isinstance(output, Tensor) else output[0]
            h = h.clone()
            h[:, 1 : 1 + N] += 1.0
            return h if isinstance(output, Tensor) else (h, *output[1:])

        with dt.adapt(backbone, delta) as adapted, torch.no_grad():
            before = adapted(**rows).last_hidden_state
            hook = block.register_forward_hook(disturb)
            after = adapted(**rows).last_hidden_state
            hook.remove()
        assert torch.equal(before, after) is same


@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_rows_of_other_lengths_and_forms_are_as_alone(family: str) -> None:
    backbone, deep = made(family)
    others = [
        drawn(Delta.build(spec, backbone, name=name), seed)
        for seed, (name, spec) in enumerate(
            {
                "long": dt.Prompt(n=5, at="embed block"),
                "part": dt.Prompt(n=2, at="embed block", blocks="1:"),
                "two": dt.Prompt(n=2) | dt.Prompt(n=1, at="embed block") | dt.LoRA(r=2),
                "shallow": dt.Prompt(n=4),
            }.items(),
            1,
        )
    ]
    routes = ["two", "deep", None, "long", "deep", "shallow", "part"]
    rows = inputs(family, rows=len(routes))
    if "attention_mask" in rows:
        side = slice(0, 2) if family == "llama" else slice(5, 7)
        rows["attention_mask"][::2, side] = 0
    with dt.adapt(backbone, deep, *others) as adapted, torch.no_grad():
        together = adapted(**rows, deltas=routes)[0]
        for number, route in enumerate(routes):
            alone = adapted(**{k: v[number : number + 1] for k, v in rows.items()}, deltas=route)[0][0]
            real = rows["attention_mask"][number].bool() if "attention_mask" in rows else ...
            torch.testing.assert_close(together[number][real], alone[real], msg=lambda m, r=route: f"{r}: {m}")


def test_generation_puts_them_in_once() -> None:
    backbone, delta = made("llama")
    backbone.module.generation_config.eos_token_id = None  # type: ignore[union-attr]
    ids = torch.tensor([[7]])
    with dt.adapt(backbone, delta) as adapted, torch.no_grad():
        expected = ids
        for _ in range(12):
            expected = torch.cat([expected, adapted(expected).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(adapted.generate(ids, max_new_tokens=12, do_sample=False), expected)
        # Guesses of so many tokens that a later pass has as many positions as the first.
        guessed = adapted.generate(ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=N)
        assert torch.equal(guessed, expected)


def test_sites() -> None:
    backbone = Backbone(build("t5"), name="t5")
    assert [site.key for site in DEEP.sites(backbone)] == ["encoder.embed", "encoder.1.block"]
    backbone = Backbone(build("bert"), name="bert")
    assert Delta.build(DEEP, backbone).trainable() == 2 * N * WIDTH
    assert Delta.build(dt.Prompt(n=N, at="embed block", tie="prompt"), backbone).trainable() == N * WIDTH
    for at in ("block", "embed attn", "attn.q"):
        with pytest.raises(SiteError, match="'embed block'"):
            Delta.build(dt.Prompt(n=N, at=at), backbone)
    with pytest.raises(SiteError, match="takes no prompt"):
        Delta.build(DEEP, Backbone(build("swin"), name="swin"))


def test_a_block_of_other_positions_is_refused() -> None:
    backbone, delta = made("vit")
    block: nn.Module = backbone.trunk.layers[1]  # type: ignore[union-attr, index, assignment]
    hook = block.register_forward_pre_hook(lambda module, args: (args[0][:, :-1], *args[1:]))
    with dt.adapt(backbone, delta) as adapted, torch.no_grad(), pytest.raises(RoutingError, match="no prompt fits"):
        adapted(**{k: v.double() for k, v in inputs("vit").items()})
    hook.remove()


def test_it_is_saved_and_loaded_and_peft_has_none(tmp_path: Path) -> None:
    backbone, delta = made("llama")
    delta.save(str(tmp_path / "it"))
    again = Delta.load(str(tmp_path / "it"), backbone)
    rows = inputs("llama")
    with dt.adapt(backbone, delta) as adapted, torch.no_grad():
        before = adapted(**rows).logits
    with dt.adapt(backbone, again) as adapted, torch.no_grad():
        assert torch.equal(adapted(**rows).logits, before)
    with pytest.raises(UserError, match="not before blocks"):
        export(again, backbone)
