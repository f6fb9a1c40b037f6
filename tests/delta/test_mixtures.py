"""A LoRA for each expert of a mixture: the formula, rows of several deltas, PEFT's folders both ways."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tests.backbone.families import build
from tests.engine.subjects import close
from torch import Tensor, nn

from deltatune.backbone.load import Backbone
from deltatune.compose.expression import parse
from deltatune.delta.adapted import Adapted, adapt
from deltatune.delta.blend import to_lora
from deltatune.delta.catalogue import find
from deltatune.delta.delta import Delta, generator
from deltatune.delta.exchange.peft import CONFIG, TENSORS, export, write
from deltatune.delta.exchange.vllm import export_for_vllm
from deltatune.delta.experts import folded
from deltatune.delta.merge import merge
from deltatune.errors import BackboneMismatch, DeltaFileError, SiteError, UserError
from deltatune.laws.subject import Subject, moved

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, and ours that the backbone is not verified
FAMILIES = ["mixtral", "qwen2_moe", "olmoe"]
EVERY = "lora(r=2, alpha=3, at='ffn.{up,gate,down}', per_expert=True)"
IDS = torch.randint(5, 90, (4, 7), generator=torch.Generator().manual_seed(0))
PART = {"ffn.gate": 0, "ffn.up": 1}


def built(family: str, text: str, seed: int = 0) -> tuple[Backbone, Delta]:
    backbone = Backbone(build(family), name=family)
    return backbone, moved(Delta.build(parse(text), backbone, name="own", seed=seed), seed=seed)


def computed(model: Any) -> Tensor:
    out: Tensor = model(input_ids=IDS)[0]
    return out


def dense(delta: Delta, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Write W_e + scale B_e A_e into each expert's rows by hand; return the A and B that gradients are for."""
    leaves: list[tuple[Tensor, Tensor]] = []
    for site, layer in delta.at_sites():
        A, B = (layer.get_parameter(name).detach().clone().requires_grad_() for name in ("A", "B"))
        leaves.append((A, B))
        experts: Any = model.get_submodule(site.exit)
        name = "down_proj" if site.name == "ffn.down" else "gate_up_proj"
        weight = experts._parameters.pop(name, None)
        weight = getattr(experts, name) if weight is None else weight
        first = PART.get(site.name, 0) * site.d_out
        rows = []
        for e in range(len(weight)):
            change = torch.zeros_like(weight[e])
            change[first : first + site.d_out] = 1.5 * B[e] @ A[e]
            rows.append(weight[e] + change)
        experts.__dict__[name] = torch.stack(rows)
    return leaves


@pytest.mark.parametrize("family", FAMILIES)
def test_each_expert_has_its_own_product(family: str) -> None:
    backbone, delta = built(family, EVERY)
    plain = build(family)
    bare = computed(plain)
    leaves = dense(delta, plain)
    with adapt(backbone, delta) as on:
        on.bank.train(False)
        ours = computed(on)
        theirs = computed(plain)
        assert float((bare - theirs).detach().abs().max()) > 1e-2
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
        (ours * weights).sum().backward()
        (theirs * weights).sum().backward()
        assert len(leaves) == 3 * len({site.block for site, _ in delta.at_sites()})
        for (_, layer), (A, B) in zip(delta.at_sites(), leaves, strict=True):
            for own, other in ((layer.get_parameter("A"), A), (layer.get_parameter("B"), B)):
                assert own.grad is not None and other.grad is not None
                torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-5 * float(other.grad.abs().max()))


def test_rows_of_several_deltas_are_as_alone() -> None:
    """Equal ones run as one batch; between them rows of the bare backbone, of LoRAs shared by all experts, and others."""
    held = Subject(parse(EVERY), Backbone(build("mixtral"), name="mixtral"))
    backbone = held.fresh()
    texts = {"a": EVERY, "b": EVERY, "shared": "lora(r=3, at='ffn.{up,down} attn.q')", "q": "lora(r=3)"}
    deltas = [
        moved(Delta.build(parse(text), backbone, name=name, seed=seed), seed=seed)
        for seed, (name, text) in enumerate(texts.items())
    ]
    on = Adapted(backbone, deltas)
    on.bank.train(False)
    route = [None, "b", "a", "shared", "a", "q", "b"]
    rows = held.rows(len(route), seed=2)
    batch = held.batch(rows)
    together = held.cut(on(**batch, deltas=route), rows)
    for name in dict.fromkeys(route):
        own = [i for i, other in enumerate(route) if other == name]
        alone = on(**batch, deltas=name)
        for i, row in enumerate(held.cut(alone, rows)):
            if i in own:
                close(together[i], row)


