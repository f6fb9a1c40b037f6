"""How the words of a command line are read: verbs and options with the nearest names, options that take a list."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from deltatune.cli.output import own_stdout
from deltatune.errors import UnknownName


@dataclass(frozen=True)
class Invocation:
    """What was typed, as it can be pasted into a shell."""

    command: str


class VerbGroup(TyperGroup):
    """The verbs. An unknown one is a user's mistake with the nearest names."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise UnknownName("verb", args[0], self.commands, "`deltatune --help` lists them")
        return super().resolve_command(ctx, args)


class VerbCommand(TyperCommand):
    """One verb. In a verb without arguments of its own, `--task A B` means `--task A --task B`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if all(p.param_type_name == "option" for p in self.params):
            several = {name for p in self.params if getattr(p, "multiple", False) for name in p.opts}
            args = spread(args, several)
        return super().parse_args(ctx, args)


def spread(words: list[str], several: set[str]) -> list[str]:
    """Repeat an option that takes a list before each of its values: `--task A B` becomes `--task A --task B`."""
    made: list[str] = []
    option, first = "", False
    for word in words:
        if word.startswith("-") and word != "-":
            option = word.split("=", 1)[0] if word.split("=", 1)[0] in several else ""
            first = "=" not in word
        elif option:
            if not first:
                made.append(option)
            first = False
        made.append(word)
    return made


def add_verb(app: typer.Typer, name: str, verb: Callable[..., None], example: str) -> None:
    """Add a verb to the app. Its docstring is the help, with the example at the end; stdout is for its answer alone."""

    @functools.wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        with own_stdout():
            verb(*args, **kwargs)

    summary, _, rest = (verb.__doc__ or "").partition("\n")
    text = "\n".join([summary, rest, "", "\b", "Example:", *(f"  {line}" for line in example.splitlines())])
    app.command(name, cls=VerbCommand, help=text)(run)
