"""The language of selections, and its errors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltatune.backbone.anatomy import Anatomy
from deltatune.backbone.load import Backbone
from deltatune.backbone.sites import VOCABULARY, Selection, block_numbers, expand_names
from deltatune.errors import SiteError, UnknownName
from deltatune.laws.families import tiny


@pytest.fixture(scope="module")
def bert() -> Anatomy:
    return Backbone(tiny("bert")).anatomy


@pytest.fixture(scope="module")
def t5() -> Anatomy:
    return Backbone(tiny("t5")).anatomy


def keys(selection: Selection) -> list[str]:
    return [site.key for site in selection]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("attn.q", ["attn.q"]),
        ("attn.{q,v}", ["attn.q", "attn.v"]),
        ("attn.{ q , v }", ["attn.q", "attn.v"]),
        ("attn.q, ffn", ["attn.q", "ffn"]),
        ("ffn  attn.q", ["ffn", "attn.q"]),
        ("{attn,ffn}", ["attn", "ffn"]),
        ("attn.q attn.{q,k}", ["attn.q", "attn.k"]),
        ("norm.{attn,ffn} ffn.{up,down}", ["norm.attn", "norm.ffn", "ffn.up", "ffn.down"]),
    ],
)
def test_names_expand(pattern: str, names: list[str]) -> None:
    assert expand_names(pattern) == names


@given(st.lists(st.sampled_from(VOCABULARY), min_size=1, unique=True), st.sampled_from([" ", ",", ", ", "  "]))
def test_any_list_of_names_expands_to_itself(names: list[str], between: str) -> None:
    assert expand_names(between.join(names)) == names


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("atn.q", r"unknown site 'atn.q'; nearest: attn.q"),
        ("attn.{q,w}", r"unknown site 'attn.w'; nearest: "),
        ("Attn", r"unknown site 'Attn'; nearest: attn"),
        ("xyz", r"unknown site 'xyz'.*`deltatune sites BACKBONE` lists them"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(pattern: str, said: str) -> None:
    with pytest.raises(UnknownName, match=said):
        expand_names(pattern)


@pytest.mark.parametrize("pattern", ["", " ", ",", " , "])
def test_empty_selections_are_refused(pattern: str) -> None:
    with pytest.raises(SiteError, match="an empty selection"):
        expand_names(pattern)


@pytest.mark.parametrize("pattern", ["attn.q{", "attn.q}", "attn.{q,v", "attn.{q,{v}}"])
def test_braces_that_do_not_match_are_refused(pattern: str) -> None:
    with pytest.raises(SiteError, match="braces of .* do not match"):
        expand_names(pattern)


@pytest.mark.parametrize(
    ("blocks", "numbers"),
    [
        ("0", {0}), ("-1", {5}), ("0,2,5", {0, 2, 5}), ("0, 2", {0, 2}), (":", {0, 1, 2, 3, 4, 5}), ("-4:", {2, 3, 4, 5}),
        (":2", {0, 1}), ("1:3", {1, 2}), ("0,-1,2:4", {0, 2, 3, 5}), ("4:99", {4, 5}), ("3:3", set()), (" 1 : 3 ", {1, 2}),
    ],
)  # fmt: skip
def test_blocks_are_slices_and_lists(blocks: str, numbers: set[int]) -> None:
    assert block_numbers(blocks, 6) == numbers


@given(st.integers(1, 40), st.integers(-50, 50) | st.none(), st.integers(-50, 50) | st.none())
def test_slices_are_pythons(depth: int, first: int | None, last: int | None) -> None:
    text = f"{'' if first is None else first}:{'' if last is None else last}"
    assert block_numbers(text, depth) == set(range(depth)[first:last])


@pytest.mark.parametrize("blocks", ["", "a", "1,", "1;2", "1:2:3", "--1", "1.5", "1-3", "1 2"])
def test_blocks_that_do_not_parse_are_refused(blocks: str) -> None:
    with pytest.raises(SiteError, match="does not parse: expected a slice or a list such as"):
        block_numbers(blocks, 6)


@pytest.mark.parametrize("blocks", ["6", "-7", "0,6"])
def test_blocks_that_are_not_there_are_refused(blocks: str) -> None:
    with pytest.raises(SiteError, match=r"names block -?\d; the stack has 6 blocks, 0 to 5"):
        block_numbers(blocks, 6)


def test_selection_stands_in_the_order_of_the_network(bert: Anatomy) -> None:
    expected = ["encoder.0.attn.q", "encoder.0.attn.v", "encoder.1.attn.q", "encoder.1.attn.v"]
    assert keys(bert.select("attn.{v,q}")) == expected
    assert keys(bert.select("attn.q ffn", "-1")) == ["encoder.1.attn.q", "encoder.1.ffn"]


def test_selection_in_both_stacks(t5: Anatomy) -> None:
    assert keys(t5.select("attn.q", "0")) == ["decoder.0.attn.q", "encoder.0.attn.q"]
    assert keys(t5.select("cross.k")) == ["decoder.0.cross.k", "decoder.1.cross.k"]


def test_selection_prints_counts_and_narrows(bert: Anatomy) -> None:
    selection = bert.select("attn.{q,v} norm.embed")
    assert repr(selection) == "5 sites: encoder.norm.embed encoder.[0,1].attn.q encoder.[0,1].attn.v"
    assert len(selection.expect(5)) == 5
    with pytest.raises(SiteError, match="the selection holds 5 sites, 4 expected: 5 sites: encoder"):
        selection.expect(4)
    assert keys(selection.narrow("attn.v")) == ["encoder.0.attn.v", "encoder.1.attn.v"]
    assert keys(selection.narrow("attn.v", "-1")) == ["encoder.1.attn.v"]
    assert keys(selection.narrow(blocks="0")) == ["encoder.norm.embed", "encoder.0.attn.q", "encoder.0.attn.v"]
    assert selection[1].name == "attn.q"


def test_site_that_is_lacking_is_refused_with_the_reason(bert: Anatomy) -> None:
    with pytest.raises(
        SiteError, match="no site 'cross.q': no attention to an encoder; it has: embed, norm.embed, attn.q"
    ):
        bert.select("attn.q cross.q")
    with pytest.raises(SiteError, match="no site 'ffn.gate': the feed-forward has no gate"):
        bert.select("ffn.gate")


def test_selection_without_a_match_is_refused(bert: Anatomy) -> None:
    with pytest.raises(SiteError, match=r"no site matches 'attn.q' in blocks='2:'; the backbone has \{'encoder': 2\}"):
        bert.select("attn.q", "2:")
