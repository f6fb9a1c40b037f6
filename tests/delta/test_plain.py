"""Any network by the names of its modules: plain ones, and what the vocabulary has no word for in a transformer."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from tests.fit.tiny import backbone
from torch import Tensor, nn

import deltatune as dt
from deltatune.backbone.load import Backbone, load
from deltatune.compose.expression import parse
from deltatune.delta.adapted import Adapted, adapt
from deltatune.delta.delta import Delta
from deltatune.delta.exchange.peft import export, read, write
from deltatune.delta.merge import merge
from deltatune.errors import BackboneMismatch, RoutingError, SiteError, TaskError, UnknownName
from deltatune.laws.families import FAMILIES, tiny
from deltatune.laws.subject import moved

EVERYWHERE = "module:*"
SPECS = (
    f"lora(r=3, at='{EVERYWHERE}')", f"adapter(m=3, at='{EVERYWHERE}')", f"bitfit(at='{EVERYWHERE}')",
    f"ia3(at='{EVERYWHERE}')", "lora(r=2, at='module:mix.*') | adapter(m=2, at='module:out')",
)  # fmt: skip


class Mixer(nn.Module):
    """Patches mixed along both axes: no attention, channels that come and go from the last place, two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 8, 2)
        self.scale = nn.BatchNorm1d(8)
        self.mix = nn.ModuleDict({"tokens": nn.Linear(5, 5), "channels": nn.Linear(8, 8, bias=False)})
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 4)

    def forward(self, signal: Tensor, gain: Tensor) -> Tensor:
        h = self.scale(self.stem(signal))
        h = (h + self.mix["tokens"](h)).mT
        h = h + torch.tanh(self.mix["channels"](self.norm(h))) * gain[:, None, None]
        return self.out(h.mean(dim=1))


def network(seed: int = 0) -> Mixer:
    torch.manual_seed(seed)
    return Mixer().double().eval()


def rows(number: int = 6) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(number, 3, 6, generator=draw).double(), torch.randn(number, generator=draw).double()


def delta(text: str, on: Backbone, name: str = "", size: int = 3) -> Delta:
    return moved(Delta.build(parse(text), on, name=name).to(on.dtype), size)


def test_linears_and_norms_are_found_and_nothing_else() -> None:
    on = load(network())
    assert (on.kind, sorted(on.anatomy.modules)) == ("plain", ["mix.channels", "mix.tokens", "norm", "out"])
    assert "4 linears and norms" in repr(on)
    with pytest.raises(
        SiteError, match=r"no site 'attn.q': no stack of transformer blocks was found in Mixer .*module:"
    ):
        Delta.build(parse("lora"), on)


@pytest.mark.parametrize("text", SPECS)
def test_each_row_under_its_own_delta_is_the_row_alone(text: str) -> None:
    net = network()
    signal, gain = rows()
    on = load(net)
    with Adapted(on, [delta(text, on, "a", 3), delta(text, on, "b", 5)]) as adapted, torch.no_grad():
        route = ["a", "b", None, "b", "a", None]
        mixed = adapted(signal, gain, deltas=route)
        for i, name in enumerate(route):
            alone = adapted(signal[i : i + 1], gain=gain[i : i + 1], deltas=name)
            torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-9, atol=1e-9)
        bare = net(signal, gain)
        assert torch.equal(adapted(signal, gain, deltas=None), bare)
        assert float((mixed - bare)[[0, 1, 3, 4]].abs().min()) > 1e-4
        assert torch.equal(mixed[[2, 5]], bare[[2, 5]])
    assert torch.equal(net(signal, gain), bare)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert all(p.requires_grad for p in net.parameters())


def test_lora_is_its_formula_with_gradients() -> None:
    net, (signal, gain) = network(), rows()
    on = load(net)
    one = delta("lora(r=3, at='module:out mix.channels')".replace(" mix", " module:mix"), on)
    adapted = Adapted(on, [one])
    target = torch.randn(6, 4, generator=torch.Generator().manual_seed(2)).double()
    loss = (adapted(signal, gain) - target).square().sum()
    loss.backward()
    pairs = {site.exit: (layer.get_parameter("A"), layer.get_parameter("B")) for site, layer in one.at_sites()}
    ours = {path: [p.grad.clone() for p in pair] for path, pair in pairs.items() if pair[0].grad is not None}
    adapted.remove()
    other = network()
    leaves = {path: [p.detach().clone().requires_grad_() for p in pair] for path, pair in pairs.items()}
    changed = {
        f"{path}.weight": other.get_parameter(f"{path}.weight") + 16 / 3 * B @ A for path, (A, B) in leaves.items()
    }
    whole = {**dict(other.named_parameters()), **dict(other.named_buffers()), **changed}
    wanted = (torch.func.functional_call(other, whole, (signal, gain)) - target).square().sum()
    torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-9)
    wanted.backward()
    assert sorted(ours) == ["mix.channels", "out"]
    for path, gradients in ours.items():
        for own, leaf in zip(gradients, leaves[path], strict=True):
            torch.testing.assert_close(own, leaf.grad, rtol=1e-9, atol=1e-9)


