"""accelerate's dispatch and offloading: its hooks and ours on the same modules, and where a delta's parameters lie."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers as hf
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tests.engine.subjects import SPECS, adapted, backward, close, subject
from torch import Tensor, nn

import deltatune as dt
from deltatune.backbone.fingerprint import compare
from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Site
from deltatune.compose.expression import parse
from deltatune.delta.adapted import Adapted
from deltatune.delta.delta import Delta
from deltatune.delta.layer import Layer, Params, constant
from deltatune.delta.merge import merge
from deltatune.delta.method import Family, Method
from deltatune.errors import BackboneError, SiteError
from deltatune.laws.families import SMALL, tiny
from deltatune.laws.subject import Subject, made

# The first block on the disk, all else in memory.
PARTS = {
    "bert": ("encoder.layer.0", "embeddings", "encoder.layer.1", "pooler"),
    "llama": ("model.layers.0", "model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"),
    "t5": ("encoder.block.0", "shared", "encoder.embed_tokens", "encoder.block.1", "encoder.final_layer_norm", "decoder", "lm_head"),
}  # fmt: skip
KINDS = ("dispatched", "offloaded to memory", "offloaded to the disk", "one block on the disk")


def placed(family: str, kind: str, folder: Path) -> Backbone:
    module, cpu = tiny(family), torch.device("cpu")
    if kind == "dispatched":
        dispatch_model(module, {"": "cpu"}, force_hooks=True)
    elif kind == "offloaded to memory":
        cpu_offload(module, cpu)
    elif kind == "offloaded to the disk":
        disk_offload(module, str(folder), cpu)
    else:
        places = {part: "disk" if part == PARTS[family][0] else "cpu" for part in PARTS[family]}
        dispatch_model(module, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)
    assert any(p.is_meta for p in module.parameters()) == (kind != "dispatched")
    return Backbone(module, name=family)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", PARTS)
@pytest.mark.parametrize("text", SPECS)
def test_a_placed_backbone_gives_what_a_whole_one_does(text: str, family: str, kind: str, tmp_path: Path) -> None:
    held = subject(text, family)
    route, rows = ["one", "two", "one", None], held.rows(4)
    whole = adapted(text, held.fresh(torch.float32), "one", "two")
    wanted = held.run(whole, rows, route)
    on = placed(family, kind, tmp_path)
    next(on.module.parameters()).requires_grad_(False)  # one that the user froze
    flags = {name: p.requires_grad for name, p in on.module.named_parameters()}
    assert len(set(flags.values())) == 2
    model = adapted(text, on, "one", "two")
    assert {p.device.type for p in model.bank.parameters()} == {"cpu"}
    got = held.run(model, rows, route)
    close(got, wanted, 1e-6)
    before = backward(whole, wanted, rows)
    for name, gradient in backward(model, got, rows).items():
        torch.testing.assert_close(gradient, before[name], rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in on.module.parameters())
    if held.backbone.kind != "encoder":
        batch = held.batch(rows, left=held.backbone.kind == "decoder")
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        settings: dict[str, Any] = dict(deltas=route, max_new_tokens=4, do_sample=False)
        assert model.generate(**inputs, **settings).tolist() == whole.generate(**inputs, **settings).tolist()
    model.remove()
    bare = held.cut(on.module(**held.batch(rows)), rows)
    close(bare, held.run(whole, rows, None), 1e-6)
    assert {name: p.requires_grad for name, p in on.module.named_parameters()} == flags


@pytest.mark.parametrize("kind", KINDS[1:])
def test_fingerprint_is_that_of_the_weights_wherever_they_lie(kind: str, tmp_path: Path) -> None:
    on = placed("bert", kind, tmp_path)
    assert compare(Backbone(tiny("bert")).fingerprint(), on.fingerprint()) == "same"
    delta = Delta.build(parse("lora"), Backbone(tiny("bert")))
    delta.save(str(tmp_path / "it"))
    assert dt.adapt(on, Delta.load(str(tmp_path / "it"), on)).bank.names == ["lora"]


def test_what_writes_weights_is_refused_where_they_are_offloaded(tmp_path: Path) -> None:
    on = placed("bert", "one block on the disk", tmp_path)
    with pytest.raises(
        SiteError, match="delta 'full' changes the weights themselves, and those of 'bert' are offloaded"
    ):
        dt.adapt(on, parse("full"))
    with pytest.raises(SiteError, match="'lora' cannot be merged: weights of 'bert' are offloaded; load it whole"):
        merge(on, Delta.build(parse("lora"), on))


def test_layers_lie_where_their_sites_compute() -> None:
    """The second block computes elsewhere; the meta device stands for a second accelerator here."""
    on = Backbone(tiny("llama"))
    delta = Delta.build(parse("lora | prefix | ia3 | prompt"), on)
    for part in on.module.get_submodule("model.layers.1").modules():
        add_hook_to_module(part, AlignDevicesHook(execution_device="meta"))
    delta.place(on)
    for site, layer in delta.at_sites():
        wanted = "meta" if site.block == 1 else "cpu"
        assert {p.device.type for p in layer.parameters()} == {wanted}, site.key


@pytest.mark.skipif(not torch.cuda.is_available(), reason="two devices: needs a GPU beside the processor")
@pytest.mark.parametrize("text", SPECS)
def test_blocks_on_two_devices(text: str) -> None:
    held = subject(text, "llama")
    route, rows = ["one", "two", "one", None], held.rows(4)
    wanted = held.run(adapted(text, held.fresh(torch.float32), "one", "two"), rows, route)
    places = {part: "cpu" if part == "model.layers.1" else 0 for part in PARTS["llama"]}
    on = Backbone(dispatch_model(copy.deepcopy(held.backbone.module), places, main_device=0))
    model = adapted(text, on, "one", "two")
    close([o.cpu() for o in held.run(model, rows, route)], wanted, 1e-4)


def test_weights_that_were_never_loaded_are_said() -> None:
    with torch.device("meta"):
        module = hf.BertModel(hf.BertConfig(**SMALL))
    with pytest.raises(BackboneError, match="was never loaded"):
        dt.adapt(Backbone(module, name="empty"), parse("lora"))


AUTOCAST = ("bert", "llama", "t5")


@pytest.mark.parametrize("family", AUTOCAST)
@pytest.mark.parametrize("text", [*SPECS, "full"])
def test_autocast_computes_in_bfloat16_and_learns_in_float32(text: str, family: str) -> None:
    held = Subject(parse(text), Backbone(tiny(family), name=family))
    model = adapted(text, held.fresh(torch.float32), "one", "two")
    rows, route = held.rows(4), ["one"] * 4 if text == "full" else ["one", "two", "one", None]
    model.bank.train()
    wanted = held.run(model, rows, route)
    before = backward(model, wanted, rows)
    dtypes: set[torch.dtype] = set()
    linear = next(m for m in model.backbone.modules() if isinstance(m, nn.Linear))
    handle = linear.register_forward_hook(lambda _m, _i, output: dtypes.add(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        together = held.run(model, rows, route)
        alone = [held.run(model, [row], name)[0] for row, name in zip(rows, route, strict=True)]
    handle.remove()
    assert dtypes == {torch.bfloat16}
    close([o.float() for o in together], wanted, 5e-2)
    close([o.float() for o in together], [o.float() for o in alone], 2e-2)
    after = backward(model, together, rows)
    assert {g.dtype for g in after.values() if g is not None} == {torch.float32}
    left, right = (torch.cat([g.flatten() for g in found.values() if g is not None]) for found in (after, before))
    assert float(nn.functional.cosine_similarity(left, right, dim=0)) > 0.97


class Steady(Method):
    """Shift a linear's output, computed in float32 whatever the site is in: what a careful layer does."""

    family: ClassVar[Family] = "specification"
    paper: ClassVar[str] = "none"
    rate: ClassVar[float] = 1e-2

    at: str = "attn.q ffn.up"

    def layer(self, site: Site, generator: torch.Generator) -> Layer:
        return SteadyLayer(site.d_out)