MERGED = [
    EVERY,
    "lora(r=2, at='ffn.{up,down}') | lora(r=2, at='ffn.up attn.q', per_expert=True)",
    "ia3(at='ffn.down') | lora(r=2, at='ffn.down')",
]


@pytest.mark.parametrize("text", MERGED)
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_it_does_the_same_saved_too(tmp_path: Path, family: str, text: str) -> None:
    backbone, delta = built(family, text)
    before = {name: parameter.detach().clone() for name, parameter in backbone.module.named_parameters()}
    with torch.no_grad(), adapt(backbone, delta) as on:
        on.bank.train(False)
        wanted = computed(on)
    merged = merge(backbone, delta)
    assert 0 < len(merged.changes) == len({change.parameter for change in merged.changes})
    with torch.no_grad():
        torch.testing.assert_close(computed(backbone.module), wanted, rtol=1e-4, atol=1e-5)
        backbone.module.save_pretrained(str(tmp_path))  # transformers saves each expert by itself
        again = hf.AutoModelForCausalLM.from_pretrained(str(tmp_path)).eval()
        torch.testing.assert_close(computed(again), wanted, rtol=1e-4, atol=1e-5)
    merged.unmerge()
    assert all(torch.equal(before[name], parameter) for name, parameter in backbone.module.named_parameters())


def test_experts_that_are_turned_and_have_biases() -> None:
    sites = [
        site
        for site in Backbone(build("mixtral")).anatomy.sites
        if site.key in ("decoder.0.ffn.gate", "decoder.0.ffn.up")
    ]
    sites.sort(key=lambda site: site.name)
    gate, up = sites
    layers = [(up, find(name)().layer(up, generator(0))) for name in ("lora", "bitfit")]
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for _, layer in layers for p in layer.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    weight, bias = torch.randn(4, gate.d_in, 2 * up.d_out, generator=draw), torch.randn(4, 2 * up.d_out, generator=draw)
    module = SimpleNamespace(is_transposed=True, gate_up_proj=weight, gate_up_proj_bias=bias)
    made = folded(module, "gate_up_proj", sites, layers, torch.float32)
    (_, lora), (_, shift) = layers
    change = torch.zeros_like(weight)
    change[..., up.d_out :] = 2 * (lora.B @ lora.A).detach().T
    torch.testing.assert_close(made["gate_up_proj"], weight + change)
    torch.testing.assert_close(
        made["gate_up_proj_bias"], bias + torch.cat([torch.zeros(up.d_out), shift.bias.detach()])
    )
    module.gate_up_proj_bias = None
    with pytest.raises(SiteError, match="a bias cannot be merged at decoder.0.ffn.up: its experts have none"):
        folded(module, "gate_up_proj", sites, layers, torch.float32)


def test_what_is_no_matrix_of_an_expert_is_not_merged() -> None:
    backbone, delta = built("mixtral", "ia3(at='ffn.act')")
    with pytest.raises(SiteError, match=r"at decoder.0.ffn.act it acts on what several matrices of an expert read, or"):
        merge(backbone, delta)
    backbone, delta = built("mixtral", EVERY)
    with pytest.raises(SiteError, match="inside a mixture of experts, at decoder.0.ffn.*no one matrix there"):
        to_lora(delta, backbone, rank=2)


def test_dropout_and_saving(tmp_path: Path) -> None:
    backbone, delta = built("mixtral", EVERY.replace("per_expert", "dropout=0.5, per_expert"))
    delta.save(str(tmp_path / "own"))
    loaded = Delta.load(str(tmp_path / "own"), backbone)
    assert loaded.spec == delta.spec
    with adapt(backbone, loaded) as on:
        on.bank.train(False)
        still = computed(on)
        on.bank.train(True)
        torch.manual_seed(0)
        first, second = computed(on), computed(on)
    with adapt(backbone, delta) as on:
        on.bank.train(False)
        assert torch.equal(computed(on), still)
    assert not torch.allclose(first, second) and not torch.allclose(first, still)


def test_another_number_of_experts_is_refused() -> None:
    _, delta = built("mixtral", EVERY)
    fewer = Backbone(build("mixtral"), name="fewer")
    for layer in fewer.module.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            setattr(layer.mlp.experts, name, nn.Parameter(getattr(layer.mlp.experts, name)[:2].detach()))
        layer.mlp.experts.num_experts = 2
    fewer = Backbone(fewer.module, name="fewer")
    with pytest.raises(
        BackboneMismatch, match=r"'decoder.0.ffn.gate' with 4 experts, 'fewer' has 2|'decoder.0.ffn.up'"
    ):
        adapt(fewer, delta, verify=False)


# PEFT's folders


