"""Every method with its default fields, and some variants, on every family; and the exemptions."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import NamedTuple

from deltatune.backbone.load import Backbone
from deltatune.delta.catalogue import catalogue
from deltatune.delta.method import Spec
from deltatune.laws import LAWS, Subject
from deltatune.laws.families import FAMILIES, tiny
from deltatune.methods.addition.adapter import Adapter
from deltatune.methods.addition.ia3 import IA3
from deltatune.methods.addition.prefix import Prefix
from deltatune.methods.addition.prompt import Prompt
from deltatune.methods.reparameterization.lora import LoRA

VARIANTS: dict[str, Spec] = {
    "lora of a table": LoRA(r=4, at="embed"),
    "lora tied": LoRA(r=4, tie="A"),
    "adapter tied": Adapter(m=4, tie="down up"),
    "prompt deep": Prompt(n=4, at="embed block"),
    "lora | prefix | ia3": LoRA(r=2, at="ffn.{up,down}") | Prefix(n=3) | IA3(),
}
SPECS: dict[str, Spec] = {name: cls() for name, cls in catalogue().items()} | VARIANTS
METHODS = tuple(SPECS)
TABLE = Path(__file__).parent / "exemptions.tsv"


class Case(NamedTuple):
    """One law for one method on one family."""

    law: str
    method: str
    family: str


@cache
def backbone(family: str) -> Backbone:
    """The family's model; laws copy it and never touch it."""
    return Backbone(tiny(family), name=family)


def subject(method: str, family: str) -> Subject:
    """A method or variant on a family."""
    return Subject(SPECS[method], backbone(family))


@cache
def exemptions() -> dict[Case, str]:
    """Case -> reason; a row of the table may name several families, and `*` is all."""
    found: dict[Case, str] = {}
    with TABLE.open(newline="") as stream:
        for row in csv.DictReader(stream, delimiter="\t"):
            families = FAMILIES if row["family"] == "*" else row["family"].split()
            found.update({Case(row["law"], row["method"], family): row["reason"] for family in families})
    return found


def covering(case: Case) -> bool:
    """Whether a case is in the covering sixth: of law, method and family each two meet in it."""
    number = list(LAWS).index(case.law) + METHODS.index(case.method) + FAMILIES.index(case.family)
    return number % len(FAMILIES) == 0
