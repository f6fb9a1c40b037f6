"""Laws on every architecture: each law meets each architecture, with one method after another.

A pairwise covering set in `make test` (every law × architecture, method × architecture and law × method occurs), the
full product in `make test-all`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import pytest
import torch
from tests.backbone.families import FAMILIES as ALL
from tests.backbone.families import build, inputs, kind
from tests.laws.subjects import METHODS, SPECS, exemptions

from deltatune.backbone.gains import has_gain
from deltatune.backbone.load import Backbone
from deltatune.delta.delta import Delta
from deltatune.errors import RoutingError, SiteError
from deltatune.laws import LAWS, Subject
from deltatune.laws.families import FAMILIES as UNDER_ALL_LAWS
from deltatune.laws.rows import trained_together_is_trained_alone
from deltatune.laws.subject import LawBroken, alone_only

FIFTY_STEPS = "trained_together_is_trained_alone"
# Each row alone or padded, their own outputs differ, with no delta anywhere: rows of one length there.
PADDING_MATTERS = ("convbert", "nystromformer", "yoso")
# Siglip's text is summed up by its last position, padding or not, so rows have one length there, too.
ONE_LENGTH = (*PADDING_MATTERS, "siglip")
# They hold a row against itself at another padding, be it only for a neighbour's prompt.
AT_OTHER_PADDING = ("many_is_alone", "padding_left_out_changes_nothing", FIFTY_STEPS)
# Attention computes in float32, whatever the weights are; XGLM's mask has a number that float64 turns into infinity.
SINGLE = ("bloom", "codegen", "gemma2", "gpt_neo", "gptj", "longt5", "mpt", "splinter", "xglm")
# Training magnifies rounding there: weights are 1e-13 apart after one step, 2e-11 after ten, 6e-7 after fifty (Marian);
# 6e-17, 4e-15 and 1e-9 (HuBERT); 2e-13, 2e-13 and 3e-9 (mT5); 9e-16, 4e-15 and 2e-9 (UMT5, prompts before blocks).
STEEP = ("marian", "hubert", "mt5", "umt5")
# Norms compute in float32 there, so that what is written into one is rounded otherwise than what acts behind it, and
# gradients of their weights otherwise in another layout of the rows.
SINGLE_NORMS = ("cohere", "cohere2", "gemma", "gemma3_text", "helium")
ROUNDED = (("merges_as_declared", "lntuning"), ("padding_left_out_changes_nothing", "full"))
# Without noise each token has one candidate there, which weighs 1: no gradient reaches the router, to be tuned in full.
CERTAIN = ("phimoe",)
REACHED = ("only_the_delta_learns", "stands_or_refuses")
GENERATION = ("generates_as_alone", "cached_is_recomputed")
# Attention there asks transformers for no function, or (LongT5, MVP) some of it does not: nothing can be put into it.
NO_PREFIX = (
    "big_bird", "convbert", "deberta", "deberta-v2", "megatron-bert", "mpnet", "nystromformer", "rembert", "roformer", "yoso",
    "bloom", "codegen", "falcon", "gpt_neo", "gpt_neox_japanese", "gptj", "mpt", "xglm", "longt5", "mvp",
    "data2vec-vision", "swin",
)  # fmt: skip
# No embeddings of text can be given, and there is no token for the whole image, or positions count within the blocks.
NO_PROMPT = (
    "data2vec-vision", "ijepa", "siglip_vision_model", "swin", "yolos",
    "clip", "siglip", "hubert", "wav2vec2", "unispeech-sat", "whisper", "speech_to_text",
)  # fmt: skip
# Pixels or sound come in, through no table of tokens.
NO_TABLE = (
    "audio-spectrogram-transformer", "beit", "clip_vision_model", "data2vec-vision", "deit", "dinov2",
    "dinov2_with_registers", "ijepa", "siglip_vision_model", "swin", "vit", "vit_mae", "vit_msn", "yolos", "hubert",
    "wav2vec2", "unispeech-sat",
)  # fmt: skip
TWO_TOWERS = ("clip", "siglip")
FAMILIES = tuple(family for family in ALL if family not in UNDER_ALL_LAWS)
# Laws in which several deltas have rows of one call.
MIXED = {law for law, method, _ in exemptions() if method == "full"}


@cache
def backbone(family: str) -> Backbone:
    return Backbone(build(family), name=family)


@cache
def stands(method: str, family: str) -> bool:
    """Whether the method has a place."""
    if method == "lntuning":  # OLMo's norms have no weights
        norms = [site.exit for site in backbone(family).anatomy.sites if site.name in ("norm.attn", "norm.ffn")]
        return any(has_gain(backbone(family).module.get_submodule(path)) for path in norms)
    if method == "trainabletokens":
        return family not in NO_TABLE
    if method == "lora of a table":
        return family not in (*NO_TABLE, *TWO_TOWERS)  # both their inputs are an `embed`, and pixels are no tokens
    if method == "oft":
        return family != "swin"  # its first blocks are narrower than a rotation
    if method in ("prompt", "prompt deep", "ptuning"):
        return family not in NO_PROMPT
    return "prefix" not in method or family not in NO_PREFIX


@cache
def delta(method: str, family: str) -> Delta:
    return Delta.build(SPECS[method], backbone(family), seed=0, name="it")


def has_meaning(law: str, family: str) -> bool:
    if law in GENERATION and kind(family) not in ("causal", "seq2seq", "mel"):
        return False  # encoders generate nothing
    if law == "padding_left_out_changes_nothing" and kind(family) in ("pixels", "sound", "mel", "both"):
        return False  # rows of pixels or sound are whole, without padding; two towers have no one row of hidden states
    if law == "pickles_are_independent" and kind(family) == "sound":
        return False  # torch pickles no module with computed weights, as theirs for positions is
    if law == "nan_stays_at_home" and family in TWO_TOWERS:
        return False  # they score each image against each text, so all rows of a call meet in one product
    if family in PADDING_MATTERS:
        return law not in AT_OTHER_PADDING
    # Adam makes full steps of what rounding leaves of a gradient that is zero, as that of a bias of keys: float64 only.
    return family not in SINGLE or law != FIFTY_STEPS


def cases() -> dict[tuple[str, str, str], bool]:
    """Law, method and family of each case -> whether it is in the covering set."""
    found = {}
    for number, family in enumerate(FAMILIES):
        for place, law in enumerate(law for law in LAWS if has_meaning(law, family)):
            for index, method in enumerate(METHODS):
                found[law, method, family] = index == (number + place) % len(METHODS)
    return found


def quick(config: pytest.Config) -> bool:
    return str(config.option.markexpr) == "not slow"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "law" not in metafunc.fixturenames:
        return
    # Making 40,000 cases that are left out then would take the longest of all in `make test`.
    chosen = {case: covering for case, covering in cases().items() if covering or not quick(metafunc.config)}
    metafunc.parametrize(
        ("law", "method", "family"),
        [
            pytest.param(*case, id="-".join(case), marks=() if covering else pytest.mark.slow)
            for case, covering in chosen.items()
        ],
    )


def test_the_covering_set_is_pairwise() -> None:
    every, chosen = list(cases()), [case for case, covering in cases().items() if covering]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        wanted, found = ({(case[one], case[other]) for case in some} for some in (every, chosen))
        assert wanted == found


@pytest.mark.filterwarnings("ignore:delta .* was trained on the same backbone")
def test_law_holds(law: str, method: str, family: str, pytestconfig: pytest.Config) -> None:
    single = family in SINGLE or (family in SINGLE_NORMS and (law, method) in ROUNDED)
    subject = Subject(
        SPECS[method],
        backbone(family),
        length=7 if family in ONE_LENGTH else None,
        dtype=torch.float32 if single else torch.float64,
        given={name: tuple(x.shape[1:]) for name, x in inputs(family).items() if x.is_floating_point()},
    )
    if not stands(method, family):
        with pytest.raises(SiteError):
            delta(method, family)
        return
    refused: AbstractContextManager[object] = nullcontext()
    if law in MIXED and alone_only(delta(method, family)):
        refused = pytest.raises(RoutingError)
    if law in REACHED and method == "full" and family in CERTAIN:
        refused = pytest.raises(LawBroken, match="no gradient reaches .*mlp.router.weight")
    with refused:
        if law == FIFTY_STEPS and (family in STEEP or quick(pytestconfig)):
            # All fifty in `make test-all`, and on the six families of test_laws.py always.
            trained_together_is_trained_alone(subject, steps=10 if family in STEEP else 20)
        else:
            LAWS[law](subject)