def config_of(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 7, "task_type": "CAUSAL_LM", "target_modules": [], **options})


CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", dict(target_parameters=["experts.down_proj"])),
    ("mixtral", dict(target_parameters=["experts.gate_up_proj"], use_rslora=True)),
    ("mixtral", dict(target_parameters=["experts.gate_up_proj", "experts.down_proj"], target_modules=["q_proj", "v_proj"])),
    ("qwen2_moe", dict(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], target_modules=None)),
    ("olmoe", dict(target_parameters=["0.mlp.experts.down_proj"], target_modules=["embed_tokens", "o_proj"])),
    ("olmoe", dict(target_parameters=["gate_up_proj", "down_proj"], rank_pattern={"down_proj": 2}, alpha_pattern={r"0\.mlp\.experts\.gate_up_proj": 5})),
]  # fmt: skip


def theirs_in(folder: Path, family: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = peft.get_peft_model(build(family), config_of(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(folder))
    return model.eval()


def same(delta: Delta, backbone: Backbone, theirs: nn.Module) -> None:
    with torch.no_grad(), adapt(backbone, delta) as on:
        on.bank.train(False)
        first, second, bare = computed(on), computed(theirs), computed(build(backbone.name))
    assert float((bare - second).abs().max()) > 1e-2
    torch.testing.assert_close(first, second, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize(("family", "options"), CONFIGS)
def test_lora_of_peft_computes_the_same_here(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    theirs = theirs_in(tmp_path / "theirs", family, **options)
    backbone = Backbone(build(family), name=family)
    delta = Delta.load(str(tmp_path / "theirs"), backbone)
    assert delta.trainable() >= sum(p.numel() for p in theirs.parameters() if p.requires_grad)  # gate and up: an A each
    same(delta, backbone, theirs)
    write(export(delta, backbone), tmp_path / "again")
    before, after = load_file(tmp_path / "theirs" / TENSORS), load_file(tmp_path / "again" / TENSORS)
    copies = {key for key in before if key.endswith("base_layer.weight")}  # of the table's own weights
    assert before.keys() - copies == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in after)
    if not copies:
        assert (tmp_path / "theirs" / TENSORS).read_bytes() == (tmp_path / "again" / TENSORS).read_bytes()
    same(delta, backbone, peft.PeftModel.from_pretrained(build(family), str(tmp_path / "again")).eval())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "text",
    [
        EVERY,
        "lora(r=2, at='ffn.{up,down}')",
        "lora(r=2, at='ffn.gate', per_expert=True) | lora(r=3, at='ffn.{gate,up} attn.q')",
        "lora(r=2, at='ffn.down', per_expert=True, blocks='0') | lora(r=4, alpha=5, at='embed')",
    ],
)
def test_ours_computes_the_same_in_peft(tmp_path: Path, family: str, text: str) -> None:
    backbone, delta = built(family, text)
    write(export(delta, backbone), tmp_path / "out")
    same(delta, backbone, peft.PeftModel.from_pretrained(build(family), str(tmp_path / "out")).eval())
    same(Delta.load(str(tmp_path / "out"), backbone), backbone, computed_by(tmp_path / "out", family))


def computed_by(folder: Path, family: str) -> nn.Module:
    model: nn.Module = peft.PeftModel.from_pretrained(build(family), str(folder)).eval()
    return model


OLD = {
    "mixtral": ("block_sparse_moe", {"w1": (48, 32), "w3": (48, 32), "w2": (32, 48)}),
    "olmoe": ("mlp", {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}),
}


def old_folder(folder: Path, family: str, **options: Any) -> dict[str, Tensor]:
    """A folder as PEFT wrote it before transformers 5, where each expert had linears."""
    owner, linears = OLD[family]
    base = f"base_model.model.model.layers.{{}}.{owner}.experts.{{}}.{{}}.lora_{{}}.weight"
    draw = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for block in range(len(build(family).model.layers)):
        for e in range(4):
            for name, (d_out, d_in) in linears.items():
                tensors[base.format(block, e, name, "A")] = 0.3 * torch.randn(3, d_in, generator=draw)
                tensors[base.format(block, e, name, "B")] = 0.3 * torch.randn(d_out, 3, generator=draw)
        for half, shape in (("A", (3, 32)), ("B", (32, 3))):
            key = f"base_model.model.model.layers.{block}.self_attn.o_proj.lora_{half}.weight"
            tensors[key] = 0.3 * torch.randn(shape, generator=draw)
    given = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 7,
        "target_modules": [*linears, "o_proj"],
        "task_type": "CAUSAL_LM",
    }
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(given | options))
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize(("family", "dropout"), [("mixtral", 0.0), ("mixtral", 0.1), ("olmoe", 0.0)])
def test_a_folder_from_before_transformers_5_computes_the_same_here(
    tmp_path: Path, family: str, dropout: float
) -> None:
    folder = tmp_path / "old"
    old_folder(folder, family, lora_dropout=dropout)
    backbone = Backbone(build(family), name=family)
    delta = Delta.load(str(folder), backbone)
    assert {layer.dropout for _, layer in delta.at_sites()} == {dropout}
    old_folder(folder, family)  # PEFT fuses the experts and then refuses dropout
    same(delta, backbone, computed_by(folder, family))


