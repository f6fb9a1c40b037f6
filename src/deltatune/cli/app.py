"""The verbs of the command line, in the order in which they are listed."""

from __future__ import annotations

from typing import Annotated

import typer

from deltatune import __version__
from deltatune.cli import (
    check,
    compare,
    demo,
    doctor,
    eval,
    export,
    fit,
    import_,
    inspect,
    merge,
    methods,
    predict,
    pull,
    push,
    report,
    reproduce,
    sites,
    tune,
)
from deltatune.cli.command import VerbGroup, add_verb

app = typer.Typer(
    name="deltatune",
    cls=VerbGroup,
    help="Adapt frozen pre-trained models with small trained deltas: pick one, train many at once, save, load, use.",
    epilog="Start with: deltatune demo",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _module, _verb in (
    (demo, demo.demo),
    (tune, tune.tune),
    (fit, fit.fit),
    (predict, predict.predict),
    (eval, eval.evaluate),
    (compare, compare.compare),
    (sites, sites.sites),
    (methods, methods.methods),
    (inspect, inspect.inspect),
    (doctor, doctor.doctor),
    (merge, merge.merge),
    (export, export.export),
    (import_, import_.import_),
    (push, push.push),
    (pull, pull.pull),
    (check, check.check),
    (report, report.report),
    (reproduce, reproduce.reproduce),
):
    add_verb(app, _module.__name__.rpartition(".")[2].rstrip("_"), _verb, _module.EXAMPLE)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"deltatune {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def everywhere(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where a fault of this program happened.")
    ] = False,
) -> None:
    """Show the help if no verb was given."""
    if context.invoked_subcommand is None:
        print(context.get_help())
