"""The sites of every family, proved by behaviour and not by names.

One probe stands at every site and keeps what comes through; a change at one place then says what lies behind it, what
does not, and whether the place mixes positions or works on each alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tests.backbone.families import FAMILIES, MIXTURES, build, inputs, kind
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.backbone.blocks import linear_shape, norm_width
from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import Site
from deltatune.delta.adapted import Adapted
from deltatune.delta.delta import Delta
from deltatune.delta.layer import Layer, Params
from deltatune.errors import SiteError

ABSENT = Path(__file__).with_name("absent.tsv")
NO_DOUBLE = ("xglm",)  # it fills its mask with a number that float64 does not have in transformers
SINGLE_SOFTMAX = ("gemma2", "splinter")  # transformers computes theirs in float32 whatever the network's dtype
# Attention that is no weighted mean of values: an approximation of one, or with convolutions beside it.
OTHER_ATTENTION = ("convbert", "nystromformer", "yoso")
Calls = list[tuple[Tensor, Tensor]]


class Probe:
    """A spec whose layers keep input and output of every call, and change the output at one site."""

    tie = ""

    def __init__(self) -> None:
        self.seen: dict[str, Calls] = {}
        self.target, self.change, self.position = "", "noise", -1

    @staticmethod
    def name() -> str:
        return "probe"

    def layer(self, site: Site, generator: torch.Generator) -> Layer:
        return Probing(self, site)

    def join(self, placed: object) -> None:
        """Its layers need not know of each other."""


class Probing(Layer):
    positionwise = False

    def __init__(self, probe: Probe, site: Site) -> None:
        super().__init__()
        self.probe, self.site = probe, site
        self.reads_input = site.name != "embed"  # type: ignore[misc]

    def forward(self, p: Params, x: Tensor | None, h: Tensor) -> Tensor:
        if self.probe.target == self.site.key:
            draw = torch.Generator().manual_seed(len(self.site.key))
            shape = h.shape[-1:] if self.probe.change == "constant" else h.shape
            noise = torch.randn(shape, generator=draw, dtype=h.dtype).expand(h.shape)
            if self.probe.position >= 0:
                kept = torch.zeros_like(h)
                kept[..., self.probe.position, :] = 1
                noise = noise * kept
            h = h + noise
        self.probe.seen.setdefault(self.site.key, []).append((h if x is None else x.clone(), h.clone()))
        return h


class Subject:
    """A family with the probe at all of its sites."""

    def __init__(self, family: str, module: nn.Module | None = None) -> None:
        self.family = family
        self.dtype = torch.float32 if family in NO_DOUBLE else torch.float64
        self.backbone = Backbone((module or build(family)).to(self.dtype))
        self.least = 1e-4 if family in NO_DOUBLE else 1e-9
        self.module, self.anatomy = self.backbone.module, self.backbone.anatomy
        self.probe = Probe()
        self.sites = [site for site in self.anatomy.sites if site.name != "weights"]
        delta = Delta(self.probe, [(0, site) for site in self.sites], name="probe")  # type: ignore[arg-type]
        self.adapted = Adapted(self.backbone, [delta])
        self.batch = {
            name: value.to(self.dtype) if value.is_floating_point() else value for name, value in inputs(family).items()
        }
        self.rows = len(next(iter(self.batch.values())))
        self.bare = self.run()

    def run(
        self, target: str = "", change: str = "noise", position: int = -1, batch: dict[str, Tensor] | None = None
    ) -> dict[str, Calls]:
        """What each site gives, with a change at one of them."""
        self.probe.seen, self.probe.target, self.probe.change, self.probe.position = {}, target, change, position
        options = {"use_cache": False} if kind(self.family) in ("causal", "seq2seq", "mel") else {}
        torch.manual_seed(0)
        with torch.no_grad():
            self.adapted(**(batch or self.batch), **options)
        return self.probe.seen

    def changed(self, after: dict[str, Calls]) -> set[str]:
        """The sites whose output is another than that of the bare model."""
        return {
            key
            for key, calls in after.items()
            if any(
                float((h - was).abs().max()) > self.least
                for (_, h), (_, was) in zip(calls, self.bare[key], strict=True)
            )
        }

    def last(self) -> str:
        """The output of the last block of the last stack."""
        stack, depth = list(self.anatomy.depth.items())[-1]
        return f"{stack}.{depth - 1}.block"

    def within(self, stack: str, number: int) -> dict[str, Site]:
        return {s.name: s for s in self.sites if (s.stack, s.block) == (stack, number)}

    def blocks(self) -> Iterator[dict[str, Site]]:
        """The sites of the first and the last block of each stack, by name."""
        for stack, depth in self.anatomy.depth.items():
            for number in sorted({0, depth - 1}):
                yield self.within(stack, number)


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(request.param)


@contextmanager
def perturbed(subject: Subject, site: Site) -> Iterator[None]:
    """Change the weights behind a site, through its view."""
    module = subject.module.get_submodule(site.exit)
    weight = module.get_parameter("weight")
    kept = weight.detach().clone()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=weight.dtype)
    turned = linear_shape(module) is not None and not isinstance(module, nn.Linear)
    if site.view is not None:
        columns = site.view.take(
            torch.arange(max(weight.shape) if weight.ndim == 1 else weight.shape[int(turned)])[None]
        )[0]
        mask = torch.zeros_like(weight)
        (mask.T if turned else mask)[columns] = 1
        noise = noise * mask
    with torch.no_grad():
        weight.add_(noise)
        yield
        weight.copy_(kept)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family in MIXTURES])
def test_inside_a_mixture_of_experts(family: str) -> None:
    """Each (token, chosen expert) pair, token after token, through the matrices of its expert."""
    subject = Subject(family)
    at = subject.within("decoder", 1)
    module = subject.module.get_submodule(at["ffn.up"].exit)
    chosen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, args: chosen.append(args[1]))
    seen = subject.run()
    handle.remove()
    expert = chosen[0].reshape(-1)
    (x, up), (_, gate), (acted_from, acted), (h, down) = (
        tuple(t.flatten(0, 1) for t in seen[at[f"ffn.{part}"].key][0]) for part in ("up", "gate", "act", "down")
    )
    both = torch.einsum("pi,poi->po", x, module.gate_up_proj[expert])
    torch.testing.assert_close(torch.cat([gate, up], dim=-1), both)
    torch.testing.assert_close(acted_from, gate)
    torch.testing.assert_close(h, acted * up)
    torch.testing.assert_close(down, torch.einsum("pi,poi->po", h, module.down_proj[expert]))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_are_computed_as_the_backbone_computes_them(implementation: str) -> None:
    module, batch = build("mixtral", implementation), inputs("mixtral")
    with torch.no_grad():
        bare = module(**batch).logits
        backbone = Backbone(module)
        sites = [(0, site) for site in backbone.anatomy.sites if site.experts]
        assert len(sites) == 8
        with Adapted(backbone, [Delta(Probe(), sites, name="probe")]) as adapted:  # type: ignore[arg-type]
            torch.testing.assert_close(adapted(**batch).logits, bare)
        assert module.config._experts_implementation == implementation
        assert torch.equal(module(**batch).logits, bare)


def test_experts_out_of_reach_are_refused() -> None:
    module = build("mixtral", "eager")
    module.config._experts_implementation_internal = "sonicmoe"
    with pytest.raises(SiteError, match="'sonicmoe' takes no delta at decoder.0.ffn.up; load the backbone with"):
        Subject.__init__(object.__new__(Subject), "mixtral", module)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_probe_that_changes_nothing_changes_nothing(family: str) -> None:
    subject = Subject(family)
    key = "decoder.norm.final" if "decoder.norm.final" in subject.bare else subject.last()
    given = subject.bare[key][0][1]
    subject.adapted.remove()
    kept: list[Tensor] = []
    module = subject.module.get_submodule(subject.anatomy.by_key[key].exit)
    handle = module.register_forward_hook(lambda m, a, o: kept.append(o if isinstance(o, Tensor) else o[0]))
    torch.manual_seed(0)
    with torch.no_grad():
        subject.module(**subject.batch)
    handle.remove()
    tolerance = 1e-5 if family in SINGLE_SOFTMAX else 1e-9
    torch.testing.assert_close(kept[-1].reshape(given.shape), given, rtol=tolerance, atol=tolerance)


def tied(subject: Subject, site: Site) -> bool:
    weight = subject.module.get_submodule(site.exit)._parameters.get("weight")
    return sum(p is weight for _, p in subject.module.named_parameters(remove_duplicate=False)) > 1


def test_each_site_is_called_with_its_widths_and_rows(subject: Subject) -> None:
    assert subject.bare.keys() == {site.key for site in subject.sites}
    for site in subject.sites:
        calls = subject.bare[site.key]
        assert len(calls) == (2 if site.rows == "none" else 1), site.key
        x, h = calls[0]
        assert x.shape[-1] == (site.d_out if site.name == "embed" else site.d_in), site.key
        assert h.shape[-1] == site.d_out, site.key
        assert len(h) == subject.rows, site.key
        assert site.rows != "parts" or h.ndim + bool(site.experts) + (subject.family == "opt") == 4, site.key
        if site.rows == "none":
            assert len(calls[1][1]) == 1, site.key


def test_dimension_0_is_rows(subject: Subject) -> None:
    """Another second row changes the second row everywhere, and no other one anywhere."""
    other = {}
    for name, value in subject.batch.items():
        row = value[1].roll(1, dims=-1) if value.is_floating_point() else value[1].flip(0)
        other[name] = value if name == "attention_mask" else torch.cat([value[:1], row[None], value[2:]])
    after = subject.run(batch=other)
    for site in subject.sites:
        (_, h), (_, was) = after[site.key][0], subject.bare[site.key][0]
        moved = (h - was).unflatten(0, (subject.rows, -1)).flatten(1).abs().amax(dim=1) > subject.least
        assert moved.tolist() == [number == 1 for number in range(subject.rows)], site.key


def test_a_linear_or_norm_is_what_its_site_gives(subject: Subject) -> None:
    """Output = weight times input, through the view; so the weights behind a site are those that are declared.

    The views of a fused linear are all of its columns, each once.
    """
    columns: dict[str, list[int]] = {}
    for site in subject.sites:
        if site.view is not None and site.call == 0:
            shape = linear_shape(subject.module.get_submodule(site.exit))
            assert shape is not None
            columns.setdefault(site.exit, []).extend(site.view.take(torch.arange(shape[1])).tolist())
    for path, found in columns.items():
        assert sorted(found) == list(range(len(found))), path
        assert (len(found),) == linear_shape(subject.module.get_submodule(path))[1:], path
    for site in subject.sites:
        module = subject.module.get_submodule(site.exit)
        if site.entry != site.exit or site.experts or site.name in ("block", "ffn.act", "embed"):
            continue
        x, h = subject.bare[site.key][0]
        assert site.bias == (getattr(module, "bias", None) is not None), site.key
        shape = linear_shape(module)
        if shape is not None:
            weight = module.get_parameter("weight")
            bias = module._parameters.get("bias")
            whole = F.linear(x, weight if isinstance(module, nn.Linear) else weight.T, bias)
            assert (whole.shape[-1] > site.d_out) == (site.view is not None), site.key
            torch.testing.assert_close(site.view.take(whole) if site.view else whole, h)
        elif norm_width(module) is not None:
            weight = module._parameters.get("weight")
            bias = module._parameters.get("bias")
            plain = h - (0 if bias is None else bias)
            centred = x - x.mean(dim=-1, keepdim=True)
            # A layer norm or an RMS norm of the input, up to its epsilon; some weights count from 1.
            pairs = [
                (plain / scale, wanted)
                for scale in ([torch.ones_like(x)] if weight is None else [weight, 1 + weight])
                for wanted in (x, centred)
            ]
            assert any(float(F.cosine_similarity(a, b, dim=-1).min()) > 1 - 1e-6 for a, b in pairs), site.key
        else:
            assert site.name == "ffn", site.key  # a mixture of experts


def test_perturbed_weights_change_what_lies_behind_them_and_nothing_else(subject: Subject) -> None:
    for at in subject.blocks():
        for site in at.values():
            module = subject.module.get_submodule(site.exit)
            if (
                site.entry == site.exit
                and site.calls == 1
                and not tied(subject, site)
                and "weight" in module._parameters
            ):
                with perturbed(subject, site):
                    changed = subject.changed(subject.run())
            else:
                changed = subject.changed(subject.run(site.key))
            check_behind(subject, site, at, changed)


BEHIND: dict[str, tuple[str, str]] = {  # site -> what must change with it in its block, what must not
    "attn.q": ("attn.o attn", "attn.k attn.v"),
    "attn.k": ("attn.o attn", "attn.q attn.v"),
    "attn.v": ("attn.o attn", "attn.q attn.k"),
    "attn.o": ("attn", "attn.q attn.k attn.v"),
    "attn": ("", "attn.q attn.k attn.v"),
    "cross.q": ("cross.o cross", "cross.k cross.v attn.q attn.k attn.v attn.o attn"),
    "cross.k": ("cross.o cross", "cross.q cross.v attn.q attn.k attn.v attn.o attn"),
    "cross.v": ("cross.o cross", "cross.q cross.k attn.q attn.k attn.v attn.o attn"),
    "cross.o": ("cross ffn.up ffn", "cross.q cross.k cross.v attn.q attn.k attn.v attn.o attn"),
    "ffn.up": ("ffn.down ffn", "ffn.gate attn.q attn.k attn.v attn.o attn"),
    "ffn.gate": ("ffn.act ffn.down ffn", "ffn.up attn.q attn.k attn.v attn.o attn"),
    "ffn.act": ("ffn.down ffn", "ffn.up ffn.gate attn.q attn.k attn.v attn.o attn"),
    "ffn.down": ("ffn", "ffn.up ffn.gate ffn.act attn.q attn.k attn.v attn.o attn"),
    "ffn": ("", "ffn.up ffn.gate ffn.act attn.q attn.k attn.v attn.o attn"),
}


def check_behind(subject: Subject, site: Site, at: dict[str, Site], changed: set[str]) -> None:
    assert site.block is not None
    assert site.key in changed
    must, never = BEHIND.get(site.name, ("", ""))
    for name in must.split():
        assert name not in at or at[name].key in changed, f"{site.key} -> {name}"
    for name in never.split():
        assert name not in at or at[name].key not in changed, f"{site.key} -> {name}"
    for other in subject.sites:
        if other.stack == site.stack:
            before = other.name in ("embed", "norm.embed") or (other.block is not None and other.block < site.block)
            after = other.name in ("block", "norm.final") and not before
            assert not before or other.key not in changed, f"{site.key} -> {other.key}"
            assert not after or other.key in changed, f"{site.key} -> {other.key}"
        elif (site.stack, other.stack) == ("encoder", "decoder"):
            reads = other.name in ("cross.k", "cross.v", "cross.o", "lm_head")
            assert not reads or other.key in changed, f"{site.key} -> {other.key}"
        else:
            assert other.key not in changed, f"{site.key} -> {other.key}"


def test_norms_stand_beside_their_sublayer(subject: Subject) -> None:
    """A norm before its sub-layer gives what that reads; one after it reads what that gave."""
    for at in subject.blocks():
        for group in ("attn", "cross", "ffn"):
            norm, part = at.get(f"norm.{group}"), at.get(group)
            if norm is None or part is None:
                continue
            given, read = subject.bare[norm.key][0][1], subject.bare[part.key][0][0]
            before = torch.equal(
                given.reshape(-1, norm.d_out).sort(dim=0)[0], read.reshape(-1, norm.d_out).sort(dim=0)[0]
            )
            after = norm.key in subject.changed(subject.run(part.key))
            assert before != after, f"{norm.key}: before {before}, after {after}"


def test_queries_keys_and_values_are_what_they_are_called(subject: Subject) -> None:
    """A query changes its own position alone; a key or value others too; a constant added to all values moves all alike."""
    for at in subject.blocks():
        for group in ("attn", "cross"):
            if f"{group}.q" not in at or f"{group}.o" not in at:
                continue
            bare = subject.bare[at[f"{group}.o"].key][0][1]

            def moved(part: str, change: str, position: int) -> Tensor:
                after = subject.run(at[f"{group}.{part}"].key, change, position)  # noqa: B023
                return after[at[f"{group}.o"].key][0][1] - bare  # noqa: B023

            def positions(part: str) -> int:
                difference = moved(part, "noise", 1)
                changed = difference.abs().amax(dim=-1) > subject.least
                return int(changed.reshape(-1, changed.shape[-1]).sum(dim=1).max())

            if subject.family not in OTHER_ATTENTION:
                assert positions("q") == 1, f"{group}.q"
                constant = moved("v", "constant", -1)
                spread = (constant - constant.flatten(0, -2)[0]).abs().max()
                assert float(constant.abs().max()) > 1e-6, f"{group}.v"
                assert float(spread) < 1e-6 * float(constant.abs().max()), f"{group}.v"
                constant = moved("k", "constant", -1)
                unlike = (constant - constant.flatten(0, -2)[0]).abs().max()
                assert float(constant.abs().max()) < subject.least or float(unlike) > subject.least, f"{group}.k"
            assert positions("k") > 1, f"{group}.k"
            assert positions("v") > 1, f"{group}.v"


def test_the_feed_forward_works_on_each_position_alone(subject: Subject) -> None:
    for at in subject.blocks():
        for name in ("ffn.up", "ffn.gate", "ffn.act", "ffn.down"):
            if name in at and "ffn" in at:
                after = subject.run(at[name].key, "noise", 0)[at["ffn"].key][0][1]
                moved = (after - subject.bare[at["ffn"].key][0][1]).abs().amax(dim=-1) > subject.least
                assert moved.reshape(-1, moved.shape[-1])[:, 1:].sum() == 0, name
                assert moved.any(), name


def declared() -> dict[tuple[str, str], str]:
    """The reviewed table: (family, site) -> reason."""
    lines = ABSENT.read_text().splitlines()[1:]
    return {(family, name): reason for family, name, reason in (line.split("\t") for line in lines)}


def hidden(families: Sequence[str]) -> dict[tuple[str, str], str]:
    """What a family computes but gives no place to, by (family, site)."""
    found = {}
    for family in families:
        anatomy = Backbone(build(family)).anatomy
        found |= {(family, name): reason for name, reason in anatomy.absent.items() if name in anatomy.hidden}
    return found


def test_what_is_out_of_reach_is_in_the_table_with_its_reason() -> None:
    """The table may only shrink: remove a line when its site is found, and add none."""
    found = hidden(FAMILIES)
    assert found == declared()


@pytest.mark.parametrize("family", ["marian", "pegasus", "roformer", "bart", "bert"])
def test_tables_of_positions_are_weights_where_they_are_learned(family: str) -> None:
    backbone = Backbone(build(family))
    backbone.module.requires_grad_(False)  # as it is for a delta, which must not hide the others
    found = {path for path in backbone.anatomy.parameters.values() if "position" in path}
    kept = {path for path, _ in backbone.module.named_parameters() if "position" in path}
    assert kept
    assert found == (kept if family in ("bart", "bert") else set())


@pytest.mark.parametrize("family", ["dinov2", "hubert"])
def test_stand_ins_for_what_is_hidden_in_pre_training_are_no_weights(family: str) -> None:
    backbone = Backbone(build(family))
    stand_ins = [path for path, _ in backbone.module.named_parameters() if "mask" in path]
    assert stand_ins
    assert not set(stand_ins) & set(backbone.anatomy.parameters.values())


def test_at_most_a_tenth_of_the_sites_is_out_of_reach(subject: Subject) -> None:
    names = {site.name for site in subject.anatomy.sites}
    missing = sorted(subject.anatomy.hidden)
    assert len(missing) <= (len(names) + len(missing)) / 10, missing
    assert all(len(reason) > 10 for reason in subject.anatomy.absent.values())