def test_an_old_folder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    backbone = Backbone(build("mixtral"), name="mixtral")

    def refused(said: str, change: Any, **options: Any) -> None:
        tensors = old_folder(folder, "mixtral", **options)
        save_file(change(tensors), folder / TENSORS)
        with pytest.raises(DeltaFileError, match=said):
            Delta.load(str(folder), backbone)

    def without(mark: str) -> Any:
        return lambda tensors: {key: tensor for key, tensor in tensors.items() if mark not in key}

    def same_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors

    refused(
        r"lacks '.*experts.2.w1.lora_B.weight'; the mixture has 4 experts",
        without("0.block_sparse_moe.experts.2.w1.lora_B"),
    )
    refused(r"lacks tensors for '.*layers.1.block_sparse_moe.experts.0.w1'", without("1.block_sparse_moe.experts"))
    refused(
        r"has tensors for '.*experts.0.w3', which its target_modules do not",
        same_tensors,
        target_modules=["w1", "w2", "o_proj"],
    )
    refused(r"experts.0.w1.lora_A.weight' has shape \(3, 32\), expected \(4, 32\)", same_tensors, r=4)
    refused(
        r"has tensors for '.*experts.4'",
        lambda t: t | {key.replace("experts.3", "experts.4"): v.clone() for key, v in t.items()},
    )
    refused(r"several ranks or scales", same_tensors, alpha_pattern={r"experts.1.w1": 3})
    refused("layers.0.block_sparse_moe.gate", lambda t: {**without("-")(t), "base_model.model.model.layers.0.block_sparse_moe.gate.lora_A.weight": torch.ones(3, 32), "base_model.model.model.layers.0.block_sparse_moe.gate.lora_B.weight": torch.ones(4, 3)})  # fmt: skip
    other = Backbone(build("olmo"), name="olmo")
    old_folder(folder, "mixtral")
    with pytest.raises(DeltaFileError, match=r"experts.0.w\d', which is at no site of 'olmo'"):
        Delta.load(str(folder), other)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    theirs_in(folder, "mixtral", target_parameters=["experts.down_proj"])
    with pytest.raises(
        DeltaFileError, match=r"the parameter 'experts.down_proj', which is no mixture's experts in 'olmo'"
    ):
        Delta.load(str(folder), Backbone(build("olmo"), name="olmo"))
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)
    backbone = Backbone(build("mixtral"), name="mixtral")

    def refused(said: str, changed: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        (folder / CONFIG).write_text(json.dumps({**config, **changed}))
        save_file(tensors, folder / TENSORS)
        with pytest.raises(DeltaFileError, match=said):
            Delta.load(str(folder), backbone)

    both = ["experts.down_proj", "experts.gate_up_proj"]
    refused(
        r"lacks '.*mlp.experts.base_layer.lora_A.weight', which its target_parameters",
        {"target_parameters": both},
        tensors,
    )
    refused(r"experts'", {"target_parameters": None}, tensors)
    refused(
        r"parameter 'experts.weight', which is no mixture's .*expected experts.gate_up_proj or",
        {"target_parameters": ["experts.weight"]},
        tensors,
    )
    refused("lora_A.weight' has shape", {"r": 4}, tensors)
    refused("bias='all'", {"bias": "all"}, tensors)
    refused("olora", {"init_lora_weights": "olora"}, tensors)
    refused("q_proj.*target_modules select", {"target_modules": ["q_proj"]}, tensors)
    refused(r"lora_B.weight' has shape", {}, {key: t.mT.contiguous() if "lora_B" in key else t for key, t in tensors.items()})  # fmt: skip


def test_what_peft_cannot_hold_is_refused() -> None:
    backbone, delta = built("mixtral", EVERY.replace("per_expert", "dropout=0.1, per_expert"))
    with pytest.raises(UserError, match="PEFT has no dropout for a LoRA inside a mixture"):
        export(delta, backbone)
    backbone, delta = built("mixtral", EVERY)
    with pytest.raises(UserError, match="inside a mixture of experts, which is not written for vLLM"):
        export_for_vllm(delta, backbone)