class SteadyLayer(Layer):
    """h + d."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = constant((width,), 0.0)

    def forward(self, p: Params, x: Tensor | None, h: Tensor) -> Tensor:
        return h.float() + p.bias.float()


@pytest.mark.parametrize("route", ["one", ["one", "two", "two", "one"]], ids=["one delta", "several"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_site_keeps_the_dtype_of_its_module(packed: bool, route: Any) -> None:
    """Else all that follows would compute in float32 under autocast, or fail in a bfloat16 network."""
    held = Subject(Steady(), Backbone(tiny("bert"), name="bert"))
    on = held.fresh(torch.float32)
    model = Adapted(on, [made(held.spec, on, name, seed=seed) for seed, name in enumerate(("one", "two"))])
    seen: dict[str, torch.dtype] = {}
    for name, part in on.module.named_modules():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(lambda _m, _i, output, name=name: seen.__setitem__(name, output.dtype))
    rows = held.rows(4)

    def run(adapted: Adapted) -> Tensor:
        return adapted.encode(held.batch(rows), deltas=route) if packed else torch.cat(held.run(adapted, rows, route))

    assert model.packs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(model)
    assert set(seen.values()) == {torch.bfloat16}
    on.module.to(torch.bfloat16)
    model.bank.to(torch.bfloat16)
    assert run(model).dtype == torch.bfloat16


def test_autocast_generates() -> None:
    """Each step gives the scores that the deltas give to what is written so far, in float32."""
    held = subject("lora(r=2) | prefix(n=2) | prompt(n=2)", "llama")
    model = adapted(str(held.spec), held.fresh(torch.float32), "one", "two")
    batch = held.batch(held.rows(4), left=True)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    route, steps = ["one", None, "two", "one"], 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = model.generate(
            **inputs, deltas=route, max_new_tokens=steps, do_sample=False, eos_token_id=[],
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    ids, mask = made.sequences, nn.functional.pad(inputs["attention_mask"], (0, steps), value=1)
    whole = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    wanted, bare = (model(**whole, deltas=names).logits[:, -steps - 1 : -1] for names in (route, None))
    close(list(torch.stack(made.logits, dim=1)), list(wanted), 2e-2)
    apart = (wanted - bare).abs().amax(dim=(1, 2))
    assert (apart[[0, 2, 3]] > 0.5).all() and apart[1] < 1e-5


def test_loading_with_a_device_map(tmp_path: Path) -> None:
    """What `from_pretrained(device_map=...)` gives is a backbone like any other."""
    tiny("llama").save_pretrained(tmp_path / "model")
    module = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map={"": "cpu"})
    held = subject("lora(r=2)", "llama")
    rows = held.rows(3)
    model = adapted("lora(r=2)", Backbone(module))
    got = held.run(model, rows, "one")
    close(got, held.run(adapted("lora(r=2)", held.fresh(torch.float32)), rows, "one"), 1e-6)
    assert all((one - bare).abs().max() > 0.1 for one, bare in zip(got, held.run(model, rows, None), strict=True))
