"""Delta expressions: what they mean, and where they say that they are wrong."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltatune.compose.expression import parse
from deltatune.delta.catalogue import catalogue
from deltatune.delta.method import Composition, Method, Spec
from deltatune.errors import DeltaExpressionError
from deltatune.methods.addition.adapter import Adapter
from deltatune.methods.addition.parallel_adapter import ParallelAdapter
from deltatune.methods.reparameterization.lora import LoRA
from deltatune.methods.specification.bitfit import BitFit


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("lora", LoRA()),
        (" LoRA ", LoRA()),
        ("lora()", LoRA()),
        ("lora(r=4, at='attn.q')", LoRA(r=4, at="attn.q")),
        ('lora(alpha=1.5, blocks="-1:")', LoRA(alpha=1.5, blocks="-1:")),
        ("parallel_adapter", ParallelAdapter()),
        ("ParallelAdapter(m=2)", ParallelAdapter(m=2)),
        ("parallel-adapter", None),
        ("adapter(m=4) | bitfit", Adapter(m=4) | BitFit()),
        ("lora | (adapter | bitfit)", LoRA() | Adapter() | BitFit()),
        ("lora(\n  r=4,\n)", LoRA(r=4)),
    ],
)
def test_meaning(text: str, spec: Spec | None) -> None:
    if spec is None:
        with pytest.raises(DeltaExpressionError):
            parse(text)
    else:
        assert parse(text) == spec


@pytest.mark.parametrize(
    ("text", "marked", "said"),
    [
        ("lorra", "»lorra", r"unknown method 'lorra'; nearest: lora"),
        ("adapter | lorra(r=4)", "adapter | »lorra(r=4)", r"unknown method 'lorra'; nearest: lora"),
        ("lora(rr=4)", "lora(»rr=4)", r"unknown field of LoRA 'rr'; nearest: r"),
        ("lora(alpha=2, ra=4)", "lora(alpha=2, »ra=4)", r"unknown field of LoRA 'ra'"),
        ("lora(r=4, alpha=-1)", "lora(r=4, »alpha=-1)", r"LoRA: alpha=-1.*greater than 0"),
        ("lora(alpha=2, r='x')", "lora(alpha=2, »r='x')", r"LoRA: r='x'.*valid integer"),
        ("lora(alpha=1e999)", "lora(»alpha=1e999)", r"finite number"),
        ("lora(r=4, r=5)", "lora(r=4, »r=5)" , r"r is given twice"),
        ("lora(4)", "lora(»4)", r"give fields by name, such as lora\(r=8\)"),
        ("lora(**{'r': 4})", "lora(**»{'r': 4})", r"give fields by name"),
        ("lora(r=x)", "lora(r=»x)", r"the value of r is not a number or a string"),
        ("lora(r={[]: 1})", "lora(r=»{[]: 1})", r"the value of r is not a number or a string"),
        ("lora(r=__import__('os'))", "lora(r=»__import__('os'))", r"the value of r is not a number or a string"),
        ("lora & adapter", "»lora & adapter", r"expected a method's name, such as lora"),
        ("lora | 3", "lora | »3", r"expected a method's name"),
        ("lora.adapter", "»lora.adapter", r"expected a method's name"),
        ("lora(at='é', rr=3)", "lora(at='é', »rr=3)", r"unknown field of LoRA 'rr'"),
        ("lora(\n r=4,\n rr=3)", "lora(\n r=4,\n »rr=3)", r"unknown field of LoRA 'rr'"),
        ("lora(r=4", "lora»(r=4", r"does not parse: '\(' was never closed"),
        ("lora |", "lora |»", r"does not parse: invalid syntax"),
        ("lora(at='\x0c', rr=3)", "lora(at='\x0c', »rr=3)", r"unknown field of LoRA 'rr'"),
        ("lora(\r\n r=4,\r\n rr=3)", "lora(\r\n r=4,\r\n »rr=3)", r"unknown field of LoRA 'rr'"),
        ("lora adapter", "lora »adapter", r"does not parse"),
        ("", "»", r"does not parse"),
        ("lora\x00", None, r"does not parse"),
        ("(" * 5000 + "lora" + ")" * 5000, None, r"does not parse"),
        (" | ".join(["lora"] * 50000), None, r"does not parse"),
    ],
)  # fmt: skip
def test_mistake_is_pointed_at(text: str, marked: str | None, said: str) -> None:
    with pytest.raises(DeltaExpressionError, match=said) as caught:
        parse(text)
    error = caught.value
    assert error.text == text.strip()
    if marked is not None:
        assert error.text[: error.position] + "»" + error.text[error.position :] == marked


def specs(cls: type[Method]) -> st.SearchStrategy[Method]:
    """Any fields that a method takes, from the ranges of its declaration."""
    texts = {
        "at": st.sampled_from(["attn.q", "ffn", "attn.{q,v} ffn.up"]) | st.text(),
        "blocks": st.none() | st.text(),
        "tie": st.text(),
        "tokens": st.text(),
    }
    fields = {}
    for name, field in cls.model_fields.items():
        bounds = {
            type(m).__name__: next(iter(vars(m).values()), None) for m in field.metadata if hasattr(m, "__dict__")
        }
        bounds |= {type(m).__name__: getattr(m, attribute) for m in field.metadata
                   for attribute in ("ge", "gt", "le", "lt") if hasattr(m, attribute)}  # fmt: skip
        low = bounds.get("Ge", bounds.get("Gt"))
        high = bounds.get("Le", bounds.get("Lt"))
        if field.annotation is int:
            fields[name] = st.integers(low, high)
        elif field.annotation is float:
            fields[name] = st.floats(
                low, high, exclude_min="Gt" in bounds, exclude_max="Lt" in bounds, allow_nan=False, allow_infinity=False
            )
        elif field.annotation is bool:
            fields[name] = st.booleans()
        elif name in texts:
            fields[name] = texts[name]
    return st.fixed_dictionaries({}, optional=fields).map(lambda given: cls(**given))


ANY = st.sampled_from(list(catalogue().values())).flatmap(specs)


@given(ANY)
@settings(deadline=None)
def test_method_comes_back_from_its_text(spec: Method) -> None:
    assert parse(str(spec)) == spec


@given(st.lists(ANY, min_size=2, max_size=4))
@settings(deadline=None, max_examples=30)
def test_composition_comes_back_from_its_text(made: list[Method]) -> None:
    spec = Composition(made)
    assert parse(str(spec)) == spec


@given(st.text() | st.text(alphabet="lora(|)=,r4'\"{}[]* \n\\é\x00", max_size=30))
@settings(deadline=None, max_examples=300)
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_any_text_is_a_spec_or_a_mistake_in_its_place(text: str) -> None:
    try:
        spec = parse(text)
    except DeltaExpressionError as error:
        assert 0 <= error.position <= len(error.text)
    else:
        assert parse(str(spec)) == spec
