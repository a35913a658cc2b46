"""The command-line door: one module a verb. Only typer is imported until a verb runs."""

from __future__ import annotations

import sys

import typer

from potstill.cli import cache, check, copy, distill, evaluate, new, plan, report, show
from potstill.cli import list as list_

app = typer.Typer(
    name="potstill",
    help="Knowledge distillation for PyTorch: a trained teacher in, a small student and the evidence out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("distill")(distill.distill)
app.command("check")(check.check)
app.command("plan")(plan.plan)
app.command("show")(show.show)
app.command("evaluate")(evaluate.evaluate)
app.command("report")(report.report)
app.command("list")(list_.list_)
app.command("copy")(copy.copy)
app.command("new")(new.new)
app.add_typer(cache.app, name="cache")


@app.callback(invoke_without_command=True)
def version(
    show_version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    """Knowledge distillation for PyTorch: a trained teacher in, a small student and the evidence out."""
    if show_version:
        from potstill._version import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; a user's mistake is a message and exit status 2, never a traceback."""
    from potstill.errors import PotstillError

    try:
        app()
    except PotstillError as error:
        typer.echo(str(error), err=True)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that cannot be written
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(1)