def test_training_saving_and_loading(tmp_path: Path) -> None:
    net, (signal, gain) = network(), rows(32)
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    labels = (gain > 0).long()
    adapted = dt.adapt(net, dt.LoRA(r=4, at=EVERYWHERE), seed=0)
    adapted.bank.double()
    optimiser = torch.optim.Adam(adapted.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(adapted(signal, gain), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    one = adapted.bank[adapted.bank.names[0]]
    one.save(str(tmp_path / "one"))
    after = adapted(signal, gain)
    adapted.remove()
    assert all(torch.equal(p, weights[name]) for name, p in net.named_parameters())
    again = Adapted(load(network()), [dt.Delta.load(str(tmp_path / "one"))])
    assert torch.equal(again(signal, gain), after)
    with pytest.raises(BackboneMismatch, match="was trained on other weights"):
        Adapted(load(network(seed=1)), [dt.Delta.load(str(tmp_path / "one"))])


def test_merged_is_attached() -> None:
    net, (signal, gain) = network(), rows()
    on = load(net)
    one = delta(f"lora(at='module:{{out,channels,tokens}}') | bitfit(at='{EVERYWHERE}')", on)
    bare = net(signal, gain)
    with Adapted(on, [one]) as adapted:
        wanted = adapted(signal, gain)
    merged = merge(on, one)
    torch.testing.assert_close(net(signal, gain), wanted, rtol=1e-9, atol=1e-9)
    merged.unmerge()
    assert torch.equal(net(signal, gain), bare)


def test_full_tuning_trains_the_whole_network() -> None:
    net, (signal, gain) = network(), rows()
    on = load(net)
    one = Delta.build(parse("full"), on)
    assert one.trainable() == on.parameters
    with Adapted(on, [one]) as adapted:
        adapted(signal, gain).sum().backward()
        assert all(p.grad is not None for p in one.parameters())


def test_torch_s_own_transformer_computes_by_hooked_modules() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    net = nn.TransformerEncoder(layer, 2).eval()
    on = load(net)
    # Its attention uses the weights of out_proj and never calls it: a delta there would do nothing, in silence.
    with pytest.raises(SiteError, match="no linear or norm is called 'out_proj'"):
        Delta.build(parse("lora(at='module:out_proj')"), on)
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        for path in sorted(on.anatomy.modules):
            bare = net(x)
            with Adapted(on, [delta(f"lora(at='module:{path}')", on)]) as adapted:
                assert float((adapted(x) - bare).abs().max()) > 1e-4, path


def test_rows_that_do_not_fit_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Flatten(0, 1), nn.Linear(4, 2))
    on = load(net)
    with Adapted(on, [delta("lora(at='module:2')", on)]) as adapted:
        with pytest.raises(RoutingError, match="module:2 got 15 rows, the call routes 5"):
            adapted(torch.randn(5, 3, 4))
        with pytest.raises(RoutingError, match="Sequential has no gradient checkpointing"):
            adapted.gradient_checkpointing_enable()


def test_a_task_needs_a_transformer() -> None:
    with pytest.raises(TaskError, match=r"Mixer has no stack of transformer blocks .*dt.adapt\(network"):
        dt.fit(network(), dt.LoRA(at=EVERYWHERE), "stdlib_package")


@pytest.mark.parametrize(
    ("at", "error", "said"),
    [
        ("module:outer", SiteError, "no linear or norm is called 'outer'; nearest: out"),
        ("module:", SiteError, "no linear or norm is called ''"),
        ("module:stem", SiteError, "no linear or norm is called 'stem'"),
        ("mix.tokens", UnknownName, "unknown site 'mix.tokens'"),
    ],
)
def test_a_wrong_name_is_said(at: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        Delta.build(dt.LoRA(at=at), load(network()))


# On a transformer


def test_a_module_that_is_a_site_is_that_site() -> None:
    on = backbone("bert")
    by_name = Delta.build(parse("lora(at='module:{query,value}', blocks='1:')"), on)
    assert list(by_name.sites.values()) == list(
        Delta.build(parse("lora(at='attn.{q,v}', blocks='1:')"), on).sites.values()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_and_norm_has_a_name(family: str) -> None:
    module = tiny(family)
    on = Backbone(module)
    wanted = {
        p
        for p, m in module.named_modules()
        if isinstance(m, nn.Linear) or "Norm" in type(m).__name__ or "Conv1D" in type(m).__name__
    }
    assert set(on.anatomy.modules) == wanted
    assert set(on.anatomy.by_key.values()) >= set(on.anatomy.modules.values())


def test_a_fused_linear_is_changed_whole_and_the_pooler_has_a_name() -> None:
    gpt2 = Backbone(tiny("gpt2"))
    (site,) = gpt2.anatomy.select("module:c_attn", "0")
    assert (site.key, site.d_in, site.d_out, site.view) == ("decoder.0.module:attn.c_attn", 32, 96, None)
    bert = Backbone(tiny("bert"))
    assert [s.key for s in bert.anatomy.select("module:pooler.dense")] == ["module:pooler.dense"]


def test_a_wrapped_trunk_has_the_same_sites() -> None:
    import transformers as hf

    from deltatune.laws.families import CONFIGS

    alone, wrapped = tiny("bert"), hf.AutoModelForSequenceClassification.from_config(CONFIGS["bert"]())
    keys = {site.key for site in Backbone(alone).anatomy.modules.values()}
    assert {site.key for site in Backbone(wrapped).anatomy.modules.values()} == {*keys, "module:classifier"}


@pytest.mark.filterwarnings("ignore")
def test_peft_reads_and_writes_them(tmp_path: Path) -> None:
    on = load(network().float())
    signal, gain = (value.float() for value in rows())
    one = delta("lora(r=3, at='module:{out,channels}')", on)
    with Adapted(on, [one]) as adapted, torch.no_grad():
        wanted = adapted(signal, gain)
    write(export(one, on), tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(network().float(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(theirs(signal, gain), wanted, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    with adapt(on, read(tmp_path / "theirs", on)) as adapted, torch.no_grad():
        torch.testing.assert_close(adapted(signal, gain), wanted, rtol=1e-5, atol=1e-5)
